//! Encrypted connections, and those by the server's socket.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pubsub_cache::ServerCache;
use pubsub_core::{Bus, Event};
use pubsub_redis::{RedisServer, RedisServerCache};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use crate::port::free_port;
use crate::server::Server;
use crate::support::{PATIENCE, configured, connect, next, topic};

/// An authority of its own, and a key and a certificate of it for this machine.
struct Authority {
    certificate: String,
    of_server: (String, String),
}

fn authority() -> Authority {
    let (key, own) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "an authority"); // whose name is not its server's
    let certificate = params.self_signed(&key).unwrap().pem();
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let issuer = Issuer::new(params, key);
    let of_server = CertificateParams::new(names).unwrap().signed_by(&own, &issuer).unwrap();
    Authority { certificate, of_server: (own.serialize_pem(), of_server.pem()) }
}

/// What a server is told so that it also listens on a port for encrypted connections, with a certificate of an authority's.
fn options(authority: &Authority, directory: &Path, port: u16) -> std::io::Result<Vec<String>> {
    let file = |name: &str, text: &str| {
        let path = directory.join(name);
        std::fs::write(&path, text).map(|()| path.display().to_string())
    };
    let of = |option: &str, value: String| [format!("--tls-{option}"), value];
    let options = [
        of("port", port.to_string()),
        of("key-file", file("key.pem", &authority.of_server.0)?),
        of("cert-file", file("certificate.pem", &authority.of_server.1)?),
        of("ca-cert-file", file("authority.pem", &authority.certificate)?),
        of("auth-clients", "no".into()),
    ];
    Ok(options.concat())
}

pub(crate) async fn trusted() {
    let (trusted, stranger) = (authority(), authority());
    let port = free_port().unwrap();
    let server = Server::start_with(|directory, _| options(&trusted, directory, port)).unwrap();
    let encrypted = |pem: &str| RedisServer::new("localhost", port).tls_trusting(pem.as_bytes()).unwrap();
    let bus = connect(encrypted(&trusted.certificate)).await;
    let (mut listener, mut member) = (bus.subscribe("t").await.unwrap(), bus.subscribe_group("t", "g").await.unwrap());
    bus.publish("t", Event::new("x")).await.unwrap();
    assert_eq!(next(&mut listener).await.event().event_type(), "x");
    next(&mut member).await.done().await;
    let store = RedisServerCache::builder_on(encrypted(&trusted.certificate)).connect().await.unwrap();
    store.append(&topic("t"), &[Arc::new(Event::new("x"))]).await.unwrap();

    let system = RedisServer::new("localhost", port).tls().unwrap();
    for (what, untrusted) in [("another authority's", encrypted(&stranger.certificate)), ("the system's", system)] {
        let started = std::time::Instant::now();
        let refused = configured(untrusted).connect().await.unwrap_err();
        assert!(!refused.is_retryable() && refused.to_string().contains("certificate"), "{what}: {refused} {refused:?}");
        assert!(started.elapsed() < Duration::from_secs(1), "told after {:?}", started.elapsed());
    }
    // Where nothing is encrypted, and the other way round.
    let plain = RedisServer::new("localhost", server.address.port()).tls_trusting(trusted.certificate.as_bytes()).unwrap();
    assert!(configured(plain).connect().await.is_err());
    assert!(configured(RedisServer::new("localhost", port)).connect().await.is_err());
    for nothing in ["", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"] {
        let refused = RedisServer::new("localhost", port).tls_trusting(nothing.as_bytes()).unwrap_err();
        assert!(refused.to_string().contains("`ca`"), "{refused}");
    }
    bus.close(PATIENCE).await.unwrap();
}

/// Clients and nodes speak over encrypted connections alone, and each node tells clients where its port for those is.
pub(crate) async fn cluster() {
    let (trusted, ports) = (authority(), Mutex::new(Vec::new()));
    let nodes = Server::start_cluster_with(3, |directory| {
        let port = free_port()?;
        ports.lock().push(port);
        let among_themselves = ["--tls-cluster", "yes"].map(str::to_owned);
        Ok(options(&trusted, directory, port)?.into_iter().chain(among_themselves).collect())
    })
    .unwrap();
    let cluster = || RedisServer::cluster([("localhost".to_owned(), ports.lock()[0])]);
    let encrypted = || cluster().tls_trusting(trusted.certificate.as_bytes()).unwrap();
    let bus = connect(encrypted()).await;
    let names: Vec<_> = (0..24).map(|number| format!("t{number}")).collect();
    for name in &names {
        let (mut listener, mut member) = (bus.subscribe(name).await.unwrap(), bus.subscribe_group(name, "g").await.unwrap());
        bus.publish(name, Event::new("x")).await.unwrap();
        assert_eq!(next(&mut listener).await.event().event_type(), "x");
        next(&mut member).await.done().await;
    }
    let store = RedisServerCache::builder_on(encrypted()).connect().await.unwrap();
    store.append(&topic("t"), &[Arc::new(Event::new("x"))]).await.unwrap();
    for node in &nodes {
        assert!(!node.ask(&["KEYS", "*"]).unwrap().list().is_empty(), "topics on all nodes");
    }
    let untrusted = cluster().tls_trusting(authority().certificate.as_bytes()).unwrap();
    let refused = configured(untrusted).connect().await.unwrap_err();
    assert!(!refused.is_retryable() && refused.to_string().contains("certificate"), "{refused} {refused:?}");
    bus.close(PATIENCE).await.unwrap();
}

pub(crate) async fn by_socket() {
    let socket = |server: &Server| server.directory.join("socket");
    let server =
        Server::start_with(|directory, _| Ok(vec!["--unixsocket".into(), directory.join("socket").display().to_string()]))
            .unwrap();
    let url = format!("redis+unix://{}", socket(&server).display());
    let buses: [Bus; 2] = [
        connect(RedisServer::unix_socket(socket(&server)).database(3)).await,
        connect(RedisServer::from_url(&url).unwrap().database(3)).await,
    ];
    let mut member = buses[1].subscribe_group("t", "g").await.unwrap();
    let mut listener = buses[1].subscribe("t").await.unwrap();
    for round in 0..2 {
        buses[0].publish_data("t", "x", round).await.unwrap();
        assert_eq!(*next(&mut listener).await.data::<u32>().unwrap(), round);
        let delivery = next(&mut member).await;
        assert_eq!(*delivery.data::<u32>().unwrap(), round);
        delivery.done().await;
        server.ask(&["CLIENT", "KILL", "TYPE", "normal"]).unwrap();
    }
    let refused = configured(RedisServer::unix_socket("/nowhere/socket")).connect().await.unwrap_err();
    assert!(refused.is_retryable(), "it may come: {refused:?}");
}

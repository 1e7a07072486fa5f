//! A page that follows a topic, and whoever publishes to it over HTTP: what an application of your own needs, and nothing else.
//!
//! `cargo run --example notes [URL [ADDRESS]]`: then open the address it prints. The URL's bus should keep a history, as
//! `memory:?replay=memory` does (the default) and `unix:` and `redis:` do.

use std::error::Error;

use axum::Router;
use axum::response::Html;
use axum::routing::get;
use pubsub_core::Topic;
use pubsub_http::{Access, Action, HttpBuilder, ServeOptions, Verdict, serve};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().unwrap_or("memory:?replay=memory".into());
    let address = arguments.next().unwrap_or("127.0.0.1:8080".into());

    let bus = pubsub_connect::connect(&url).await?;
    let notes = Topic::new("notes")?;
    let may = move |access: Access<'_>| match access.action {
        Action::Follow | Action::Publish if access.topic == Some(&notes) => Verdict::Allow,
        _ => Verdict::Deny,
    };
    let http = HttpBuilder::new(bus).authorize(may).build()?;
    let app = Router::new().route("/", get(async || Html(include_str!("page.html")))).nest("/bus", http);

    let listener = TcpListener::bind(address).await?;
    println!("open http://{}/", listener.local_addr()?);
    serve(listener, app, ServeOptions::new(), async { drop(tokio::signal::ctrl_c().await) }).await?;
    Ok(())
}

//! A backend of one's own under a URL of its own: [`own_backend`], of which this shows that applications cannot tell it from the others.
//!
//! ```text
//! cargo run --example custom_backend -- 'tiny:?publish_timeout=1s'
//! ```

use std::time::Duration;

use futures::TryStreamExt;
use own_backend::TinyBus;
use pubsub_connect::{BusUrl, Registry};
use pubsub_core::{Bus, Result};

/// Takes its options out of the URL; what it does not ask for is refused. The future would be the place to dial a server.
fn tiny(url: &mut BusUrl) -> Result<impl Future<Output = Result<Bus>> + use<>> {
    let publish_timeout = url.duration("publish_timeout")?.unwrap_or(Duration::from_secs(5));
    Ok(async move { Ok(Bus::from(TinyBus::new(publish_timeout)?)) })
}

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::args().nth(1).unwrap_or("tiny:?publish_timeout=1s".into());
    let bus = Registry::with_defaults().register("tiny", tiny)?.connect(&url).await?;

    let mut worker = bus.subscribe_group("orders", "billing").await?;
    let mut audit = bus.subscribe("orders").await?;
    bus.publish_data("orders", "order.placed", 3).await?;

    let first = worker.try_next().await?.expect("the bus is open");
    println!("billing, attempt {}: {}", first.attempt(), *first.data::<u32>()?);
    first.retry().await;
    let second = worker.try_next().await?.expect("the bus is open");
    println!("billing, attempt {}: {}", second.attempt(), *second.data::<u32>()?);
    second.done().await;
    println!("audit: {}", audit.try_next().await?.expect("the bus is open").event().event_type());

    let closed = bus.close(Duration::from_secs(5)).await?;
    println!("closed {}", if closed.is_clean() { "cleanly" } else { "in the middle of something" });
    Ok(())
}

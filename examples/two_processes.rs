//! Two terminals share the work: run it in both. Kill either with what you like, and start it again: nothing is lost.
//!
//! ```sh
//! cargo run --example two_processes unix:demo/bus.sock
//! ```

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use pubsub_connect::connect;
use pubsub_core::{Bus, Event, Result, Subscription};

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::args().nth(1).unwrap_or("unix:demo/bus.sock".into());
    // How many orders to place, for those who want it to end.
    let count = std::env::args().nth(2).and_then(|count| count.parse().ok()).unwrap_or(u64::MAX);
    let bus = connect(&url).await?;
    let mut orders = bus.subscribe_group("shared.orders", "billing").await?;
    let handle = orders.handle();
    let publishing = async {
        place(&bus, count).await?;
        handle.drained().await;
        handle.stop();
        Result::Ok(())
    };
    futures::try_join!(publishing, bill(&mut orders))?;
    bus.close(Duration::from_secs(1)).await?;
    Ok(())
}

/// Each process places orders of its own, numbered; an order that could not be placed is placed again.
async fn place(bus: &Bus, count: u64) -> Result<()> {
    for number in 0..count {
        let order = format!("{}-{number}", std::process::id());
        let event = Event::new("order.placed").with_data(order);
        let event = Arc::new(event);
        while let Err(error) = bus.publish("shared.orders", event.clone()).await {
            if !error.error().is_retryable() {
                return Err(error.into());
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// Either process bills any of them.
async fn bill(orders: &mut Subscription) -> Result<()> {
    while let Some(order) = orders.next().await {
        let order = order?;
        println!("billed {} at attempt {}", *order.data::<String>()?, order.attempt());
        order.done();
    }
    Ok(())
}

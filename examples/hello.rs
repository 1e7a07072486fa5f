//! Connects, joins a group, publishes typed data, receives it and acknowledges.
use futures::TryStreamExt;

#[tokio::main]
async fn main() -> pubsub_core::Result<()> {
    let url = std::env::args().nth(1).unwrap_or("memory:".into());
    let bus = pubsub_connect::connect(&url).await?;
    let mut orders = bus.subscribe_group("orders", "billing").await?;
    bus.publish_data("orders", "order.placed", ("tea".to_owned(), 3)).await?;
    if let Some(order) = orders.try_next().await? {
        println!("{:?}", *order.data::<(String, u32)>()?);
        order.done().await;
    }
    Ok(())
}

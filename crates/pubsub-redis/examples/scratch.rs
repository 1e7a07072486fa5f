use futures::StreamExt;
use pubsub_core::*;
use pubsub_redis::RedisStreamsPubSub;
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let bus = Bus::from(RedisStreamsPubSub::builder("redis://127.0.0.1:7401")?.connect().await?);
    match bus.subscribe_group("t1", "g").await {
        Ok(mut m) => {
            println!("{:?}", bus.publish("t1", Event::new("x")).await);
            println!("{:?}", tokio::time::timeout(std::time::Duration::from_secs(3), m.next()).await);
        }
        Err(e) => println!("{e:?}"),
    }
    Ok(())
}

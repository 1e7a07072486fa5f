//! A worker: a member of a group whose failures are retried, and dead-lettered when no attempt is left.

use std::time::Duration;

use pubsub_connect::connect;
use pubsub_core::{Failure, Group, Origin, Result, RetryPolicy, Start, SubscribeOptions, Subscription, Topic};

fn options() -> Result<SubscribeOptions> {
    let retry = RetryPolicy::new().max_attempts(3).backoff(Duration::from_millis(20), Duration::from_secs(1));
    Ok(SubscribeOptions::group(Group::new("billing")?).retry(retry).dead_letter(Topic::new("payments.failed")?))
}

async fn work(payments: &mut Subscription) -> Result<()> {
    let report = payments.run(8, async |payment| charge(*payment.data::<i64>()?).await).await?; // an error or a panic is a retry
    println!("{report:?}");
    Ok(())
}

async fn charge(amount: i64) -> Result<(), Failure> {
    if amount < 0 { Err(Failure::retry("nothing to charge")) } else { Ok(()) }
}

#[tokio::main]
async fn main() -> Result<()> {
    let bus = connect(&std::env::args().nth(1).unwrap_or("memory:".into())).await?;
    let mut payments = bus.subscribe_with("payments", options()?).await?;
    for amount in [5, -1, 8] {
        bus.publish_data("payments", "payment.due", amount).await?;
    }
    let handle = payments.handle();
    let until_drained = async {
        handle.drained().await;
        handle.stop();
    };
    let (worked, ()) = futures::join!(work(&mut payments), until_drained);
    worked?;
    for (_, letter) in bus.history("payments.failed", Start::Earliest, 10).await?.entries {
        println!("{:?}", Origin::of(&letter));
    }
    Ok(())
}

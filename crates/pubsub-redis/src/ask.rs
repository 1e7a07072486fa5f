//! Asking again while the connection is being made again.

use std::future::Future;

use pubsub_core::machinery::Pause;
use tokio::time::{Instant, timeout_at};

use crate::errors::Fault;

/// Asks until there is an answer that is none of a connection being made again, but not beyond this time. What is not `repeatable` is
/// not asked for again once it may have been done.
pub(crate) async fn ask<T, F>(until: Instant, repeatable: bool, ask: impl Fn() -> F) -> Result<T, Fault>
where
    F: Future<Output = Result<T, Fault>>,
{
    let mut pause = Pause::new();
    loop {
        let fault = match timeout_at(until, ask()).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(fault)) => fault,
            Err(_) => return Err(Fault::Unknown("there was no answer within command_timeout".into())),
        };
        let again = Instant::now() + pause.step();
        if !fault.is_temporary() || (fault.is_unknown() && !repeatable) || again >= until {
            return Err(fault);
        }
        tokio::time::sleep_until(again).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(1)
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_temporary_is_asked_again_and_what_may_have_been_done_only_if_it_may_be_repeated() {
        let asked = Cell::new(0);
        let cut = |answer_at: u32| {
            let now = asked.replace(asked.get() + 1);
            async move { if now == answer_at { Ok(now) } else { Err(Fault::Unknown("cut".into())) } }
        };
        assert_eq!(ask(soon(), true, || cut(2)).await, Ok(2));
        assert!(ask(soon(), false, || cut(9)).await.is_err() && asked.get() == 4);
        asked.set(0);
        let loading = || {
            let now = asked.replace(asked.get() + 1);
            async move { if now == 1 { Ok(()) } else { Err(Fault::Refused("LOADING".into())) } }
        };
        assert_eq!(ask(soon(), false, loading).await, Ok(()));
        let refused = || async { Err::<(), _>(Fault::Refused("NOPERM".into())) };
        assert_eq!(ask(soon(), true, refused).await, Err(Fault::Refused("NOPERM".into())));
        assert!(ask(soon(), true, || cut(u32::MAX)).await.is_err(), "it ends");
        assert!(ask(soon(), true, std::future::pending::<Result<(), _>>).await.unwrap_err().is_unknown());
    }
}

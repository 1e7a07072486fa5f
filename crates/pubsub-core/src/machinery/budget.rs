//! Yielding, for what never has to wait.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::task::{Context, Poll, ready};

use tokio::task::coop;

/// How many steps a unit of the budget lasts that tokio gives a task for one turn. It is meant for more than handing over one event
/// within the process. Publishers that yield more often take turns with their consumers in smaller batches, and on more cores, than
/// their queues would have them; and a yield may wake a worker that finds nothing to do.
const STEPS: u8 = 4;

/// Lets others run now and then; to be awaited once for each publish that may not have to wait for anything else. Cancel safe.
pub fn yield_now_and_then() -> impl Future<Output = ()> {
    poll_fn(poll_yield)
}

/// Pending, with its waker woken, where a task has had its turn; to be asked once for each delivery that was at hand.
#[inline]
pub fn poll_yield(cx: &mut Context<'_>) -> Poll<()> {
    thread_local! {
        static TAKEN: Cell<u8> = const { Cell::new(0) };
    }
    if TAKEN.get().is_multiple_of(STEPS) {
        ready!(coop::poll_proceed(cx)).made_progress();
    }
    TAKEN.set(TAKEN.get().wrapping_add(1));
    Poll::Ready(())
}

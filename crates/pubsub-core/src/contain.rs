//! Calling code that is not ours: a panic of it ends where it was called.

use std::any::Any;
use std::future::Future;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};

use futures::FutureExt;

/// Calls code that is not ours.
///
/// # Errors
/// What it said when it panicked.
pub fn contain<T>(run: impl FnOnce() -> T) -> Result<T, Box<str>> {
    catch_unwind(AssertUnwindSafe(run)).map_err(said)
}

/// Calls an async function that is not ours, which may panic before there is a future as well as after. Cancel safe as far as that
/// function is.
///
/// # Errors
/// What it said when it panicked.
pub async fn contain_async<F: Future>(start: impl FnOnce() -> F) -> Result<F::Output, Box<str>> {
    AssertUnwindSafe(contain(start)?).catch_unwind().await.map_err(said)
}

/// What a panic said. What it carried is let go of here; its destructor is no more ours than what panicked, and may panic in turn.
fn said(panic: Box<dyn Any + Send>) -> Box<str> {
    let text = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => Box::from(*text),
        (None, Some(text)) => Box::from(text.as_str()),
        (None, None) => Box::from("no message"),
    };
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        mem::forget(again); // there is no end to it otherwise
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_here_whatever_it_carries() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                std::panic::panic_any(Self);
            }
        }
        assert_eq!(contain(|| 1), Ok(1));
        assert_eq!(contain(|| panic!("no {}", 2)), Err::<(), _>("no 2".into()));
        assert_eq!(contain(|| std::panic::panic_any(Bomb)), Err::<(), _>("no message".into()));
    }
}

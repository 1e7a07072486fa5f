//! What backends share, each written once: for authors of backends, not for applications.
//!
//! [`DeliveryQueue`] is the one most want: a bounded queue with members that ask for work, deliveries in flight, retries,
//! exhaustion and hold limits, for a fan-out subscription as for a group. It is made of [`InFlight`] and [`RetryQueue`] and
//! kept on time by a [`Timer`]. [`SettleQueue`] is for backends whose settlements travel.

mod budget;
mod closing;
mod delivery_queue;
mod in_flight;
mod letters;
mod pause;
mod prepare;
mod retry_queue;
mod settle_queue;
mod timer;

pub use budget::{poll_yield, yield_now_and_then};
pub use closing::{Closing, end_queues};
pub use delivery_queue::{Aftermath, DeadLetterSink, DeliveryQueue, Entry, InstanceId, QueueStatus};
pub use in_flight::InFlight;
pub use letters::publish_letters;
pub use pause::Pause;
pub use prepare::prepare;
pub use retry_queue::RetryQueue;
pub use settle_queue::{OpenSettlement, SettleQueue};
pub use timer::{Due, Timer};

pub use crate::contain::{contain, contain_async};
pub use crate::delivery::Indexed;

//! Concurrency and unsubscribing.

use crate::Property;

pub(crate) fn properties() -> Vec<Property> {
    vec![]
}

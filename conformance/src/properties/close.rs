//! Closing, flushing, draining.

use crate::Property;

pub(crate) fn properties() -> Vec<Property> {
    vec![]
}

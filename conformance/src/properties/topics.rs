//! Clearing and trimming topics.

use crate::Property;

pub(crate) fn properties() -> Vec<Property> {
    vec![]
}

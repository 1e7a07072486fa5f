//! Failures and reconnecting.

use crate::Property;

pub(crate) fn properties() -> Vec<Property> {
    vec![]
}

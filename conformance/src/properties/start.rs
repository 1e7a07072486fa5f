//! Where subscriptions start.

use crate::Property;

pub(crate) fn properties() -> Vec<Property> {
    vec![]
}

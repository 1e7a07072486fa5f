//! Order of first deliveries.

use crate::Property;

pub(crate) fn properties() -> Vec<Property> {
    vec![]
}

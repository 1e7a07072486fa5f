//! What travels between implementations.

use crate::Property;

pub(crate) fn properties() -> Vec<Property> {
    vec![]
}

//! Settlement: acknowledgement, retries, attempts, holding.

use crate::Property;

pub(crate) fn properties() -> Vec<Property> {
    vec![]
}

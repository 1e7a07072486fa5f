//! Events that stay within their instance.

use crate::Property;

pub(crate) fn properties() -> Vec<Property> {
    vec![]
}

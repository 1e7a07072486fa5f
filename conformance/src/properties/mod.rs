//! The registry: every property, by section.

mod batch;
mod close;
mod concurrency;
mod contract;
mod contract_state;
mod failure;
mod groups;
mod inline;
mod interop;
mod leases;
mod limits;
mod local;
mod order;
mod publish;
mod replay;
mod settle;
mod start;
mod topics;

use crate::Property;

/// Every property, those omitted included, in the order of their sections.
pub fn registry() -> Vec<Property> {
    [
        publish::properties,
        groups::properties,
        settle::properties,
        order::properties,
        start::properties,
        replay::properties,
        batch::properties,
        concurrency::properties,
        close::properties,
        failure::properties,
        leases::properties,
        topics::properties,
        limits::properties,
        local::properties,
        interop::properties,
        contract::properties,
        contract_state::properties,
        inline::properties,
    ]
    .into_iter()
    .flat_map(|section| section())
    .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::registry;

    #[test]
    fn ids_are_unique_and_every_property_names_a_clause_or_why_it_is_out() {
        let mut ids = HashSet::new();
        for property in registry() {
            assert!(ids.insert(property.id()), "{} twice", property.id());
            assert!(!property.clauses().is_empty() || property.omitted().is_some(), "{} has no clause", property.id());
            assert!(!property.title().ends_with('.'), "{}: a title has no full stop", property.id());
        }
    }
}

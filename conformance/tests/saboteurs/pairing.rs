//! The machine check: clauses, properties, saboteurs and the original list pair up.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use libtest_mimic::{Failed, Trial};
use pubsub_conformance::{Property, registry};
use pubsub_core::guide::CLAUSES;

use crate::{Saboteur, saboteurs};

/// Clauses that no saboteur can break, and why.
const UNBREAKABLE: &[(&str, &str)] =
    &[("T2", "the types leave a coalescing function nothing but to drop: only code that does not compile breaks it")];

/// Every property that was asked for at first; each is in the registry, if only as one that is left out, with its reason.
const ASKED_FOR: &[(&str, &[RangeInclusive<u32>])] = &[
    ("PS", &[1..=18, 20..=26]),
    ("GR", &[1..=6, 8..=16, 18..=19]),
    ("AK", &[1..=11, 13..=41]),
    ("OR", &[1..=9]),
    ("SP", &[1..=12]),
    ("RP", &[1..=29, 31..=31]),
    ("BA", &[1..=17, 19..=19]),
    ("CC", &[1..=18]),
    ("CL", &[1..=14]),
    ("FR", &[1..=20]),
    ("LE", &[1..=17]),
    ("CT", &[1..=10]),
    ("LI", &[1..=11]),
    ("LO", &[1..=8]),
    ("IN", &[1..=6]),
    ("META", &[1..=5]),
    ("AD", &[1..=12]),
];

pub(crate) fn trials() -> Vec<Trial> {
    let check = |name: &str, check: fn() -> Vec<String>| {
        Trial::test(name, move || {
            let wrong = check();
            if wrong.is_empty() { Ok(()) } else { Err(Failed::from(wrong.join("\n"))) }
        })
    };
    vec![
        check("every clause has a property, and every property names clauses there are", clauses_and_properties),
        check("every clause has a saboteur, or a reason why there can be none", clauses_and_saboteurs),
        check("every saboteur is caught by properties of the clauses it breaks", saboteurs_and_properties),
        check("every property that was asked for is there, or left out for a reason", asked_for),
    ]
}

fn clauses_and_properties() -> Vec<String> {
    let registry = registry();
    let tested: BTreeSet<_> =
        registry.iter().filter(|property| property.omitted().is_none()).flat_map(Property::clauses).collect();
    let untested = CLAUSES.iter().filter(|clause| !tested.contains(clause)).map(|clause| format!("{clause} has no property"));
    let unknown = registry.iter().flat_map(|property| {
        let unknown = property.clauses().iter().filter(|clause| !CLAUSES.contains(clause));
        unknown.map(|clause| format!("{} names {clause}, which is no clause", property.id()))
    });
    untested.chain(unknown).collect()
}

fn clauses_and_saboteurs() -> Vec<String> {
    let saboteurs = saboteurs();
    let broken: BTreeSet<_> = saboteurs.iter().flat_map(|saboteur| saboteur.clauses).collect();
    let excused = |clause: &str| UNBREAKABLE.iter().any(|(unbreakable, _)| *unbreakable == clause);
    CLAUSES
        .iter()
        .filter_map(|clause| match (broken.contains(clause), excused(clause)) {
            (false, false) => Some(format!("nobody breaks {clause}")),
            (true, true) => Some(format!("{clause} is broken and excused")),
            _ => None,
        })
        .collect()
}

fn saboteurs_and_properties() -> Vec<String> {
    let registry = registry();
    let clauses_of = |id: &str| registry.iter().find(|property| property.id() == id).map_or(&[][..], |found| found.clauses());
    let mut wrong = Vec::new();
    let mut names = BTreeSet::new();
    for Saboteur { what, clauses, caught_by, .. } in saboteurs() {
        if !names.insert(what) {
            wrong.push(format!("there are two that {what:?}"));
        }
        if caught_by.is_empty() || clauses.is_empty() {
            wrong.push(format!("{what:?} names no property, or no clause"));
        }
        for clause in clauses {
            if !CLAUSES.contains(clause) {
                wrong.push(format!("{what:?} names {clause}, which is no clause"));
            } else if !caught_by.iter().any(|id| clauses_of(id).contains(clause)) {
                wrong.push(format!("{what:?} breaks {clause}, but none of {caught_by:?} is about it"));
            }
        }
    }
    wrong
}

fn asked_for() -> Vec<String> {
    let registry = registry();
    let there: BTreeSet<_> = registry.iter().map(|property| property.id().to_owned()).collect();
    let asked = ASKED_FOR
        .iter()
        .flat_map(|(section, numbers)| numbers.iter().cloned().flatten().map(move |number| id(section, number)));
    asked.filter(|id| !there.contains(id)).map(|id| format!("{id} is neither there nor left out for a reason")).collect()
}

fn id(section: &str, number: u32) -> String {
    if section == "META" { format!("{section}-{number}") } else { format!("{section}-{number:02}") }
}

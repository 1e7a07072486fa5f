//! What the backends guarantee, as a table for the README: what each is declared to do, and how many properties hold it to that.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use pubsub_core::{
    Attempts, Capabilities, Deduplication, Durability, Groups, LateSettlement, LossNotice, Order, Reach, Retention,
};

use crate::{Harness, registry};

/// The sections of the contract, by the letter that their clauses begin with.
const SECTIONS: [(char, &str); 10] = [
    ('P', "publish"),
    ('B', "subscribe"),
    ('S', "settle"),
    ('T', "batch"),
    ('R', "replay"),
    ('C', "close"),
    ('N', "connect"),
    ('L', "leases"),
    ('K', "capabilities"),
    ('I', "inline"),
];

/// The table, in Markdown, from what harnesses declare and from their committed reports in this directory. It has a column for each
/// backend; variants of one, whose names have a hyphen, and decorators are left out.
///
/// # Errors
/// That a report cannot be read.
pub fn guarantees(reports: &Path) -> std::io::Result<String> {
    let backends: Vec<Arc<dyn Harness>> = super::all().into_iter().filter(|harness| !harness.name().contains('-')).collect();
    let declared: Vec<_> = backends.iter().map(|harness| harness.declared()).collect();
    let mut table = String::new();
    let mut row =
        |name: &str, cells: Vec<String>| writeln!(table, "| {name} | {} |", cells.join(" | ")).expect("text takes text");
    row("", backends.iter().map(|harness| format!("`{}:`", harness.name())).collect());
    row("---", vec!["---".into(); backends.len()]);
    for (name, say) in declarations() {
        row(name, declared.iter().map(|declared| say(declared).to_owned()).collect());
    }
    let reports: Vec<_> = backends.iter().map(|harness| passed(reports, harness.name())).collect::<Result<_, _>>()?;
    for (letter, name) in SECTIONS {
        let count = |report: &BTreeMap<char, usize>| report.get(&letter).map_or("-".into(), ToString::to_string);
        row(&format!("properties that hold it: {name}"), reports.iter().map(count).collect());
    }
    Ok(table)
}

/// How many properties of each section passed. One that holds clauses of two sections counts in both.
fn passed(reports: &Path, backend: &str) -> std::io::Result<BTreeMap<char, usize>> {
    let report = std::fs::read_to_string(reports.join(format!("{backend}.txt")))?;
    let passed: Vec<_> = report.lines().filter_map(|line| line.strip_suffix(" pass")).collect();
    let mut counts = BTreeMap::new();
    for property in registry().iter().filter(|property| passed.contains(&property.id())) {
        let mut sections: Vec<_> = property.clauses().iter().filter_map(|clause| clause.chars().next()).collect();
        sections.sort_unstable();
        sections.dedup();
        sections.into_iter().for_each(|section| *counts.entry(section).or_default() += 1);
    }
    Ok(counts)
}

type Say = fn(&Capabilities) -> &'static str;

fn declarations() -> [(&'static str, Say); 12] {
    [
        ("events reach", |c| reach(c.reach)),
        ("`Ok` of a publish outlives", |c| match c.durability {
            Durability::Process => "nothing",
            Durability::ProcessDeath => "any processes of the host",
            Durability::Server => "the publishing host",
        }),
        ("order", |c| match c.order {
            Order::Total => "one for all subscriptions",
            Order::PerPublisher => "each publisher's",
            Order::PerKey => "each publisher's, per key",
            _ => "none",
        }),
        ("kept for those who come later", |c| match c.retention {
            Retention::Nothing => "nothing",
            Retention::Backlog => "what groups have not settled",
            _ => "a bounded history",
        }),
        ("groups", |c| match c.groups {
            Groups::Durable if !c.group_history => "durable, from when they are made",
            Groups::Durable => "durable",
            Groups::Ephemeral => "while they have a member",
            _ => "none",
        }),
        ("dead letters can be listed and redriven", |c| yes(c.dead_letter_history)),
        ("attempts are counted", |c| match c.attempts {
            Attempts::Bus => "for the group, crashes too",
            _ => "by each instance",
        }),
        ("a late settlement is", |c| match c.late_settlement {
            LateSettlement::Refused => "refused",
            _ => "sometimes unconfirmed",
        }),
        ("a group that lost events is told", |c| match c.loss_notice {
            LossNotice::Counted => "how many",
            LossNotice::Noticed => "that it did",
            _ => "nothing",
        }),
        ("a publish that is repeated is", |c| match c.deduplication {
            Deduplication::None => "another event",
            Deduplication::Window { .. } => "one event",
            _ => "one event, but for groups",
        }),
        ("events have dense indices", |c| yes(c.indexed)),
        ("leases hold for", |c| c.leases.map_or("none: `?leases=URL`", reach)),
    ]
}

fn reach(reach: Reach) -> &'static str {
    match reach {
        Reach::Process => "the process",
        Reach::Host => "the host",
        Reach::Network => "all hosts",
    }
}

fn yes(is_so: bool) -> &'static str {
    if is_so { "yes" } else { "no" }
}

//! What is expected of a backend: one committed line per property.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use crate::Outcome;

/// How a report differs from what was expected, one line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Differences(Vec<String>);

impl Differences {
    /// The differences.
    pub fn lines(&self) -> &[String] {
        &self.0
    }
}

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} differences from what is expected (CONFORMANCE_BLESS=1 writes the file anew)", self.0.len())?;
        self.0.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

impl std::error::Error for Differences {}

fn line(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Pass => "pass".into(),
        // What fails is not expected with its text, which has ids in it; it is expected to be repaired.
        Outcome::Fail(_) => "fail".into(),
        Outcome::Ignored(reason) => format!("ignored: {reason}"),
    }
}

pub(crate) fn write<'a>(outcomes: impl Iterator<Item = (&'a str, &'a Outcome)>) -> String {
    outcomes.map(|(id, outcome)| format!("{id} {}\n", line(outcome))).collect()
}

pub(crate) fn check<'a>(expected: &str, outcomes: impl Iterator<Item = (&'a str, &'a Outcome)>) -> Result<(), Differences> {
    let mut expected: BTreeMap<&str, &str> = expected
        .lines()
        .map(str::trim)
        .filter(|text| !text.is_empty() && !text.starts_with('#'))
        .map(|text| text.split_once(' ').unwrap_or((text, "")))
        .collect();
    let mut differences = Vec::new();
    for (id, outcome) in outcomes {
        let found = line(outcome);
        match expected.remove(id) {
            Some(wanted) if wanted == found => {}
            Some(wanted) => differences.push(format!("{id}: expected {wanted:?}, found {found:?}")),
            None => differences.push(format!("{id}: not expected at all, found {found:?}")),
        }
    }
    differences.extend(expected.iter().map(|(id, wanted)| format!("{id}: expected {wanted:?}, not found")));
    if differences.is_empty() { Ok(()) } else { Err(Differences(differences)) }
}

pub(crate) fn check_file(directory: &Path, backend: &str, outcomes: &[(&str, Outcome)]) -> Result<(), Differences> {
    let path = directory.join(format!("{backend}.txt"));
    let outcomes = outcomes.iter().map(|(id, outcome)| (*id, outcome));
    let failed = |error: std::io::Error| Differences(vec![format!("{}: {error}", path.display())]);
    if std::env::var_os("CONFORMANCE_BLESS").is_some() {
        return std::fs::write(&path, write(outcomes)).map_err(failed);
    }
    check(&std::fs::read_to_string(&path).map_err(failed)?, outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcomes() -> [(&'static str, Outcome); 2] {
        [("A-1", Outcome::Pass), ("A-2", Outcome::Ignored("needs x".into()))]
    }

    fn against(expected: &str) -> Vec<String> {
        let outcomes = outcomes();
        let checked = check(expected, outcomes.iter().map(|(id, outcome)| (*id, outcome)));
        checked.err().map_or_else(Vec::new, |differences| differences.0)
    }

    #[test]
    fn what_is_written_is_expected() {
        let outcomes = outcomes();
        let text = write(outcomes.iter().map(|(id, outcome)| (*id, outcome)));
        assert_eq!(text, "A-1 pass\nA-2 ignored: needs x\n");
        assert!(against(&text).is_empty());
    }

    #[test]
    fn every_change_is_a_difference() {
        assert_eq!(against("A-1 ignored: y\nA-2 ignored: needs x").len(), 1, "an unexpected pass");
        assert_eq!(against("A-1 pass\nA-2 pass").len(), 1, "a new skip");
        assert_eq!(against("A-1 pass\nA-2 ignored: other").len(), 1, "another reason");
        assert_eq!(against("A-1 pass").len(), 1, "a new property");
        assert_eq!(against("# all\nA-1 pass\nA-2 ignored: needs x\nA-3 pass").len(), 1, "a lost property");
    }
}

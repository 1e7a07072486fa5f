//! What somebody may have meant.

/// The known name that takes the fewest edits to get to, of equals the first, if those are few enough for it to be meant: at most
/// every second character, and three.
pub(crate) fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = known.into_iter().map(|known| (distance(given, known), known)).min_by_key(|(edits, _)| *edits);
    near.filter(|(edits, known)| *edits <= 3 && 2 * edits <= known.chars().count()).map(|(_, known)| known)
}

/// The Levenshtein distance: how many characters must be added, removed or replaced.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, in_a) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, in_b) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(in_a != *in_b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_edits() {
        for (a, b, edits) in [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)] {
            assert_eq!(distance(a, b), edits, "{a} {b}");
        }
        assert_eq!(nearest("memroy", ["redis", "memory"]), Some("memory"));
        assert_eq!(nearest("x", []), None);
        assert_eq!((nearest("kafka", ["unix"]), nearest("foo", ["replay", "leases"])), (None, None));
    }
}

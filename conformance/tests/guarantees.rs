//! The README's table of guarantees is what `cargo xtask guarantees` writes.

use std::path::Path;

use pubsub_conformance::harnesses::guarantees;

#[test]
fn the_readme_shows_what_the_reports_say() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(here.join("../README.md")).unwrap();
    let table = guarantees(&here.join("expectations")).unwrap();
    assert!(readme.contains(&table), "run `cargo xtask guarantees`; the table is now\n{table}");
}

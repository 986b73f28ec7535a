//! docs/JOURNAL.md says what the code does: the table of events, the tests it names.

#![allow(clippy::unwrap_used)] // a failed step is a failed test

use std::{fs, path::Path};
use valkeeper_journal::{KINDS, record::Nature};

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

#[test]
fn the_documents_table_of_events_is_the_codes() {
    let document = read("../docs/JOURNAL.md");
    let begin = document.find("## Events").unwrap();
    let section = &document[begin..begin + document[begin..].find("Numbers are never").unwrap()];
    let written: Vec<&str> =
        section.lines().filter(|l| l.starts_with("| ") && !l.starts_with("| number")).collect();
    let tells = |nature| match nature {
        Nature::Writer => "writer",
        Nature::Fact => "fact",
        Nature::Decision => "decision",
    };
    let rows =
        KINDS.iter().map(|k| format!("| {} | {} | {} | {} |", k.number, k.name, k.schema, tells(k.nature)));
    assert_eq!(written, rows.collect::<Vec<_>>());
}

#[test]
fn every_test_that_the_document_names_exists() {
    let document = read("../docs/JOURNAL.md");
    let files = [
        "tests/archive.rs",
        "tests/contract.rs",
        "tests/cuts.rs",
        "tests/faults.rs",
        "tests/lineages.rs",
        "tests/records.rs",
        "tests/releases.rs",
        "tests/segments.rs",
        "tests/segments_crash.rs",
        "tests/segments_cuts.rs",
        "tests/segments_damage.rs",
        "tests/sled.rs",
        "tests/sled_streams.rs",
        "tests/storms.rs",
        "tests/tiered.rs",
        "tests/tiered_faults.rs",
        "tests/battery/damage.rs",
        "tests/battery/directory.rs",
        "tests/battery/disk.rs",
        "tests/battery/kills.rs",
        "tests/battery/large.rs",
        "tests/battery/power.rs",
        "../replay/tests/archive.rs",
        "../src/k8s/objects/tests.rs",
        "src/sled/group.rs",
        "src/sled/tests.rs",
    ];
    let tests: String = files.iter().map(|f| read(f)).collect();
    let begin = document.find("## What is promised").unwrap();
    let section = &document[begin..document.find("## Speed").unwrap()];
    let is_name =
        |w: &&str| w.matches('_').count() >= 3 && w.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    let words = section.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let named: Vec<&str> = words.filter(is_name).collect();
    assert!(named.len() > 15);
    for name in named {
        assert!(tests.contains(&format!("fn {name}")), "{name} is promised and not there");
    }
}

//! Every story of tests/golden against its transcript, whose last line is the digest of all that was recorded. `UPDATE_GOLDEN=1` writes it
//! anew: read the difference before you commit it. Each journal must verify, fold to the same state, and be decided the same again; those of
//! [`FIXTURES`] are committed, byte by byte, as examples of the format.
#![allow(missing_docs, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

use std::{fmt::Write, io::Cursor, path::Path, path::PathBuf};
use valkeeper_core::{
    event::Record,
    invariant,
    sim::{Perturbation, Sim, Story},
    state::ClusterState,
};
use valkeeper_journal::{Hash, Stored, export_line, import_lines, verify_lines};
use valkeeper_replay::{
    audit::{failover::failovers, reshard::reshards},
    diverge::diverge,
    line,
    report::{Finding, Report},
    rules::Policy,
};

/// Stories whose journals are committed: of each kind of trouble one, so that a change of the format shows in review.
const FIXTURES: [&str; 10] = [
    "all_killed_durable",
    "cluster_balance_untold",
    "cluster_reshard_source_killed",
    "durable_data_missing",
    "invalid_spec",
    "manual_failover",
    "operator_restart",
    "primary_isolated",
    "primary_killed",
    "switchover",
];

fn is_fixture(folder: &Path) -> bool {
    folder.file_name().is_some_and(|name| FIXTURES.iter().any(|fixture| name == *fixture))
}

fn stories() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(&root).expect("tests/golden").map(|e| e.expect("entry").path()).collect();
    folders.sort();
    folders
}

/// The commands of the script, each followed by what was recorded because of it, and the audit.
fn tell(folder: &Path) -> (Sim, String) {
    let script = std::fs::read_to_string(folder.join("script.txt")).expect("script.txt");
    let mut marks: Vec<(String, usize)> = Vec::new();
    let sim = Story::parse(&script)
        .run(Perturbation::None, |command, records| marks.push((command.to_owned(), records)))
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let lines = line::lines(&sim.records.clone().into());
    let start = sim.records.first().map(|r| r.time).unwrap_or_default();
    let mut text = String::new();
    for (i, (command, from)) in marks.iter().enumerate() {
        let to = marks.get(i + 1).map_or(lines.len(), |(_, next)| *next);
        writeln!(text, "> {command}").expect("a string");
        for (record, line) in sim.records[*from..to].iter().zip(&lines[*from..to]) {
            let seconds = record.time.millis_since(start) as f64 / 1_000.0;
            writeln!(text, "{seconds:>8.3}  {line}").expect("a string");
        }
    }
    let audited = failovers(&sim.records.clone().into());
    if !audited.0.is_empty() {
        write!(text, "\n> audit failover\n{}", audited.text()).expect("a string");
    }
    let audited = reshards(&sim.records.clone().into());
    if !audited.0.is_empty() {
        write!(text, "\n> audit reshard\n{}", audited.text()).expect("a string");
        assert_eq!(audited.finding(), Finding::Clean, "{}: {}", folder.display(), audited.text());
    }
    let (_, last) = seal(&sim.records);
    write!(text, "\n> journal\n{} records, the last of them {last}\n", sim.records.len()).expect("a string");
    (sim, text)
}

/// The journal as it would be exported, and the hash of its last record, which stands for all of them.
fn seal(records: &[Record]) -> (String, Hash) {
    let mut prev = Hash([0; 32]);
    let mut text = String::new();
    for record in records {
        let stored = Stored::seal(record.clone(), prev).expect("a record of a story fits");
        prev = stored.hash;
        text.push_str(export_line(&stored).trim_end());
        text.push('\n');
    }
    (text, prev)
}

#[test]
fn stories_read_as_their_transcripts_say() {
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut wrong = Vec::new();
    for folder in stories() {
        let (sim, transcript) = tell(&folder);
        let journal = is_fixture(&folder).then(|| ("journal.jsonl", seal(&sim.records).0));
        for (name, text) in [("expected.txt", transcript)].into_iter().chain(journal) {
            let path = folder.join(name);
            if update {
                std::fs::write(&path, &text).expect("tests/golden can be written");
            } else if std::fs::read_to_string(&path).unwrap_or_default() != text {
                wrong.push(path.display().to_string());
            }
        }
    }
    assert!(wrong.is_empty(), "differ (UPDATE_GOLDEN=1 writes them anew):\n{}", wrong.join("\n"));
}

#[test]
fn journals_verify_fold_and_decide_the_same_again() {
    for folder in stories() {
        let name = folder.display();
        let (sim, _) = tell(&folder);
        let text = if is_fixture(&folder) {
            std::fs::read_to_string(folder.join("journal.jsonl")).expect("journal.jsonl")
        } else {
            seal(&sim.records).0
        };
        let report = verify_lines(Cursor::new(&text));
        assert!(report.is_intact(), "{name}: {report:?}");
        let records: Vec<Record> = import_lines(Cursor::new(&text))
            .map(|s| s.unwrap_or_else(|e| panic!("{name}: {e}")).record)
            .collect();
        assert_eq!(invariant::check(&records), [], "{name}");
        assert_eq!(ClusterState::fold(&records), sim.state, "{name}: folding gives another state");
        let again = diverge(&records.into(), Policy::Today);
        assert!(again.divergences.is_empty(), "{name}: {}", again.text());
        assert!(again.turns_judged > 0, "{name}: nothing was judged");
    }
}

#[test]
fn a_mutated_policy_diverges_where_it_matters() {
    let cases = [
        ("primary_killed", Policy::PreferLowestOffset),
        ("primary_frozen", Policy::IgnoreWindow),
        ("primary_killed", Policy::NeverFailOver),
    ];
    for (story, policy) in cases {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(story);
        let (sim, _) = tell(&folder);
        let found = diverge(&sim.records.into(), policy).divergences;
        assert!(!found.is_empty(), "{story}: {} changes nothing", policy.name());
    }
}

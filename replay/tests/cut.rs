//! Streams whose beginning was cut, as the program is run: every verb against its transcript in tests/cut. `UPDATE_GOLDEN=1`
//! writes them anew: read the difference before you commit it.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

use run::{answer, code};
use std::{collections::BTreeSet, fmt::Write, path::Path};

mod run;
mod story;

/// Name of the transcript, and the command.
const COMMANDS: [(&str, &str); 19] = [
    ("log", "log"),
    ("log_newest_first", "log -r -S 20"),
    ("log_reversed_to_the_beginning", "log -r -g decided"),
    ("log_last", "log -n 2"),
    ("show_effects_of_a_decision_that_is_gone", "show 14"),
    ("show_trimmed", "show 23"),
    ("show_level_raised", "show 24"),
    ("show_gone", "show 5"),
    ("at_the_cut", "at 13"),
    ("at_a_time_before_the_first_record", "at 03:01:00.010"),
    ("at_a_record_that_is_gone", "at 12"),
    ("at_a_time_that_is_gone", "at 03:00:30"),
    ("at_the_end", "at 24"),
    ("why_a_member", "why 0-1"),
    ("why_a_member_of_which_all_is_gone", "why 0-2"),
    ("diverge", "diverge"),
    ("audit_failover", "audit failover"),
    ("verify", "verify"),
    ("verify_deep", "verify --deep"),
];

#[test]
fn every_verb_answers_about_a_stream_whose_beginning_was_cut() {
    let (folded, records) = story::cut_in_store(str::to_owned);
    let journal = story::exported(Some(&folded), &records);
    let (head, digest) = (records.last().unwrap().hash.to_string(), folded.digest().to_string());
    let short_digest = digest.get(..8).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cut");
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut wrong = Vec::new();
    for (name, command) in COMMANDS {
        let (code, out, err) = answer(&journal, &command.split(' ').collect::<Vec<_>>());
        let mut told = format!("> {command}\n{out}{err}");
        writeln!(told, "exit code {code}").unwrap();
        // They change with every version of the program, and are compared elsewhere.
        told = told.replace(&head, "(hash)").replace(short_digest, "(digest)");
        let path = folder.join(name).with_extension("txt");
        if update {
            std::fs::write(&path, &told).unwrap();
        } else if std::fs::read_to_string(&path).unwrap_or_default() != told {
            wrong.push(format!("{}:\n{told}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "differ (UPDATE_GOLDEN=1 writes them anew):\n{}", wrong.join("\n"));
    let there = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let known: BTreeSet<String> = COMMANDS.iter().map(|(name, _)| format!("{name}.txt")).collect();
    assert_eq!(there.collect::<BTreeSet<_>>(), known);
}

#[test]
fn an_export_of_a_cut_stream_is_the_same_bytes_and_is_read_back() {
    let (folded, records) = story::cut_in_store(str::to_owned);
    let journal = story::exported(Some(&folded), &records);
    assert!(valkeeper_journal::verify_lines(journal.as_bytes()).is_intact());
    let (code, again, err) = answer(&journal, &["export"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(again, journal);
    assert_eq!(answer(&again, &["verify"]).0, 0);
}

#[test]
fn what_a_cut_left_cannot_be_changed_taken_away_or_left_unnamed() {
    let (folded, records) = story::cut_in_store(str::to_owned);
    let journal = story::exported(Some(&folded), &records);
    assert_eq!(code(&journal, &["verify"]), 0);

    let edited = journal.replacen("10.0.0.2", "10.0.0.9", 1);
    assert_ne!(edited.lines().next(), journal.lines().next(), "the first line was edited");
    let (code, out, _) = answer(&edited, &["verify"]);
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("no Trimmed record names it as"), "{out}");

    // The record of the cut is fixed up, too: then it is not the record that was written.
    let other = valkeeper_journal::Folded::parse(edited.lines().next().unwrap()).unwrap();
    let fixed = edited.replace(&folded.digest().to_string(), &other.digest().to_string());
    let (code, out, _) = answer(&fixed, &["verify"]);
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("record 23 was changed"), "{out}");

    let unnamed = story::exported(Some(&folded), &records[..9]);
    let (code, out, _) = answer(&unnamed, &["verify"]);
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("fold up to record 13, and no Trimmed record names it"), "{out}");

    let dropped = story::exported(Some(&folded), &[&records[..9], &records[10..]].concat());
    let (code, out, _) = answer(&dropped, &["verify"]);
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("record 24 follows record 22"), "{out}");

    let beginning_gone = story::exported(None, &records);
    let (code, out, _) = answer(&beginning_gone, &["verify"]);
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("begins with record 14 instead of 1"), "{out}");
}

#[test]
fn a_journal_written_anew_is_intact_and_nothing_in_it_can_tell() {
    // Whoever can write everything can make a chain that holds. Only what is elsewhere, an anchor or an archive, tells.
    let (folded, records) = story::cut_in_store(|text| text.replace("10.0.0.2", "10.0.0.9"));
    let (code, out, _) = answer(&story::exported(Some(&folded), &records), &["verify", "--deep"]);
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("cut after 13 (record 23): not compared: record 13 is not here"), "{out}");
}

#[test]
fn an_old_anchor_names_what_is_gone_and_a_new_one_what_is_there() {
    let (folded, all) = story::cut(str::to_owned);
    let records = &all[13..];
    let journal = story::exported(Some(&folded), records);
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cut.anchor");
    for (anchored, expected) in [(&all[4], 0), (&all[23], 0)] {
        let head = anchored.head();
        let anchor = serde_json::json!({"seq": head.seq, "epoch": head.epoch, "hash": head.hash});
        std::fs::write(&path, anchor.to_string()).unwrap();
        let (code, out, _) = answer(&journal, &["verify", "--anchor", path.to_str().unwrap()]);
        assert_eq!(code, expected, "{out}");
    }
    let short = story::exported(Some(&folded), &records[..10]);
    let (code, out, _) = answer(&short, &["verify", "--anchor", path.to_str().unwrap()]);
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("the stream ends at 23, but record 24 was acknowledged"), "{out}");
}

//! The program as it is run: exit codes, formats, sources. Journals are told by the simulator with the real rules.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

use run::{answer, code};
use std::{
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
};
use valkeeper_core::{
    event::Record,
    sim::{Perturbation, Story},
};

mod run;
mod story;

const KILLED: &str = "
    cluster replicas=2
    run
    write 100
    write 2 lagging 0-1
    kill 0-0
    run
    expect primary 0-2
";
const FROZEN: &str = "
    cluster replicas=2 window=3s
    run
    freeze 0-0
    run
    expect decided PrimaryFenced
";

fn told(script: &str) -> Vec<Record> {
    let mut records = Story::parse(script).run(Perturbation::default(), |_, _| {}).unwrap().records;
    // The journal writes the baseline in the first writer's epoch.
    records[0].epoch = records[1].epoch;
    records
}

fn exported(records: &[Record]) -> String {
    story::exported(None, &story::sealed(records))
}

#[test]
fn every_verb_answers_about_a_failover_with_zero() {
    let journal = exported(&told(KILLED));
    for args in [
        "log",
        "log -n 3 -r",
        "log -S -1m -g decided",
        "show 1",
        "verify",
        "at 20",
        "at -1s",
        "diverge",
        "audit failover",
        "why 0-0",
        "why shard/0",
        "explain",
        "explain PrimaryGone",
        "export",
    ] {
        let args: Vec<&str> = args.split(' ').collect();
        let (code, out, err) = answer(&journal, &args);
        assert_eq!((code, err.as_str()), (0, ""), "{args:?}");
        assert!(!out.is_empty() && out.ends_with('\n'), "{args:?}");
        for format in ["json", "jsonl"] {
            if args[0] != "export" {
                let (code, out, _) = answer(&journal, &[args.as_slice(), &["-o", format]].concat());
                assert_eq!(code, 0, "{args:?}");
                let documents = serde_json::Deserializer::from_str(&out).into_iter::<serde_json::Value>();
                assert!(documents.map(Result::unwrap).count() > 0, "{args:?}");
            }
        }
    }
}

#[test]
fn an_export_is_the_same_bytes_and_verifies() {
    let journal = exported(&told(KILLED));
    let (_, again, _) = answer(&journal, &["export"]);
    assert_eq!(again, journal);
    assert_eq!(code(&again, &["verify"]), 0);
}

#[test]
fn an_edited_journal_is_a_violation_and_is_still_shown() {
    let journal = exported(&told(KILLED)).replacen("\"ordinal\":0", "\"ordinal\":1", 1);
    let edited = journal.replacen("0-1", "0-2", 1);
    let (code, out, _) = answer(&edited, &["verify"]);
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("chain       BROKEN"), "{out}");
    let cut = format!("{}\n{{\"seq\":", edited.lines().take(5).collect::<Vec<_>>().join("\n"));
    let (code, out, err) = answer(&cut, &["log"]);
    assert_eq!(code, 0);
    assert_eq!(out.lines().count(), 6);
    assert!(err.contains("the journal is damaged: line 6"), "{err}");
}

#[test]
fn a_missing_end_is_found_with_an_anchor() {
    let records = told(KILLED);
    let journal = exported(&records);
    let last: serde_json::Value = serde_json::from_str(journal.lines().last().unwrap()).unwrap();
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cli.anchor");
    let anchor =
        serde_json::json!({"seq": last["seq"], "epoch": last["epoch"], "hash": last["hash"], "crc": 1});
    std::fs::write(&path, anchor.to_string()).unwrap();
    let args = ["verify", "--anchor", path.to_str().unwrap()];
    assert_eq!(code(&journal, &args), 0);
    let short: String = journal.lines().take(records.len() - 1).map(|line| format!("{line}\n")).collect();
    assert_eq!((code(&short, &["verify"]), code(&short, &args)), (0, 3));
}

#[test]
fn todays_rules_decide_the_same_and_mutated_ones_do_not() {
    for (script, mutations) in [
        (KILLED, ["prefer-lowest-offset", "never-fail-over"].as_slice()),
        (FROZEN, ["ignore-window", "never-fail-over"].as_slice()),
    ] {
        let journal = exported(&told(script));
        let (code, out, _) = answer(&journal, &["diverge"]);
        assert_eq!(code, 0, "{out}");
        for mutation in mutations {
            let (code, out, _) = answer(&journal, &["diverge", "--mutate", mutation]);
            assert_eq!(code, 3, "{mutation}: {out}");
        }
    }
}

#[test]
fn a_hand_made_history_diverges() {
    let (code, out, _) = answer(&exported(&story::failover()), &["diverge"]);
    assert_eq!(code, 3);
    assert!(out.contains("turns would go otherwise"), "{out}");
}

#[test]
fn a_wrong_question_is_a_usage_error() {
    let journal = exported(&told(KILLED));
    for args in [
        "",
        "blame",
        "blame slot",
        "blame slot 16384",
        "blame slot 7",
        "show",
        "show x",
        "show 9999",
        "at yesterday",
        "at 2001-01-01",
        "why nobody",
        "why 7-7",
        "explain PrimaryDead",
        "log -g (",
        "log -o yaml",
        "show 1 -o csv",
        "log --cluster demo/carts",
        "diverge --mutate best",
    ] {
        let args: Vec<&str> = args.split_whitespace().collect();
        let (code, out, err) = answer(&journal, &args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}");
        assert!(!err.is_empty(), "{args:?}");
    }
}

#[test]
fn what_cannot_be_read_is_an_error() {
    assert_eq!(code("", &["log"]), 1);
    assert_eq!(code("kind: List\n", &["log"]), 1);
    let (code, _, err) = answer("", &["-j", "/does/not/exist", "log"]);
    assert_eq!(code, 1);
    assert!(err.contains("cannot read /does/not/exist: No such file"), "{err}");
}

#[test]
fn several_clusters_are_listed_until_one_is_chosen() {
    let map = |uid: &str, records: &[Record]| {
        let text = exported(records);
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        let head = serde_json::json!({
            "seq": last["seq"], "epoch": last["epoch"], "time": last["time"], "hash": last["hash"]
        });
        let first = serde_json::json!({"format": 1, "stream": uid, "head": head, "tail": 1, "segments": []});
        let data = serde_json::json!({"records.jsonl": format!("{first}\n{text}")});
        serde_json::json!({"kind": "ConfigMap", "metadata": {"name": format!("journal-{uid}-head")}, "data": data})
    };
    let items = [map("uid-1", &told(KILLED)), map("5f0c1d2e-uid", &story::failover())];
    let dump = serde_json::json!({"kind": "List", "items": items}).to_string();
    let (code, _, err) = answer(&dump, &["log"]);
    assert_eq!(code, 2);
    assert!(err.contains("  demo/orders (uid 5f0c1d2e-uid), 22 records"), "{err}");
    for cluster in ["demo/orders", "5f0c1d2e-uid"] {
        let (code, out, err) = answer(&dump, &["--cluster", cluster, "log"]);
        assert_eq!((code, err.as_str()), (0, ""));
        assert!(out.contains("demo/orders (uid 5f0c1d2e-uid)"), "{out}");
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_valkeeper-replay"));
    let mut child = command.arg("log").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    child.stdin.take().unwrap().write_all(exported(&told(KILLED)).as_bytes()).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn no_source_file_of_the_offline_crates_names_a_socket() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut folders: Vec<PathBuf> = ["core/src", "journal/src", "replay/src"].map(|f| root.join(f)).into();
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let text = std::fs::read_to_string(&path).unwrap();
                let named =
                    ["std::net", "tokio::net", "UnixStream", "TcpStream"].iter().find(|n| text.contains(**n));
                assert_eq!(named, None, "{}", path.display());
                files += 1;
            }
        }
    }
    assert!(files > 20, "looked at {files} files only");
}

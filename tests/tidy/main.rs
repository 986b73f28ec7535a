//! The house rules that no compiler knows: who may import what, what every file says of itself, what is never written
//! down. Each test is one rule; its message says what to do.

#![allow(clippy::expect_used, clippy::panic, reason = "the helpers of a test are a test")]

mod source;

use source::{Source, name, programs, read, root, rust, tree};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};
use valkeeper_core::{
    decision::{BlockReason, HoldReason, Reason, RejectReason, WaitReason},
    projection::reason::StatusReason,
};

/// Lines of a Rust file: more has more than one purpose.
const LINES_MAX: usize = 600;

/// Kinds of events ever given a number. Add to it, never take away: journals are kept for ever.
const EVENTS: &[(&str, u16)] = &[
    ("Baseline", 1),
    ("EpochStarted", 2),
    ("SpecChanged", 3),
    ("PodChanged", 4),
    ("ServerChanged", 5),
    ("RouteChanged", 6),
    ("ObjectChanged", 7),
    ("Decided", 8),
    ("EffectsEnded", 9),
    ("DecisionClosed", 10),
    ("StandingChanged", 11),
    ("AgentChanged", 12),
    ("Trimmed", 13),
    ("LevelRaised", 14),
    ("NodeChanged", 15),
    ("SlotsWeighed", 16),
];

/// Where a thread may sleep: time itself is what is wanted, or what is looked at cannot be waited for.
const SLEEPERS: &[&str] = &[
    // sled drops its file lock a moment after its last handle, and offers no way to wait for that.
    "journal/src/sled/store.rs",
    // A client writes at a pace; a fault comes at a random moment.
    "tests/e2e/support/load.rs",
    "tests/e2e/scenarios/operator_away.rs",
];

/// Valkey's own words: names of INFO fields, directives and errors.
const WIRE_WORDS: &[&str] = &[
    "master_host",
    "master_last_io_seconds_ago",
    "master_link_status",
    "master_port",
    "master_repl_offset",
    "master_replid",
    "master_replid2",
    "master_sync_in_progress",
    "slave_repl_offset",
    "masterauth",
    "masteruser",
    "slaveof",
    "NOMASTERLINK",
];
/// Files that read or write Valkey's bare words, and the test cluster with those of Linux and Kubernetes.
const WIRE_FILES: &[&str] = &[
    "agent/src/election.rs",
    "agent/src/local.rs",
    "agent/src/metrics.rs",
    "agent/tests/",
    "benches/",
    "core/src/info.rs",
    "core/src/nodes.rs",
    "core/src/sim/gossip.rs",
    "tests/cluster/",
    "tests/e2e/support/resp.rs",
    "tests/tidy/",
    "tests/valkey/",
];

#[track_caller]
fn none(rule: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{rule}\n  {}", found.join("\n  "));
}

/// Names in a section of a Cargo.toml.
fn dependencies(manifest: &str, section: &str) -> BTreeSet<String> {
    let head = format!("[{section}]");
    let lines = read(manifest).text.lines().skip_while(|l| l.trim() != head).skip(1);
    let entries = lines.take_while(|l| !l.starts_with('[')).filter(|l| !l.starts_with('#'));
    entries
        .filter_map(|l| Some(l.split(['.', ' ', '=']).next()?.to_owned()).filter(|n| !n.is_empty()))
        .collect()
}

#[test]
fn no_rust_file_is_long() {
    let long = rust().map(|s| (s.text.lines().count(), &s.path)).filter(|(n, _)| *n > LINES_MAX);
    none("split these by behaviour (600 lines at most):", long.map(|(n, p)| format!("{p}: {n}")).collect());
}

#[test]
fn every_file_says_first_what_it_is_for() {
    let silent = rust().filter(|s| !s.text.starts_with("//! "));
    none("begin these with a `//!` sentence:", silent.map(|s| s.path.clone()).collect());
}

#[test]
fn every_file_is_reached_from_a_crate() {
    let known: BTreeMap<PathBuf, &Source> = rust().map(|s| (PathBuf::from(&s.path), s)).collect();
    let mut open: Vec<PathBuf> = known.keys().filter(|p| is_crate(p)).cloned().collect();
    let mut reached: BTreeSet<PathBuf> = open.iter().cloned().collect();
    while let Some(path) = open.pop() {
        for module in known.get(&path).map(|s| modules(s)).unwrap_or_default() {
            if known.contains_key(&module) && reached.insert(module.clone()) {
                open.push(module);
            }
        }
    }
    let orphans = known.keys().filter(|p| !reached.contains(*p)).map(|p| p.display().to_string());
    none("no `mod` leads to these files:", orphans.collect());
}

fn is_crate(path: &Path) -> bool {
    let folder = path.parent().and_then(Path::file_name).and_then(|n| n.to_str()).unwrap_or("");
    let file = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
    ["lib.rs", "main.rs", "build.rs"].contains(&file) || ["tests", "benches", "bin"].contains(&folder)
}

/// Files that a file's `mod` lines may mean.
fn modules(source: &Source) -> Vec<PathBuf> {
    let path = Path::new(&source.path);
    let folder = path.parent().unwrap_or(Path::new(""));
    let owns_folder = is_crate(path) || path.ends_with("mod.rs");
    let home = if owns_folder { folder.to_owned() } else { path.with_extension("") };
    let mut found = Vec::new();
    let mut given: Option<&str> = None;
    for (line, raw) in source.code.lines().zip(source.text.lines()) {
        given = raw.trim().strip_prefix("#[path = \"").and_then(|r| r.strip_suffix("\"]")).or(given);
        let bare =
            line.trim().trim_start_matches("pub").trim_start_matches("(crate)").trim_start_matches("(super)");
        let Some(module) = bare.trim_start().strip_prefix("mod ").and_then(|m| m.strip_suffix(';')) else {
            continue;
        };
        match given.take() {
            Some(file) => found.push(folder.join(file)),
            None => found.extend([home.join(format!("{module}.rs")), home.join(module).join("mod.rs")]),
        }
    }
    found
}

#[test]
fn core_depends_on_four_crates_and_on_nothing_that_has_a_clock() {
    let allowed: BTreeSet<String> = ["chrono", "serde", "thiserror", "uuid"].map(str::to_owned).into();
    assert_eq!(dependencies("core/Cargo.toml", "dependencies"), allowed, "core/Cargo.toml");
    let chrono = read("Cargo.toml").text.lines().find(|l| l.starts_with("chrono = ")).expect("chrono");
    assert!(chrono.contains("default-features = false") && !chrono.contains("clock"), "{chrono}");
}

#[test]
fn core_awaits_nothing_and_asks_nobody() {
    let forbidden = [
        "async ",
        "await",
        "std::fs",
        "std::env",
        "std::io",
        "std::net",
        "std::process",
        "std::thread",
        "std::time",
        "SystemTime",
        "Instant",
        "Utc",
        "Local",
        "new_v4",
        "rand::",
        "kube::",
        "redis::",
        "tokio::",
        "valkeeper_journal",
        "valkeeper_replay",
        "valkeeper::",
        "HashMap",
        "HashSet",
    ];
    let core = || rust().filter(|s| s.path.starts_with("core/src/"));
    let found = forbidden.iter().flat_map(|word| core().flat_map(move |s| s.places(word)));
    none("core is a function of its arguments (hash maps have an order by chance):", found.collect());
}

#[test]
fn data_never_imports_rules_or_readers() {
    let data = [
        "ids",
        "slots",
        "spec",
        "weights",
        "observation",
        "effect",
        "decision",
        "operation",
        "event",
        "state",
    ];
    let mut found = Vec::new();
    for module in data {
        let source = read(&format!("core/src/{module}.rs"));
        let used = source.imports("crate").into_iter().chain(source.imports("super"));
        // What an agent is told and what it remembers is data, too, beside the rules about it.
        let strangers = used.filter(|u| !data.contains(u) && *u != "agent");
        found.extend(strangers.map(|u| format!("{}: {u}", source.path)));
    }
    none("the data of core knows only data:", found);
}

#[test]
fn journal_and_replay_know_neither_kubernetes_nor_sockets() {
    let ours = |crate_name: &str| -> Vec<String> {
        let all = dependencies(&format!("{crate_name}/Cargo.toml"), "dependencies");
        let foreign = ["kube", "k8s-openapi", "redis", "hyper", "reqwest", "axum", "object_store"];
        assert!(foreign.iter().all(|f| !all.contains(*f)), "{crate_name}/Cargo.toml: {all:?}");
        all.into_iter().filter(|d| d.starts_with("valkeeper")).collect()
    };
    assert_eq!(ours("journal"), ["valkeeper-core"], "journal imports core only");
    assert_eq!(
        ours("replay"),
        ["valkeeper-core", "valkeeper-journal"],
        "replay imports core and journal only"
    );
    let offline = || programs().filter(|s| s.path.starts_with("journal/") || s.path.starts_with("replay/"));
    let sockets = ["std::net", "tokio::net", "TcpStream", "UdpSocket", "UnixStream"];
    let found = sockets.iter().flat_map(|word| offline().flat_map(move |s| s.places(word)));
    none("offline tools never open a socket:", found.collect());
}

#[test]
fn the_agent_imports_core_only_and_is_imported_by_the_operator_only() {
    let ours = |manifest: &str| -> Vec<String> {
        let all = dependencies(manifest, "dependencies");
        all.into_iter().filter(|d| d.starts_with("valkeeper")).collect()
    };
    assert_eq!(ours("agent/Cargo.toml"), ["valkeeper-core"], "the agent imports core only");
    let agent = dependencies("agent/Cargo.toml", "dependencies");
    let found = ["kube", "k8s-openapi"].iter().filter(|f| agent.contains(**f));
    none("the agent knows nothing of Kubernetes:", found.map(|f| (*f).to_owned()).collect());
    assert_eq!(
        ours("Cargo.toml"),
        ["valkeeper-agent", "valkeeper-core", "valkeeper-journal"],
        "the operator"
    );
}

#[test]
fn each_foreign_crate_has_one_home() {
    // (what the code would say, where it may)
    let homes: &[(&str, &[&str])] = &[
        (
            "redis::",
            &["src/valkey/", "agent/src/local.rs", "agent/tests/", "tests/valkey/", "tests/e2e/", "benches/"],
        ),
        ("rcgen::", &["src/pki/", "agent/src/tls/tests.rs", "agent/tests/"]),
        ("tonic::", &["src/agents/", "agent/", "tests/valkey/"]),
        ("Api<", &["src/k8s/", "tests/e2e/"]),
        ("Api::", &["src/k8s/", "tests/e2e/"]),
        ("kube::Api", &["src/k8s/", "tests/e2e/"]),
        ("bincode::", &["journal/src/codec.rs"]),
        ("flate2::", &["journal/src/gzip.rs"]),
        ("object_store::", &["src/archive.rs", "src/archive/"]),
        // With the leading `::` it is the crate and not our module of that name.
        ("::sled::", &["journal/src/sled/store.rs"]),
    ];
    let mut found = Vec::new();
    for (word, allowed) in homes {
        let strangers = rust().filter(|s| !allowed.iter().any(|home| s.path.starts_with(home)));
        found.extend(strangers.flat_map(|s| s.places(word)));
    }
    none("only one place knows each of these crates:", found);
    let sled =
        |m: &str| dependencies(m, "dependencies").into_iter().chain(dependencies(m, "dev-dependencies"));
    for manifest in ["Cargo.toml", "core/Cargo.toml", "replay/Cargo.toml"] {
        assert!(sled(manifest).all(|d| d != "sled" && d != "bincode"), "{manifest} names sled or bincode");
    }
}

#[test]
fn tools_know_nothing_of_the_driver() {
    let tools = ["src/valkey/", "src/agents/", "src/k8s/", "src/objects/", "src/pki/", "src/api/"];
    let driver = [
        "reconcile",
        "run",
        "observe",
        "execute",
        "command",
        "publish",
        "cluster",
        "claim",
        "vault",
        "owned",
    ];
    let mut found = Vec::new();
    for source in rust().filter(|s| tools.iter().any(|tool| s.path.starts_with(tool))) {
        let used = source.imports("crate").into_iter().chain(source.imports("super::super"));
        found.extend(used.filter(|u| driver.contains(u)).map(|u| format!("{}: crate::{u}", source.path)));
    }
    none(
        "valkey, agents, k8s, objects, pki and api are used by the driver, never the other way round:",
        found,
    );
}

#[test]
fn every_limit_has_a_comment_that_says_why() {
    let mut found = Vec::new();
    for source in programs() {
        let lines: Vec<&str> = source.text.lines().collect();
        for (at, line) in source.code.lines().enumerate() {
            let bare = line
                .trim()
                .trim_start_matches("pub")
                .trim_start_matches("(crate)")
                .trim_start_matches("(super)");
            let Some(constant) =
                bare.trim_start().strip_prefix("const ").and_then(name).filter(|n| is_limit(n))
            else {
                continue;
            };
            let above = lines[..at].iter().rev().map(|l| l.trim()).find(|l| !l.starts_with("#["));
            if !above.is_some_and(|l| l.starts_with("//")) {
                found.push(format!("{}:{}: {constant}", source.path, at + 1));
            }
        }
    }
    none("say in a comment above why each of these is this number:", found);
}

fn is_limit(constant: &str) -> bool {
    let words =
        ["MAX", "MIN", "MS", "BYTES", "TIMEOUT", "PAUSE", "PERIOD", "WINDOW", "LIMIT", "TRIES", "ATTEMPTS"];
    constant.split('_').any(|word| words.contains(&word))
}

#[test]
fn an_event_keeps_its_number_for_ever() {
    let text = &read("core/src/event.rs").text;
    let kinds = text.split("fn kind(").nth(1).and_then(|t| t.split("\n    }\n").next()).expect("fn kind");
    let arm = |line: &str| {
        let (pattern, number) = line.trim().strip_prefix("Event::")?.split_once(" => ")?;
        Some((name(pattern)?.to_owned(), number.trim_end_matches(',').parse::<u16>().ok()?))
    };
    let mut found: Vec<(String, u16)> = kinds.lines().filter_map(arm).collect();
    found.sort_by_key(|(_, number)| *number);
    let known: Vec<(String, u16)> = EVENTS.iter().map(|(n, k)| ((*n).to_owned(), *k)).collect();
    let numbers: BTreeSet<u16> = EVENTS.iter().map(|(_, number)| *number).collect();
    assert_eq!(numbers.len(), EVENTS.len(), "a number is given once");
    assert_eq!(found, known, "add new kinds to EVENTS with the next number; never change or remove one");
}

#[test]
fn every_reason_code_is_unique_and_explained() {
    let mut all: Vec<(&str, &str)> = Vec::new();
    all.extend(Reason::ALL.iter().map(|r| (r.code(), r.explain())));
    all.extend(WaitReason::ALL.iter().map(|r| (r.code(), r.explain())));
    all.extend(BlockReason::ALL.iter().map(|r| (r.code(), r.explain())));
    all.extend(HoldReason::ALL.iter().map(|r| (r.code(), r.explain())));
    all.extend(RejectReason::ALL.iter().map(|r| (r.code(), r.explain())));
    all.extend(StatusReason::ALL.iter().map(|r| (r.code(), r.explain())));
    let codes: BTreeSet<&str> = all.iter().map(|(code, _)| *code).collect();
    assert_eq!(codes.len(), all.len(), "`explain CODE` needs one meaning per code: {all:?}");
    let mute = all.iter().filter(|(_, text)| !text.ends_with('.'));
    none("a reason's doc comment is a sentence:", mute.map(|(code, _)| (*code).to_owned()).collect());
}

#[test]
fn nothing_is_left_out_or_slept_through() {
    let sleeps = |s: &Source| !s.path.contains("benches/") && !SLEEPERS.contains(&s.path.as_str());
    let mut found: Vec<String> =
        rust().filter(|s| sleeps(s)).flat_map(|s| s.places("thread::sleep")).collect();
    for word in ["todo!", "unimplemented!", "dbg!"] {
        found.extend(rust().flat_map(|s| s.places(word)));
    }
    let ignored = rust().flat_map(|s| s.code.match_indices("#[ignore").map(|(at, _)| s.place(at)));
    found.extend(ignored);
    none("await a condition, run every test, finish every function:", found);
}

/// Stories whose journal is committed: the list is in replay/tests/golden.rs.
const FIXTURES: usize = 10;

#[test]
fn every_story_has_its_files_and_no_other() {
    let mut stories: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for source in tree() {
        let Some((story, file)) = source.path.strip_prefix("tests/golden/").and_then(|p| p.split_once('/'))
        else {
            assert!(!source.path.starts_with("tests/golden/"), "{} belongs to no story", source.path);
            continue;
        };
        stories.entry(story).or_default().insert(file);
    }
    let wanted: BTreeSet<&str> = ["expected.txt", "script.txt"].into();
    let with_journal: BTreeSet<&str> = wanted.iter().copied().chain(["journal.jsonl"]).collect();
    let wrong = stories.iter().filter(|(_, files)| **files != wanted && **files != with_journal);
    none(
        "a story is script.txt and expected.txt, a few have a journal.jsonl:",
        wrong.map(|w| format!("{w:?}")).collect(),
    );
    let journals = stories.values().filter(|files| **files == with_journal).count();
    assert_eq!(
        journals, FIXTURES,
        "journals of stories are made when they are tested; so many are examples of the format"
    );
    assert!(!stories.is_empty(), "tests/golden has no story");
}

#[test]
fn every_step_opens_with_four_sentences_and_a_story_that_is_there() {
    let mut found = Vec::new();
    for source in rust().filter(|s| s.path.starts_with("core/src/steps/") && !s.path.ends_with("/mod.rs")) {
        let head: String =
            source.text.lines().map_while(|l| l.strip_prefix("//!")).collect::<Vec<_>>().join("");
        let mut rest = head.as_str();
        for word in [" Wants: ", " Proof: ", " Refuses: ", " Story: "] {
            match rest.split_once(word) {
                Some((_, after)) => rest = after,
                None => found.push(format!("{}: no sentence{word}", source.path)),
            }
        }
        for story in rest.trim_end_matches('.').split(',').map(str::trim) {
            if !root().join("tests/golden").join(story).is_dir() {
                found.push(format!("{}: there is no story {story:?}", source.path));
            }
        }
    }
    none("a step opens with Wants, Proof, Refuses, Story, in this order:", found);
}

#[test]
fn one_word_has_one_meaning() {
    let is_bare = |word: &str| {
        let low = word.to_lowercase();
        (low.contains("master") || low.contains("slave")) && !WIRE_WORDS.contains(&word)
    };
    let mut found = Vec::new();
    for source in
        tree().iter().filter(|s| !WIRE_FILES.iter().any(|f| s.path.starts_with(f)) && !is_foreign(s))
    {
        for (at, line) in source.text.lines().enumerate() {
            let words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            found.extend(words.filter(|w| is_bare(w)).map(|w| format!("{}:{}: {w}", source.path, at + 1)));
        }
    }
    none("primary and replica, outside of what Valkey itself says:", found);
}

/// Lists of other people's names and versions.
fn is_foreign(source: &Source) -> bool {
    ["Cargo.lock", "LICENSE"].contains(&source.path.as_str()) || source.path.ends_with("go.sum")
}

#[test]
fn no_registry_and_no_key_is_written_down() {
    // Written with spaces, so that this file does not name them either.
    let hosts = [
        "index crates io",
        "static crates io",
        "proxy golang org",
        "sum golang org",
        "registry npmjs org",
        "pypi org",
        "files pythonhosted org",
        "deb debian org",
        "security debian org",
        "registry k8s io",
        "registry-1 docker io",
        "index docker io",
        "ghcr io",
        "quay io",
        "gcr io",
    ]
    .map(|host| host.replace(' ', "."));
    let key = ["-----BEGIN", "PRIVATE KEY-----"];
    let mut found = Vec::new();
    for source in tree().iter().filter(|s| !is_foreign(s)) {
        found.extend(
            hosts.iter().filter(|h| source.text.contains(*h)).map(|h| format!("{}: {h}", source.path)),
        );
        let keys =
            source.text.lines().filter(|l| l.contains(key[0]) && l.contains(key[1]) && *l != key.concat());
        found.extend(
            keys.filter(|_| !source.path.starts_with("tests/tidy/"))
                .map(|_| format!("{}: a key", source.path)),
        );
    }
    none("a machine brings its own registries and secrets:", found);
}

#[test]
fn every_relative_link_of_a_document_leads_somewhere() {
    let mut found = Vec::new();
    for source in tree().iter().filter(|s| s.path.ends_with(".md")) {
        let folder = root().join(&source.path).parent().expect("a folder").to_owned();
        let targets = source.text.split("](").skip(1).filter_map(|rest| rest.split([')', '#', ' ']).next());
        let dead = targets.filter(|t| !t.is_empty() && !t.contains("://") && !folder.join(t).exists());
        found.extend(dead.map(|t| format!("{}: {t}", source.path)));
    }
    none("dead links:", found);
}

#[test]
fn every_command_of_a_story_is_documented() {
    let script = &read("core/src/sim/script.rs").text;
    let perform =
        script.split("fn perform(").nth(1).and_then(|t| t.split("\n}\n").next()).expect("fn perform");
    let arms = perform
        .lines()
        .filter_map(|l| l.trim().strip_prefix("[\""))
        .map(|l| l.split(']').next().unwrap_or(l));
    let words = arms
        .flat_map(|arm| arm.split(',').next().unwrap_or("").split('|').map(|w| w.replace(['"', ' '], "")));
    let page = &read("docs/ARCHITECTURE.md").text;
    let missing = words.filter(|w| !page.contains(&format!("`{w}"))).collect();
    none("name these commands in docs/ARCHITECTURE.md, \"Stories\":", missing);
}

#[test]
fn every_test_of_the_operator_is_run_by_make_test() {
    let makefile = &read("Makefile").text;
    let name_of = |s: &Source| -> Option<String> {
        let below = s.path.strip_prefix("tests/")?.strip_suffix(".rs")?;
        let test = below.strip_suffix("/main").unwrap_or(below);
        (!test.contains('/')).then(|| test.to_owned())
    };
    let is_run = |t: &String| {
        let ways = [format!("--test {t}"), format!("--example {t}"), format!("tests/{t}/run")];
        ways.iter().any(|way| makefile.contains(way))
    };
    let missing = rust().filter_map(name_of).filter(|t| !is_run(t)).collect();
    none("add `--test NAME` to a stage of the Makefile for:", missing);
}

//! Archives, by themselves and joined with what is left in the store, and what only they can prove: `verify --deep`.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

use run::answer;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};
use valkeeper_core::{
    event::{Event, Record},
    ids::{Digest, Seq, WriterEpoch},
    state::ClusterState,
};
use valkeeper_journal::{
    Folded, Lineage, Stored, StreamId,
    archive::{Archive, Branch, DirectoryBlobs},
};

mod run;
mod story;

/// An empty directory of its own for a test.
fn empty(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("archive").join(name);
    if path.exists() {
        fs::remove_dir_all(&path).unwrap();
    }
    fs::create_dir_all(&path).unwrap();
    path
}

/// An archive with these pieces, one segment each.
fn archive(name: &str, pieces: &[&[Stored]]) -> PathBuf {
    let path = empty(name);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let archive = Archive::new(Arc::new(DirectoryBlobs::new(&path)));
    let first = Branch::first(StreamId("5f0c1d2e-uid".into()));
    for piece in pieces {
        let stored = runtime.block_on(archive.store(&first, piece)).unwrap();
        assert_eq!(stored.segments, 1);
    }
    path
}

fn segments(archive: &Path) -> Vec<PathBuf> {
    let folder = archive.join("5f0c1d2e-uid");
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

/// Everything, in the archive; and what the store has.
fn story_in(name: &str) -> (PathBuf, String) {
    let (folded, all) = story::cut(str::to_owned);
    let made = archive(name, &[&all[..5], &all[5..16], &all[16..]]);
    (made, story::exported(Some(&folded), &all[13..]))
}

fn joined(journal: &str, archive: &Path, command: &str) -> (i32, String, String) {
    let mut args = vec!["--archive", archive.to_str().unwrap()];
    args.extend(command.split(' '));
    answer(journal, &args)
}

fn alone(archive: &Path, command: &str) -> (i32, String, String) {
    let mut args = vec!["-j", archive.to_str().unwrap()];
    args.extend(command.split(' '));
    answer("", &args)
}

#[test]
fn an_archive_is_a_journal_by_itself() {
    let (made, _) = story_in("alone");
    let (_, all) = story::cut(str::to_owned);
    let (code, out, err) = alone(&made, "export");
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(out, story::exported(None, &all));
    let (code, out, _) = alone(&made, "verify --deep");
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("records     24 (1 to 24)\n"), "{out}");
    assert!(out.contains("deep        24 records folded again, from 1 on\n"), "{out}");
    assert!(out.contains("  cut after 13 (record 23): the same text\n"), "{out}");
}

#[test]
fn a_joined_archive_gives_back_what_left_the_store() {
    let (made, journal) = story_in("joined");
    let (_, all) = story::cut(str::to_owned);
    for archive_of in [made, archive("joined_beginning_only", &[&all[..13]])] {
        let (code, out, err) = joined(&journal, &archive_of, "export");
        assert_eq!((code, err.as_str()), (0, ""));
        assert_eq!(out, story::exported(None, &all));
        let (code, out, _) = joined(&journal, &archive_of, "at 5");
        assert_eq!(code, 0);
        assert!(out.contains("at record 5, 2026-11-21T03:00:00.010Z"), "{out}");
        let (_, out, _) = joined(&journal, &archive_of, "audit failover");
        assert!(out.starts_with("failover 13 of shard 0: 0-0 -> 0-1, FailoverComplete at 18\n"), "{out}");
        let (code, out, _) = joined(&journal, &archive_of, "verify --deep -o json");
        assert_eq!(code, 0, "{out}");
        let verified: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!((verified["archived"].as_u64(), verified["records"].as_u64()), (Some(13), Some(24)));
        assert_eq!(verified["trimmed"]["recorded"][0], 23);
        assert_eq!(verified["deep"]["cuts"][0]["compared"], "SameText");
    }
}

#[test]
fn a_missing_segment_is_named_by_what_it_held() {
    for (lost, said) in [
        (0, "the archive begins with record 6: what was before it is not known"),
        (1, "the records after 5 are missing: the next segment is 5f0c1d2e-uid/00000000000000000017-"),
    ] {
        let (made, journal) = story_in(&format!("missing_{lost}"));
        fs::remove_file(&segments(&made)[lost]).unwrap();
        let (code, out, _) = alone(&made, "verify");
        assert_eq!(code, 3, "{out}");
        assert!(out.contains(said), "{out}");
        let (code, out, _) = joined(&journal, &made, "verify");
        assert_eq!(code, 3, "{out}");
        assert!(out.contains("the archive does not hold records 1 to 13"), "{out}");
        // What is left is read all the same.
        let (code, out, err) = joined(&journal, &made, "log");
        assert_eq!((code, out.lines().count()), (0, 13), "{out}");
        assert!(err.contains("the journal is damaged: the archive"), "{err}");
    }
}

#[test]
fn an_edited_segment_is_named_whatever_its_name_says() {
    let (made, journal) = story_in("edited");
    let path = &segments(&made)[1];
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
    let (code, out, _) = joined(&journal, &made, "verify");
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("00000000000000000006-00000000000000000016-"), "{out}");
    assert!(out.contains("is damaged at record 6: its bytes give"), "{out}");

    // Another segment of the same records under a right name of its own: one record of it is not what follows.
    let (_, other) = story::cut(|text| text.replace("10.0.0.2", "10.0.0.9"));
    let mut rewritten = story::failover();
    rewritten.truncate(16);
    rewritten[7].event = story::gone(1);
    let rewritten = story::sealed(&rewritten);
    let (_, all) = story::cut(str::to_owned);
    let forged = archive("forged", &[&rewritten[5..16]]);
    let made = archive("forged_into", &[&all[..5], &all[5..16], &other[16..22]]);
    fs::remove_file(&segments(&made)[1]).unwrap();
    let name = segments(&forged).remove(0);
    fs::copy(&name, made.join("5f0c1d2e-uid").join(name.file_name().unwrap())).unwrap();
    let (code, out, _) = joined(&journal, &made, "verify");
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("is damaged at record 17: record 17 does not continue the chain"), "{out}");
    assert!(out.contains("record 14 is another one in the archive than in the store"), "{out}");
}

#[test]
fn what_is_in_both_must_be_the_same() {
    let (made, _) = story_in("both");
    let mut rewritten: Vec<_> = story::cut(str::to_owned).1.into_iter().map(|s| s.record).collect();
    let folded = story::cut(str::to_owned).0;
    rewritten[18].event = story::gone(2);
    let journal = story::exported(Some(&folded), &story::sealed(&rewritten)[13..]);
    assert_eq!(answer(&journal, &["verify"]).0, 0, "by itself it is a chain");
    let (code, out, _) = joined(&journal, &made, "verify");
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("record 19 is another one in the archive than in the store"), "{out}");
}

#[test]
fn a_store_that_lost_its_end_is_found_by_the_archive() {
    let (made, _) = story_in("end");
    let (_, all) = story::cut(str::to_owned);
    let (code, out, _) = joined(&story::exported(None, &all[..20]), &made, "verify");
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("the store ends with record 20, and the archive has records up to 24"), "{out}");
}

#[test]
fn a_hole_between_archive_and_store_is_said() {
    let (folded, all) = story::cut(str::to_owned);
    let made = archive("hole", &[&all[..10]]);
    let journal = story::exported(Some(&folded), &all[13..]);
    let (code, out, _) = joined(&journal, &made, "verify");
    assert_eq!(code, 3, "{out}");
    let said = "the archive does not hold records 1 to 13: its records are 1 to 10";
    assert!(out.contains(said), "{out}");
}

#[test]
fn an_archive_of_another_cluster_and_a_directory_that_is_none_are_refused() {
    let (_, journal) = story_in("other");
    let none = empty("none");
    let (code, _, err) = joined(&journal, &none, "verify");
    assert_eq!(code, 1);
    assert!(err.contains("it has no record of demo/orders (uid 5f0c1d2e-uid)"), "{err}");
    let (code, _, err) = alone(&none, "log");
    assert_eq!(code, 1);
    assert!(err.contains("no sled store: it has no db and conf; and no archive's segment"), "{err}");
}

#[test]
fn a_wrong_fold_is_found_although_every_hash_is_right() {
    // The state was edited, the record of the cut names it, and everything after it was sealed anew.
    let (folded, all) = story::cut(|text| text.replace("10.0.0.2", "10.0.0.9"));
    let journal = story::exported(Some(&folded), &all[13..]);
    let made = archive("wrong_fold", &[&all[..13]]);
    let (code, out, _) = joined(&journal, &made, "verify");
    assert_eq!(code, 0, "the chain says nothing of it: {out}");
    let (code, out, _) = joined(&journal, &made, "verify --deep");
    assert_eq!(code, 3, "{out}");
    let said =
        "cut after 13 (record 23): DIFFERS: what was kept differs from what the records fold to in members";
    assert!(out.contains(said), "{out}");
    // Only the state was edited: the store does not begin with what its record names, whatever the archive has.
    let (right, all) = story::cut(str::to_owned);
    let edited = Folded::parse(&right.text().replace("10.0.0.2", "10.0.0.9")).unwrap();
    let (code, out, _) = joined(&story::exported(Some(&edited), &all[13..]), &made, "verify");
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("no Trimmed record names it as"), "{out}");
    // In the archive alone there is only the digest.
    let (_, all) = story::cut(|text| text.replace("10.0.0.2", "10.0.0.9"));
    let whole = archive("wrong_fold_whole", &[&all]);
    let (code, out, _) = alone(&whole, "verify --deep");
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("DIFFERS: the records fold to "), "{out}");
}

#[test]
fn a_text_of_another_version_is_compared_as_state() {
    let version = format!("\"version\":\"{}\"", env!("CARGO_PKG_VERSION"));
    let older = |text: &str| text.replacen(&version, "\"version\":\"0.0.9\"", 1);
    let (folded, all) = story::cut(older);
    assert!(folded.text().contains("0.0.9"));
    let made = archive("version", &[&all[..13]]);
    let (code, out, _) = joined(&story::exported(Some(&folded), &all[13..]), &made, "verify --deep");
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("the same state (compared as state: the text is of version 0.0.9)"), "{out}");
    // And a wrong state is one in any version.
    let (folded, all) = story::cut(|text| older(text).replace("10.0.0.2", "10.0.0.9"));
    let (code, out, _) = joined(&story::exported(Some(&folded), &all[13..]), &made, "verify --deep");
    assert_eq!(code, 3, "{out}");
}

#[test]
fn every_later_cut_is_compared_with_the_fold_of_what_is_there() {
    // The store was cut twice, and an export made before the second cut still has the records of it.
    let (folded, mut all) = story::cut(str::to_owned);
    let state_of = |records: &[Stored]| {
        let mut state = folded.state().clone();
        records.iter().for_each(|s| state.apply(&s.record));
        state
    };
    let id = StreamId("5f0c1d2e-uid".into());
    let second = Folded::new(&id, all[19].head(), Lineage::FIRST, &state_of(&all[13..20])).unwrap();
    let (hash, digest) = (second.head().hash.to_string(), second.digest().to_string());
    let none = "0".repeat(64);
    for (hash, digest, said) in [
        (&hash, &digest, "cut after 20 (record 25): the same text"),
        (&hash, &none, "cut after 20 (record 25): DIFFERS: the records fold to "),
        (&none, &digest, "cut after 20 (record 25): DIFFERS: record 20 is "),
    ] {
        let mut records: Vec<_> = all.drain(..).map(|s| s.record).collect();
        let event = Event::Trimmed {
            through: second.head().seq,
            hash: Digest(hash.clone()),
            folded: Digest(digest.clone()),
            archive: None,
        };
        let last = records[23].clone();
        records.push(Record { seq: last.seq.next(), event, ..last });
        all = story::sealed(&records);
        let (code, out, _) = answer(&story::exported(Some(&folded), &all[13..]), &["verify", "--deep"]);
        assert_eq!(code, if said.contains("DIFFERS") { 3 } else { 0 }, "{out}");
        assert!(out.contains(said), "{out}");
        assert!(out.contains("cut after 13 (record 23): not compared"), "{out}");
        all.pop();
    }
}

/// A stream that lost its records after the first `left` and went on, as a person accepted; what it begins with after a cut.
fn after_loss(left: usize, lost_through: Option<Seq>) -> (Folded, Vec<Stored>) {
    let mut records = story::failover();
    records.truncate(left);
    if left == 1 {
        // It begins anew, above the writers that agents know.
        records[0].epoch = WriterEpoch(2);
    }
    let mut add = |event| {
        let last = records[records.len() - 1].clone();
        records.push(Record { seq: last.seq.next(), epoch: WriterEpoch(2), event, ..last });
        records.clone()
    };
    add(Event::EpochStarted { writer: "op-2".into(), version: "0.1.0".into(), lost_through });
    add(story::gone(1));
    let gone = add(story::gone(2));
    let sealed = story::sealed(&gone);
    let lineage = sealed.iter().fold(Lineage::FIRST, Lineage::after);
    let head = sealed[sealed.len() - 1].head();
    let id = StreamId("5f0c1d2e-uid".into());
    let folded = Folded::new(&id, head, lineage, &ClusterState::fold(&gone)).unwrap();
    add(Event::Trimmed {
        through: head.seq,
        hash: Digest(head.hash.to_string()),
        folded: Digest(folded.digest().to_string()),
        archive: None,
    });
    let all = add(Event::LevelRaised { level: 1, version: "0.1.0".into() });
    (folded, story::sealed(&all))
}

/// Puts records into an archive, each into the lineage that it is of.
fn add_to(archive: &Path, records: &[Stored]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let archive = Archive::new(Arc::new(DirectoryBlobs::new(archive)));
    let first = Branch::first(StreamId("5f0c1d2e-uid".into()));
    runtime.block_on(archive.store(&first, records)).unwrap();
}

#[test]
fn a_stream_that_lost_records_is_joined_with_its_own_lineage_and_the_others_are_named() {
    for left in [1, 16] {
        let (made, before) = story_in(&format!("lineages_{left}"));
        let (folded, all) = after_loss(left, Some(Seq(24)));
        let cut = left + 3;
        add_to(&made, &all[..cut]);
        let journal = story::exported(Some(&folded), &all[cut..]);
        let (code, out, err) = joined(&journal, &made, "export");
        assert_eq!((code, err.as_str()), (0, ""), "{left}");
        assert_eq!(out, story::exported(None, &all), "{left}");
        let (code, out, _) = joined(&journal, &made, "verify --deep");
        assert_eq!(code, 0, "{out}");
        assert!(out.contains("besides     the first lineage: records 1 to 24\n"), "{out}");
        let number = cut + 1;
        assert!(out.contains(&format!("  cut after {cut} (record {number}): the same text\n")), "{out}");
        // Nothing was cut yet: it is compared with its own lineage only.
        let (code, out, _) = joined(&story::exported(None, &all), &made, "verify");
        assert_eq!(code, 0, "{out}");
        // What was lost is there as before, for who has a copy of the store as it was.
        let (code, out, _) = joined(&before, &made, "verify --deep");
        assert_eq!(code, 0, "{out}");
        let name = folded.lineage().name().unwrap().to_string();
        let first = if left == 1 { 1 } else { 17 };
        assert!(out.contains(&format!("besides     lineage {name}: records {first} to {cut}\n")), "{out}");
        // By itself each lineage is a journal, and one is to be chosen.
        let (code, _, err) = alone(&made, "verify");
        assert_eq!(code, 2);
        assert!(err.contains(&format!("(uid 5f0c1d2e-uid), lineage {name}, {cut} records")), "{err}");
        let (code, out, err) = alone(&made, &format!("--cluster {} export", &name[..12]));
        assert_eq!((code, err.as_str()), (0, ""));
        assert_eq!(out, story::exported(None, &all[..cut]));
        let (code, out, _) = alone(&made, "--cluster orders verify --deep");
        assert_eq!(code, 0, "{out}");
        assert!(out.contains("records     24 (1 to 24)\n"), "{out}");
    }
}

#[test]
fn a_store_that_was_rolled_back_without_a_word_is_not_what_the_archive_has() {
    let (made, _) = story_in("rolled_back");
    let (folded, all) = after_loss(16, None);
    let (code, out, _) = joined(&story::exported(Some(&folded), &all[19..]), &made, "verify");
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("record 20 is another one in the archive than in the store"), "{out}");
}

#[test]
fn a_fold_that_says_another_lineage_than_its_records_is_found() {
    let (made, _) = story_in("wrong_lineage");
    let (folded, all) = after_loss(16, Some(Seq(24)));
    add_to(&made, &all[..19]);
    let other = Lineage::named(all[3].hash);
    let wrong = Folded::new(folded.stream(), *folded.head(), other, folded.state()).unwrap();
    let (code, out, _) = joined(&story::exported(Some(&wrong), &all[19..]), &made, "verify --deep");
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("no Trimmed record names it as"), "{out}");
    assert!(out.contains("the archive does not hold records 1 to 19: it has none of them"), "{out}");
}

/// A stream that lost records and was cut by a build that knew no lineages: the fold and the archive are of the first one.
fn cut_without_lineages(name: &str, edit: impl Fn(&str) -> String) -> (PathBuf, Folded, Vec<Stored>) {
    let (folded, all) = after_loss(16, Some(Seq(24)));
    let plain = Folded::new(folded.stream(), *folded.head(), Lineage::FIRST, folded.state()).unwrap();
    let plain = Folded::parse(&edit(plain.text())).unwrap();
    let mut records: Vec<Record> = all.into_iter().map(|stored| stored.record).collect();
    records[19].event = Event::Trimmed {
        through: plain.head().seq,
        hash: Digest(plain.head().hash.to_string()),
        folded: Digest(plain.digest().to_string()),
        archive: None,
    };
    let all = story::sealed(&records);
    let made = archive(name, &[&all[..16]]);
    add_to(&made, &all[..20]);
    let beside = made.join("5f0c1d2e-uid").join(all[16].hash.to_string());
    for entry in fs::read_dir(&beside).unwrap() {
        let file = entry.unwrap();
        fs::rename(file.path(), made.join("5f0c1d2e-uid").join(file.file_name())).unwrap();
    }
    fs::remove_dir(&beside).unwrap();
    (made, plain, all)
}

#[test]
fn a_fold_that_names_no_lineage_as_older_builds_wrote_it_is_no_alarm() {
    let (made, folded, all) = cut_without_lineages("no_lineage", str::to_owned);
    let lineage = all[16].hash;
    let said = format!(
        "cut after 19 (record 20): the same state (the text names no lineage, as older builds wrote it; \
         the records are of lineage {lineage})"
    );
    let (code, out, _) = joined(&story::exported(Some(&folded), &all[19..]), &made, "verify --deep");
    assert_eq!(code, 0, "{out}");
    assert!(out.contains(&said), "{out}");
    // Where only its digest is left: every record is there, and no text.
    let (code, out, _) = answer(&story::exported(None, &all), &["verify", "--deep"]);
    assert_eq!(code, 0, "{out}");
    assert!(out.contains(&said), "{out}");
    // A wrong state is one all the same.
    let wrong = |text: &str| text.replace("\"in_force\":\"0-1\"", "\"in_force\":\"0-2\"");
    let (made, folded, all) = cut_without_lineages("no_lineage_wrong", wrong);
    for (code, out, _) in [
        joined(&story::exported(Some(&folded), &all[19..]), &made, "verify --deep"),
        answer(&story::exported(None, &all), &["verify", "--deep"]),
    ] {
        assert_eq!(code, 3, "{out}");
        assert!(out.contains("cut after 19 (record 20): DIFFERS: "), "{out}");
    }
}

#[test]
fn damage_in_a_lineage_that_led_here_is_named() {
    let (made, _) = story_in("damaged_before");
    let (folded, all) = after_loss(16, Some(Seq(24)));
    add_to(&made, &all[..19]);
    let path = &segments(&made).into_iter().filter(|path| path.is_file()).nth(1).unwrap();
    fs::write(path, b"nothing").unwrap();
    let (code, out, _) = joined(&story::exported(Some(&folded), &all[19..]), &made, "verify");
    assert_eq!(code, 3, "{out}");
    assert!(out.contains("does not hold records 1 to 19: its records are 17 to 19"), "{out}");
    assert!(out.contains("besides     the first lineage: records 1 to 5; the archive: "), "{out}");
    assert!(out.contains("is damaged at record 6"), "{out}");
}

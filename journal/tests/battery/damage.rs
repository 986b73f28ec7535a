//! Damage on the disk, and what a person does to the files: refused with a reason or harmless, never silent.

use crate::{
    check::{check, is_all, row},
    common::{Scratch, at, baseline, big, fact, stream},
};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};
use valkeeper_core::event::Record;
use valkeeper_journal::{Backend, BackendError, Error, Journal, MayGo, Retention, Sled, StreamId};

/// Places at which a byte is changed.
const PLACES: usize = 200;

/// A bit of each kind: the lowest, the highest, and all.
const FLIPS: [u8; 3] = [0x01, 0x80, 0xff];

pub fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to.join(entry.file_name()));
        } else {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// A store with a cut stream in `dir/journal` and its anchors; what was acknowledged.
pub async fn made(dir: &Path) -> Vec<Record> {
    let backend: Arc<dyn Backend> = Arc::new(Sled::open(&dir.join("journal")).unwrap());
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await.unwrap();
    journal.retain(Retention { keep_bytes: 200_000, keep_ms: None, may_go: MayGo::Any });
    let mut acked = journal.claim(Some(baseline(&stream())), "w", "v", at(100)).await.unwrap().records;
    for number in 0..150 {
        acked.extend(journal.append(vec![fact(number), big(500)], at(101)).await.unwrap().records);
        acked.extend(journal.append(vec![big(usize::from(number) * 20)], at(102)).await.unwrap().records);
    }
    let trimmed = journal.trim(at(103)).await.unwrap().records;
    assert!(!trimmed.is_empty());
    acked.extend(trimmed);
    backend.maintain(&stream()).await.unwrap();
    for number in 0..50 {
        acked.extend(journal.append(vec![fact(number)], at(104)).await.unwrap().records);
    }
    drop((journal, backend));
    // Once more, so that there is a snapshot of it.
    drop(Sled::open(&dir.join("journal")).unwrap());
    acked
}

/// Every file of the store and its anchors, by the kind of its bytes.
fn files(dir: &Path) -> Vec<(&'static str, PathBuf)> {
    let mut found = vec![("anchor", PathBuf::from("journal.anchor/slots"))];
    for entry in fs::read_dir(dir.join("journal")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let kind = match name.as_str() {
            "db" => "db",
            "conf" => "conf",
            name if name.starts_with("snap.") => "snap",
            _ => continue,
        };
        found.push((kind, Path::new("journal").join(name)));
    }
    assert_eq!(found.len(), 4, "{found:?}");
    found
}

fn restore(good: &Path, bad: &Path) {
    copy(good, bad);
}

/// Refused as broken, or all that was acknowledged is there. What is refused of the stream alone goes on once a person accepts the loss.
async fn judged(bad: &Path, acked: &[Record]) -> Result<Verdict, String> {
    let dir = bad.join("journal");
    let backend: Arc<dyn Backend> = match Sled::open(&dir) {
        Ok(backend) => Arc::new(backend),
        Err(error) if error.is_broken() => return Ok(Verdict::Refused),
        Err(error) => return Err(format!("not opened for another reason: {error:?}")),
    };
    match Journal::open(backend.clone(), stream()).await {
        Ok((journal, _)) => {
            drop((journal, backend));
            check(&dir, acked).await.map(|()| Verdict::Harmless)
        }
        Err(error) if error.is_damage() => accepted(&dir, backend).await.map(|()| Verdict::Refused),
        Err(error) if error.is_broken() => Ok(Verdict::Refused),
        Err(error) => Err(format!("refused for another reason: {error:?}")),
    }
}

/// Accepts the loss as the operator does, writes, and opens again what was written; also of a stream that has nothing to do with it
/// and went on before.
async fn accepted(dir: &Path, backend: Arc<dyn Backend>) -> Result<(), String> {
    let neighbour = StreamId("neighbour".to_owned());
    let accept = async {
        let (mut other, _) = Journal::open(backend.clone(), neighbour.clone()).await?;
        other.claim(Some(baseline(&neighbour)), "w", "v", at(899)).await?;
        backend.accept_loss(&stream()).await?;
        if let Err(error) = Journal::open(backend.clone(), stream()).await {
            assert!(error.is_damage(), "{error:?}");
            backend.forget(&stream()).await?;
        }
        let (mut journal, _) = Journal::open(backend.clone(), stream()).await?;
        let baseline = journal.head().is_none().then(|| baseline(&stream()));
        journal.claim(baseline, "after", "v", at(900)).await?;
        journal.append(vec![fact(9)], at(901)).await?;
        Ok::<_, Error>([journal.head().copied(), other.head().copied()])
    };
    let heads = accept.await.map_err(|e| format!("not accepted: {e:?}"))?;
    drop(backend);
    let again = async {
        let backend: Arc<dyn Backend> = Arc::new(Sled::open(dir)?);
        let (journal, _) = Journal::open(backend.clone(), stream()).await?;
        let (other, _) = Journal::open(backend, neighbour).await?;
        Ok::<_, Error>([journal.head().copied(), other.head().copied()])
    };
    let found = again.await.map_err(|e| format!("accepted, but not for long: {e:?}"))?;
    if found == heads { Ok(()) } else { Err(format!("left at {heads:?}, found at {found:?}")) }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Harmless,
    Refused,
}

#[tokio::test]
async fn a_changed_byte_anywhere_is_refused_or_harmless() {
    let scratch = Scratch::new("flips");
    let (good, bad) = (scratch.path("good"), scratch.path("bad"));
    fs::create_dir(&good).unwrap();
    let acked = made(&good).await;
    let places = if is_all() { PLACES } else { PLACES / 20 };
    for (kind, name) in files(&good) {
        let whole = fs::read(good.join(&name)).unwrap();
        // The end of the data is zeros that sled never wrote: a byte there is no damage.
        let used = whole.iter().rposition(|byte| *byte != 0).map_or(1, |last| last + 1);
        let (mut rounds, mut refused, mut failures) = (0, 0, Vec::new());
        for place in 0..places {
            let position = used * place / places + place % 3;
            let flip = FLIPS[place % FLIPS.len()];
            let Some(byte) = whole.get(position) else { continue };
            restore(&good, &bad);
            let mut bytes = whole.clone();
            bytes[position] = byte ^ flip;
            fs::write(bad.join(&name), bytes).unwrap();
            rounds += 1;
            match judged(&bad, &acked).await {
                Ok(verdict) => refused += usize::from(verdict == Verdict::Refused),
                Err(why) => failures.push(format!("byte {position} ^ {flip:02x}: {why}")),
            }
        }
        row(&format!("a changed byte in {kind} ({refused} refused, the others harmless)"), rounds, &failures);
    }
}

#[tokio::test]
async fn a_file_that_was_cut_off_is_refused_or_harmless() {
    let scratch = Scratch::new("truncated");
    let (good, bad) = (scratch.path("good"), scratch.path("bad"));
    fs::create_dir(&good).unwrap();
    let acked = made(&good).await;
    let (mut rounds, mut failures) = (0, Vec::new());
    for (kind, name) in files(&good) {
        let whole = fs::read(good.join(&name)).unwrap();
        let used = whole.iter().rposition(|byte| *byte != 0).map_or(1, |last| last + 1);
        let parts = if is_all() { 40 } else { 5 };
        for length in (0..parts).map(|part| used * part / parts).chain([used - 1, whole.len() - 1]) {
            restore(&good, &bad);
            fs::write(bad.join(&name), &whole[..length]).unwrap();
            rounds += 1;
            if let Err(why) = judged(&bad, &acked).await {
                failures.push(format!("{kind} cut to {length}: {why}"));
            }
        }
    }
    row("a file cut off", rounds, &failures);
}

type Pairs = Vec<(Vec<u8>, Vec<u8>)>;
type Change<'a> = &'a dyn Fn(&mut Pairs);

/// Rewrites the stream's tree with sled itself, as a person with a tool could.
fn rewrite(bad: &Path, change: impl Fn(&mut Pairs)) {
    let db = sled::Config::new().path(bad.join("journal")).flush_every_ms(None).open().unwrap();
    let tree = db.open_tree(format!("stream/{}", stream())).unwrap();
    let mut pairs: Pairs =
        tree.iter().map(|pair| pair.unwrap()).map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
    change(&mut pairs);
    tree.clear().unwrap();
    for (key, value) in pairs {
        tree.insert(key, value).unwrap();
    }
    db.flush().unwrap();
}

#[tokio::test]
async fn records_that_are_doubled_swapped_changed_or_gone_are_refused() {
    let scratch = Scratch::new("rewritten");
    let (good, bad) = (scratch.path("good"), scratch.path("bad"));
    fs::create_dir(&good).unwrap();
    let acked = made(&good).await;
    let (mut rounds, mut failures) = (0, Vec::new());
    let middle = |pairs: &Pairs| pairs.len() / 2;
    let changes: [(&str, Change); 9] = [
        ("nothing", &|_| {}),
        ("two swapped", &|pairs| {
            let at = middle(pairs);
            let (left, right) = pairs.split_at_mut(at + 1);
            std::mem::swap(&mut left[at].1, &mut right[0].1);
        }),
        ("one doubled", &|pairs| {
            let at = middle(pairs);
            pairs[at + 1].1 = pairs[at].1.clone();
        }),
        ("one gone", &|pairs| drop(pairs.remove(pairs.len() / 2))),
        ("the last gone", &|pairs| drop(pairs.pop())),
        ("the first gone", &|pairs| {
            let at = pairs.iter().position(|(key, _)| key[..8] != [0; 8]).unwrap();
            pairs.remove(at);
        }),
        ("the fold gone", &|pairs| pairs.retain(|(key, _)| key[..8] != [0; 8])),
        ("the fold changed", &|pairs| pairs[0].1[40] ^= 1),
        ("a byte of a record changed", &|pairs| {
            let at = middle(pairs);
            let last = pairs[at].1.len() - 40;
            pairs[at].1[last] ^= 1;
        }),
    ];
    for (name, change) in changes {
        restore(&good, &bad);
        rewrite(&bad, change);
        rounds += 1;
        let expected = if name == "nothing" { Verdict::Harmless } else { Verdict::Refused };
        match judged(&bad, &acked).await {
            Ok(verdict) if verdict == expected => {}
            other => failures.push(format!("{name}: {other:?}")),
        }
    }
    row("records doubled, swapped, changed or taken away with sled itself", rounds, &failures);
}

#[tokio::test]
async fn yesterdays_store_is_refused_by_the_anchor() {
    let scratch = Scratch::new("yesterday");
    let (today, old) = (scratch.path("today"), scratch.path("old"));
    fs::create_dir(&today).unwrap();
    let acked = made(&today).await;
    copy(&today, &old);
    check(&today.join("journal"), &acked).await.unwrap();
    copy(&old.join("journal"), &today.join("journal"));
    let mut failures = Vec::new();
    // However often it is opened: being asked heals nothing.
    for _ in 0..2 {
        let backend: Arc<dyn Backend> = Arc::new(Sled::open(&today.join("journal")).unwrap());
        let answers = [backend.head(&stream()).await.map(drop), backend.read(&stream()).await.map(drop)];
        for answer in answers {
            if !matches!(answer, Err(BackendError::BehindAnchor { .. })) {
                failures.push(format!("{answer:?}"));
            }
        }
        if let Ok((journal, _)) = Journal::open(backend, stream()).await {
            failures.push(format!("opened at {:?}", journal.head()));
        }
    }
    // With its own anchors it is yesterday's journal, and whole.
    copy(&old.join("journal"), &today.join("journal"));
    copy(&old.join("journal.anchor"), &today.join("journal.anchor"));
    failures.extend(check(&today.join("journal"), &acked).await.err());
    row("yesterday's directory restored: refused by the anchor", 2, &failures);
}

#[tokio::test]
async fn one_byte_more_than_a_record_may_have_is_refused_and_nothing_is_written() {
    let scratch = Scratch::new("limit");
    let dir = scratch.path("journal");
    let backend: Arc<dyn Backend> = Arc::new(Sled::open(&dir).unwrap());
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await.unwrap();
    let mut acked = journal.claim(Some(baseline(&stream())), "w", "v", at(100)).await.unwrap().records;
    let fits = |bytes: usize| {
        let probe = Record { seq: acked[0].seq, epoch: acked[0].epoch, time: at(1), event: big(bytes) };
        valkeeper_journal::Stored::seal(probe, valkeeper_journal::Hash::ZERO).is_ok()
    };
    let largest = (0..70_000).rev().find(|bytes| fits(*bytes)).unwrap();
    let refused = journal.append(vec![big(largest + 1)], at(101)).await;
    assert!(matches!(refused, Err(Error::Record(_))), "{refused:?}");
    acked.extend(journal.append(vec![big(largest)], at(102)).await.unwrap().records);
    drop((journal, backend));
    let failures: Vec<String> = check(&dir, &acked).await.err().into_iter().collect();
    row("a record one byte over the limit: refused, the next one goes", 1, &failures);
}

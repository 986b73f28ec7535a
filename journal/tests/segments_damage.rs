//! Streams kept as named objects (ConfigMaps), damaged in every place and in every way: refused with the place, or harmless. Never
//! silent, never a panic.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use common::{at, baseline, big, fact, stream, whole};
use std::{collections::BTreeMap, error::Error as _, sync::Arc};
use valkeeper_core::state::ClusterState;
use valkeeper_journal::{
    Error, Journal, Object, Retention, Segments, Whole,
    retention::MayGo,
    segments::{Body, MemoryObjects, TEXT_BYTES_MAX},
    verify,
};

type All = BTreeMap<String, Object>;

/// Places of flips, spread over each object.
const PLACES: usize = 40;

fn all(objects: &MemoryObjects) -> All {
    let mut all = All::new();
    objects.edit(|kept| all = kept.clone());
    all
}

fn store(all: &All) -> Arc<MemoryObjects> {
    let objects = Arc::new(MemoryObjects::new());
    objects.edit(|kept| *kept = all.clone());
    objects
}

fn text(object: &Object) -> String {
    object.body.text(TEXT_BYTES_MAX).unwrap().into_owned()
}

fn is_head(name: &str) -> bool {
    name.ends_with("-head")
}

/// A stream with everything: a cut beginning that is packed, a merged segment, small segments, a tail. Also every head that it had.
async fn rich() -> (All, Vec<Object>) {
    let objects = Arc::new(MemoryObjects::new());
    let backend = Arc::new(Segments::new(objects.clone()));
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await.unwrap();
    journal.retain(Retention { keep_bytes: 12_000, keep_ms: None, may_go: MayGo::Any });
    journal.claim(Some(baseline(&stream())), "valkeeper-0", "0.1.0", at(100)).await.unwrap();
    let mut heads: Vec<Object> = Vec::new();
    for number in 0..90_u16 {
        // Sixty members, so that what they fold to is worth packing.
        let events = vec![fact(number % 60), big(if number % 2 == 0 { 16_000 } else { 10 })];
        journal.append(events, at(101 + i64::from(number))).await.unwrap();
        if number == 70 {
            assert_eq!(journal.trim(at(300)).await.unwrap().records.len(), 1);
        }
        if number == 84 || number == 70 {
            journal.maintain().await.unwrap();
        }
        heads.extend(all(&objects).into_iter().filter(|(name, _)| is_head(name)).map(|(_, head)| head));
    }
    // The rest of what was cut: not everything goes in one quiet moment.
    for _ in 0..3 {
        journal.maintain().await.unwrap();
    }
    let all = all(&objects);
    let packed = |part: &str| {
        all.iter().filter(|(name, o)| name.contains(part) && matches!(o.body, Body::Packed(_))).count()
    };
    assert_eq!((packed("-folded-"), packed("-segment-") > 2), (1, true), "{:?}", all.keys());
    assert!(
        all.len() < 20 && heads.last() == all.iter().find(|(name, _)| is_head(name)).map(|(_, head)| head)
    );
    (all, heads)
}

fn words(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// What the stream is to a process that has just started.
async fn read(all: &All) -> Result<(Whole, ClusterState), Error> {
    let backend = Arc::new(Segments::new(store(all)));
    let (_, state) = Journal::open(backend.clone(), stream()).await?;
    Ok((whole(&*backend).await, state))
}

#[derive(Default)]
struct Tally {
    refused: usize,
    harmless: usize,
    /// What was harmless last.
    last: String,
}

impl Tally {
    /// Refused with the place, or the same as before.
    fn add(
        &mut self,
        name: &str,
        found: Result<(Whole, ClusterState), Error>,
        wanted: &(Whole, ClusterState),
    ) {
        match found {
            Ok(found) => {
                assert!(found == *wanted, "{name}: damaged, and nobody says so");
                self.harmless += 1;
                self.last = name.to_owned();
            }
            Err(error) => {
                let said = words(&error);
                assert!(error.is_broken() || error.is_newer(), "{name}: {said}");
                assert!(["record ", "object "].iter().any(|place| said.contains(place)), "{name}: {said}");
                self.refused += 1;
            }
        }
    }
}

/// The body with one bit flipped; in text, one that leaves it text.
fn flipped(body: &Body, place: usize) -> Body {
    match body {
        Body::Text(text) => {
            let mut bytes = text.clone().into_bytes();
            bytes[place] ^= 1 << (place % 3);
            Body::Text(String::from_utf8(bytes).unwrap())
        }
        Body::Packed(bytes) => {
            let mut bytes = bytes.clone();
            bytes[place] ^= 1 << (place % 8);
            Body::Packed(bytes)
        }
    }
}

fn cut(body: &Body, end: usize) -> Body {
    match body {
        Body::Text(text) => Body::Text(text[..end].to_owned()),
        Body::Packed(bytes) => Body::Packed(bytes[..end].to_owned()),
    }
}

/// Places all over a body, the first line of a head more densely.
fn places(body: &Body) -> Vec<usize> {
    let bytes = body.stored_bytes();
    let first_line = match body {
        Body::Text(text) => text.find('\n').unwrap_or(0),
        Body::Packed(_) => 20,
    };
    let step = bytes.div_ceil(PLACES).max(1);
    (0..first_line).step_by(3).chain((0..bytes).step_by(step)).collect()
}

#[tokio::test]
async fn a_flip_of_a_bit_anywhere_is_refused_with_its_place_or_harmless() {
    let (before, _) = rich().await;
    let wanted = read(&before).await.unwrap();
    for (name, object) in &before {
        let mut tally = Tally::default();
        for place in places(&object.body) {
            let mut damaged = before.clone();
            damaged.get_mut(name).unwrap().body = flipped(&object.body, place);
            tally.add(&format!("bit of byte {place} of {name}"), read(&damaged).await, &wanted);
        }
        let Tally { refused, harmless, last } = tally;
        // What does not matter: the few bytes of gzip's header that name the system and the time, the case of a hash.
        assert!(
            refused > 30 && harmless < 10,
            "{name}: {refused} refused, {harmless} harmless such as {last}"
        );
        eprintln!("{}: {refused} flips refused, {harmless} harmless", &name[45..]);
    }
}

#[tokio::test]
async fn a_flip_under_a_running_writer_is_refused_before_it_writes_again() {
    let (before, _) = rich().await;
    let (name, head) = before.iter().find(|(name, _)| is_head(name)).unwrap();
    let mut runs = 0;
    for place in places(&head.body) {
        let objects = store(&before);
        let (mut journal, _) =
            Journal::open(Arc::new(Segments::new(objects.clone())), stream()).await.unwrap();
        journal.claim(None, "valkeeper-1", "0.1.0", at(500)).await.unwrap();
        let (damaged, same) = (all(&objects), flipped(&all(&objects)[name].body, place));
        objects.edit(|all| {
            let version = format!("{}-edited", damaged[name].version);
            all.insert(name.clone(), Object { body: same, version });
        });
        let damaged = all(&objects);
        let refused = journal.append(vec![fact(1)], at(501)).await.unwrap_err();
        assert!(refused.is_broken(), "byte {place}: {refused:?}");
        assert_eq!(all(&objects), damaged, "byte {place}: written onto damage");
        runs += 1;
    }
    eprintln!("{runs} flips under a writer refused");
}

#[tokio::test]
async fn what_is_cut_doubled_swapped_renamed_or_deleted_is_refused_with_its_place() {
    let (before, _) = rich().await;
    let wanted = read(&before).await.unwrap();
    let mut tally = Tally::default();
    for (name, object) in &before {
        let bytes = object.body.stored_bytes();
        for end in (0..8).map(|part| bytes * part / 8).chain([bytes - 1]) {
            let mut damaged = before.clone();
            damaged.get_mut(name).unwrap().body = cut(&object.body, end);
            tally.add(&format!("{name} cut at {end}"), read(&damaged).await, &wanted);
        }
        let mut damaged = before.clone();
        let doubled = text(object) + &text(object);
        let doubled = if is_head(name) { Body::Text(doubled) } else { Body::pack(&doubled) };
        damaged.get_mut(name).unwrap().body = doubled;
        tally.add(&format!("{name} doubled"), read(&damaged).await, &wanted);
        let mut damaged = before.clone();
        let moved = damaged.remove(name).unwrap();
        tally.add(&format!("{name} deleted"), read(&damaged).await, &wanted);
        let other = if is_head(name) { format!("{name}-old") } else { name.replace("-00000", "-00001") };
        damaged.insert(other, moved);
        tally.add(&format!("{name} renamed"), read(&damaged).await, &wanted);
        for (other, stranger) in before.iter().filter(|(other, _)| *other != name) {
            let mut damaged = before.clone();
            damaged.get_mut(name).unwrap().body = stranger.body.clone();
            tally.add(&format!("{name} holds what {other} does"), read(&damaged).await, &wanted);
            damaged.get_mut(other).unwrap().body = object.body.clone();
            tally.add(&format!("{name} and {other} swapped"), read(&damaged).await, &wanted);
        }
    }
    let Tally { refused, harmless, last } = tally;
    // A head without its last newline has every record; a writer refuses it.
    assert!(harmless == 1 && last.contains("-head cut at"), "{harmless} such as {last}");
    eprintln!("{refused} refused");
}

#[tokio::test]
async fn an_unpacked_object_and_a_bomb_are_refused() {
    let (before, _) = rich().await;
    let wanted = read(&before).await.unwrap();
    let mut tally = Tally::default();
    for (name, object) in before.iter().filter(|(name, _)| !is_head(name)) {
        for body in [Body::Text(text(object)), Body::pack(&" ".repeat(50_000_000))] {
            let mut damaged = before.clone();
            damaged.get_mut(name).unwrap().body = body;
            tally.add(name, read(&damaged).await, &wanted);
        }
    }
    assert_eq!(tally.harmless, 0);
}

#[tokio::test]
async fn a_head_put_back_from_an_earlier_copy_is_refused_if_anything_was_sealed_since() {
    let (before, heads) = rich().await;
    let name = before.keys().find(|name| is_head(name)).unwrap();
    let wanted = read(&before).await.unwrap();
    let (mut refused, mut unseen) = (0, 0);
    for (index, head) in heads.iter().enumerate().rev().skip(1) {
        let mut damaged = before.clone();
        damaged.get_mut(name).unwrap().body = head.body.clone();
        match read(&damaged).await {
            Err(error) => {
                assert!(error.is_broken() && words(&error).contains("object "), "{index}: {}", words(&error));
                refused += 1;
            }
            // Nothing was made since: only who wrote the later records can tell, and does, in the same process. See below.
            Ok((found, _)) => {
                assert!(refused == 0, "{index}");
                assert!(wanted.0.records.starts_with(&found.records));
                unseen += 1;
            }
        }
    }
    assert!(refused > 80 && unseen <= 2, "{refused} refused, {unseen} not seen");
}

#[tokio::test]
async fn a_head_put_back_under_a_running_writer_is_refused_always() {
    let (before, heads) = rich().await;
    let name = before.keys().find(|name| is_head(name)).unwrap();
    for head in heads.iter().rev().skip(1).step_by(5) {
        let objects = store(&before);
        let (mut journal, _) =
            Journal::open(Arc::new(Segments::new(objects.clone())), stream()).await.unwrap();
        journal.claim(None, "valkeeper-1", "0.1.0", at(500)).await.unwrap();
        objects.edit(|all| {
            let version = format!("{}-restored", all[name].version);
            all.insert(name.clone(), Object { body: head.body.clone(), version });
        });
        let damaged = all(&objects);
        assert!(journal.append(vec![fact(1)], at(501)).await.unwrap_err().is_broken());
        assert_eq!(all(&objects), damaged);
    }
}

#[tokio::test]
async fn labels_stop_nobody() {
    let (before, _) = rich().await;
    let wanted = read(&before).await.unwrap();
    let objects = store(&before);
    let label = |all: &mut All| all.values_mut().for_each(|object| object.version.push_str("-labelled"));
    objects.edit(label);
    assert!(read(&all(&objects)).await.unwrap() == wanted);
    let backend = Arc::new(Segments::new(objects.clone()));
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await.unwrap();
    journal.retain(Retention { keep_bytes: 12_000, keep_ms: None, may_go: MayGo::Any });
    journal.claim(None, "valkeeper-1", "0.1.0", at(500)).await.unwrap();
    for number in 0..20 {
        objects.edit(label);
        journal.append(vec![fact(number), big(9_000)], at(501)).await.unwrap();
        objects.edit(label);
        journal.maintain().await.unwrap();
        objects.edit(label);
        journal.trim(at(502)).await.unwrap();
    }
    let Whole { folded, records } = whole(&*backend).await;
    assert_eq!(verify(folded.as_ref(), &records).problems, []);
}

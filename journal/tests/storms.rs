//! Storms of faults with several writers, from a seed that is printed: whatever happens, the stream stays intact, what
//! was acknowledged is in it once, and what was refused for certain is not.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use common::{Dice, all, at, baseline, big, fact, stream};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use valkeeper_core::event::{Event, Record};
use valkeeper_journal::{
    Appended, Backend, Error, Journal, Memory, Segments,
    memory::Fault,
    segments::{MemoryObjects, memory_objects::ObjectsFault},
    verify,
};

/// A few seconds; 2000 were run once.
const SEEDS: u64 = 60;
const STEPS: usize = 120;

trait World {
    /// The backend as a process that just started sees it.
    fn backend(&self) -> Arc<dyn Backend>;
    fn inject(&self, dice: &mut Dice);
    fn deliver_late(&self);
    fn calm(&self);
}

struct InMemory(Arc<Memory>);

impl World for InMemory {
    fn backend(&self) -> Arc<dyn Backend> {
        self.0.clone()
    }

    fn inject(&self, dice: &mut Dice) {
        self.0.inject(dice.pick(&[
            Fault::AmbiguousNotCommitted,
            Fault::AmbiguousCommitted,
            Fault::AmbiguousLate,
            Fault::AmbiguousLate,
            Fault::Conflict,
            Fault::Unavailable,
            Fault::HeadUnavailable,
        ]));
    }

    fn deliver_late(&self) {
        self.0.deliver_late();
    }

    fn calm(&self) {
        self.0.clear_faults();
    }
}

struct InObjects(Arc<MemoryObjects>);

impl World for InObjects {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(Segments::new(self.0.clone()))
    }

    fn inject(&self, dice: &mut Dice) {
        self.0.inject(dice.pick(&[
            ObjectsFault::TimeoutBeforeCommit,
            ObjectsFault::TimeoutAfterCommit,
            ObjectsFault::TimeoutLateCommit,
            ObjectsFault::TimeoutLateCommit,
            ObjectsFault::MetadataTouched,
            ObjectsFault::Unavailable,
        ]));
    }

    fn deliver_late(&self) {
        self.0.deliver_late();
    }

    fn calm(&self) {
        self.0.clear_faults();
    }
}

#[derive(Default)]
struct Seen {
    /// Facts whose append was acknowledged, by the sequence that was answered.
    acked: BTreeMap<u16, u64>,
    /// Facts that were refused for certain.
    refused: BTreeSet<u16>,
    next: u16,
}

impl Seen {
    fn ack(&mut self, appended: &Appended) {
        for Record { seq, event, .. } in &appended.records {
            if let Event::PodChanged { member, .. } = event {
                let before = self.acked.insert(member.ordinal, seq.0);
                assert_eq!(before, None, "fact {} was handed out twice", member.ordinal);
            }
        }
    }
}

/// Each has a name of its own, as pods do: two claims of one name at one time are the same bytes, and both would hold.
async fn writer(backend: Arc<dyn Backend>, number: usize) -> Option<Journal> {
    let (mut journal, _) = Journal::open(backend, stream()).await.ok()?;
    match journal.claim(Some(baseline(&stream())), &format!("w-{number}"), "v", at(1)).await {
        // In doubt it may go on: the next call settles it.
        Ok(_) | Err(Error::Unresolved(_)) => Some(journal),
        Err(_) => None,
    }
}

async fn append(journal: &mut Journal, seen: &mut Seen, dice: &mut Dice) {
    let number = seen.next;
    seen.next += 1;
    let mut events = vec![fact(number)];
    if dice.roll(4) == 0 {
        events.push(big(dice.roll(12_000) as usize));
    }
    match journal.append(events, at(2)).await {
        Ok(appended) => seen.ack(&appended),
        Err(Error::Settled(appended)) => {
            seen.ack(&appended);
            seen.refused.insert(number);
        }
        Err(Error::Unavailable(_) | Error::NotClaimed) => {
            seen.refused.insert(number);
        }
        Err(Error::Unresolved(_) | Error::Fenced { .. }) => {}
        // The writer before may append while a claim is under way. After it, nobody else writes with this epoch.
        Err(Error::HeadMoved { .. }) if journal.epoch().is_none() => {}
        Err(other) => panic!("{other:?}"),
    }
}

async fn storm(seed: u64, world: &dyn World) {
    let mut dice = Dice::of(seed);
    let mut seen = Seen::default();
    let mut writers: Vec<Journal> = Vec::new();
    for step in 0..STEPS {
        match dice.roll(10) {
            // In bursts: most of what can go wrong takes several faults in a row.
            0 | 1 => (0..=dice.roll(4)).for_each(|_| world.inject(&mut dice)),
            2 => world.deliver_late(),
            3 if writers.len() < 3 => writers.extend(writer(world.backend(), step).await),
            // A crash: what the writer knew is gone.
            4 if dice.roll(4) == 0 && !writers.is_empty() => {
                writers.remove(0);
            }
            5 => {
                if let Some(journal) = writers.last_mut() {
                    let _ = journal.maintain().await;
                }
            }
            _ => {
                let last = writers.len().saturating_sub(1) as u64;
                // Mostly the last to claim; sometimes one that was deposed and does not know.
                let index = if dice.roll(4) == 0 { dice.roll(last + 1) } else { last };
                if let Some(journal) = writers.get_mut(index as usize) {
                    append(journal, &mut seen, &mut dice).await;
                }
            }
        }
    }
    world.deliver_late();
    world.calm();
    for journal in &mut writers {
        if let Ok(Some(settled)) = journal.resolve().await {
            seen.ack(&settled);
        }
    }
    check(seed, &*world.backend(), &seen).await;
}

async fn check(seed: u64, backend: &dyn Backend, seen: &Seen) {
    let stored = all(backend).await;
    assert_eq!(verify(None, &stored).problems, [], "seed {seed}");
    let mut places: BTreeMap<u16, u64> = BTreeMap::new();
    for stored in &stored {
        if let Event::PodChanged { member, .. } = &stored.record.event {
            let before = places.insert(member.ordinal, stored.record.seq.0);
            assert_eq!(before, None, "seed {seed}: fact {} was written twice", member.ordinal);
        }
    }
    for (number, seq) in &seen.acked {
        assert_eq!(
            places.get(number),
            Some(seq),
            "seed {seed}: fact {number} was acknowledged and is not there"
        );
    }
    for number in &seen.refused {
        assert_eq!(places.get(number), None, "seed {seed}: fact {number} was refused and is there");
    }
}

#[tokio::test]
async fn storms_over_memory_keep_every_promise() {
    for seed in 0..SEEDS {
        storm(seed, &InMemory(Arc::new(Memory::new()))).await;
    }
}

#[tokio::test]
async fn storms_over_objects_keep_every_promise() {
    for seed in 0..SEEDS {
        storm(seed, &InObjects(Arc::new(MemoryObjects::new()))).await;
    }
}

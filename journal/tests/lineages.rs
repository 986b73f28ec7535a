//! After a loss that a person accepted, the archive goes on beside what it has; after one that nobody accepted it refuses.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use async_trait::async_trait;
use common::{Dice, at, baseline, big, fact, stream};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};
use valkeeper_core::ids::{Seq, WriterEpoch};
use valkeeper_journal::{
    AppendError, Backend, BackendError, Carried, Claim, Error, Folded, Hash, Head, Journal, Lineage, MayGo,
    Memory, Page, Reader, Retention, Stored, StreamId, Whole,
    archive::{Archive, ArchiveError, BlobsFault, Branch, MemoryBlobs},
    carry, encode, read_all, verify_chain,
};

/// What is kept of a stream here, in bytes: some fifty records, so that a cut leaves several pages.
const KEEP_BYTES: usize = 24_000;

/// Failures in a row after which a carry is stuck. The longest here takes some twenty calls.
const CALLS_MAX: usize = 100;

/// Histories from seeds: some seconds, as every step reads the whole archive and hashes it.
const SEEDS: u64 = 8;

/// Things that happen in one history.
const STEPS: usize = 30;

fn retention(through: Seq) -> Retention {
    let may_go = MayGo::Archived { through, place: "memory".to_owned() };
    Retention { keep_bytes: KEEP_BYTES, keep_ms: None, may_go }
}

/// A stream and the archive that it is carried to.
struct Life {
    store: Arc<Memory>,
    blobs: Arc<MemoryBlobs>,
    archive: Archive,
    journal: Journal,
    claims: u64,
    clock: i64,
}

impl Life {
    async fn begin() -> Life {
        let blobs = Arc::new(MemoryBlobs::new());
        let archive = Archive::with_limit(blobs.clone(), 8_000);
        let store = Arc::new(Memory::new());
        let (journal, _) = Journal::open(store.clone(), stream()).await.unwrap();
        let mut life = Life { store, blobs, archive, journal, claims: 0, clock: 0 };
        life.claim(None).await;
        life
    }

    /// The operator begins, as agents make it: above every writer that they know.
    async fn claim(&mut self, lost_through: Option<Seq>) {
        self.claims += 1;
        self.clock += 1;
        let writer = format!("op-{}", self.claims);
        let genesis = self.journal.head().is_none().then(|| baseline(&stream()));
        let above = WriterEpoch(self.claims);
        let claim = Claim { genesis, writer: &writer, version: "v", above, lost_through };
        self.journal.claim_as(claim, at(self.clock)).await.unwrap();
        self.journal.retain(retention(Seq(0)));
    }

    async fn write(&mut self, batches: u16) {
        for number in 0..batches {
            self.clock += 1;
            self.journal.append(vec![big(900), fact(number)], at(self.clock)).await.unwrap();
        }
    }

    async fn carry(&self) -> Result<Option<Carried>, Error> {
        carry(&*self.store, &stream(), &retention(Seq(0)), &self.archive, at(self.clock)).await
    }

    /// Carries, and cuts; true if something went.
    async fn tend(&mut self) -> bool {
        let Some(Carried { through, segments: _ }) = self.carry().await.unwrap() else { return false };
        self.journal.retain(retention(through));
        self.clock += 1;
        !self.journal.trim(at(self.clock)).await.unwrap().records.is_empty()
    }

    /// The store is another one now.
    async fn meet(&mut self, store: Memory) {
        self.store = Arc::new(store);
        (self.journal, _) = Journal::open(self.store.clone(), stream()).await.unwrap();
    }

    /// ... and a person said that what is missing is lost. Gives the lineage of what comes now.
    async fn lose(&mut self, left: Memory) -> Lineage {
        let lost = self.head();
        self.meet(left).await;
        self.claim(Some(lost)).await;
        Lineage::named(self.journal.head().unwrap().hash)
    }

    fn head(&self) -> Seq {
        self.journal.head().unwrap().seq
    }

    async fn whole(&self) -> Whole {
        read_all(&*self.store, &stream()).await.unwrap()
    }

    async fn archived(&self, branch: &Branch) -> Vec<Stored> {
        let mut pages = self.archive.read(branch).await.unwrap();
        let mut all = Vec::new();
        while let Some(page) = pages.next().await.unwrap() {
            all.extend(page);
        }
        all
    }

    /// What the store has, and before it what the archive has of what led there, is one chain from record 1 on.
    async fn check(&self, context: &str) {
        let Whole { folded: _, mut records } = self.whole().await;
        let branches = self.archive.branches().await.unwrap();
        let mut archived = Vec::new();
        for branch in &branches {
            archived.push(self.archived(branch).await);
        }
        for _ in 0..=branches.len() {
            let prev = records[0].prev;
            let place = |branch: &Vec<Stored>| branch.iter().position(|stored| stored.hash == prev);
            let Some((end, branch)) = archived.iter().find_map(|b| Some((place(b)?, b))) else { break };
            records.splice(0..0, branch[..=end].iter().cloned());
        }
        let head = verify_chain(None, &records).unwrap_or_else(|e| panic!("{context}: {e}"));
        assert_eq!(head.as_ref(), self.journal.head(), "{context}");
    }

    async fn assert_lineages(&self, lineages: &[Lineage]) {
        let branch = |lineage: &Lineage| Branch { stream: stream(), lineage: *lineage };
        let expected: BTreeSet<Branch> = lineages.iter().map(branch).collect();
        let found = self.archive.branches().await.unwrap();
        assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
    }

    fn blobs(&self) -> BTreeMap<String, Vec<u8>> {
        self.blobs.edit(|all| all.clone())
    }

    /// What was there is there, byte for byte.
    fn assert_kept(&self, before: &BTreeMap<String, Vec<u8>>) {
        let now = self.blobs();
        assert!(before.iter().all(|(name, bytes)| now.get(name) == Some(bytes)));
    }
}

#[tokio::test]
async fn a_stream_that_begins_anew_is_archived_beside_what_it_lost() {
    let mut life = Life::begin().await;
    life.write(40).await;
    assert!(life.tend().await);
    let mut lineages = vec![Lineage::FIRST];
    for loss in 1..=3 {
        let before = life.blobs();
        let lineage = life.lose(Memory::new()).await;
        assert_eq!(life.head(), Seq(2), "the stream is new");
        lineages.push(lineage);
        // With the claim still there, and after it has gone itself.
        for round in 0..3 {
            life.write(40).await;
            assert!(life.tend().await, "loss {loss}, round {round}");
            assert_eq!(life.whole().await.folded.unwrap().lineage(), lineage);
            life.check(&format!("loss {loss}, round {round}")).await;
        }
        life.assert_kept(&before);
        life.assert_lineages(&lineages).await;
        let beside = life.archived(&Branch { stream: stream(), lineage }).await;
        assert_eq!(beside[0].record.seq, Seq(1));
        assert!(beside.len() > 60, "{}", beside.len());
    }
}

#[tokio::test]
async fn a_stream_that_goes_on_from_an_earlier_record_is_archived_beside_what_it_lost() {
    let mut life = Life::begin().await;
    life.write(40).await;
    assert!(life.tend().await);
    let yesterday = life.store.copied();
    let forked_at = life.head();
    life.write(60).await;
    assert!(life.tend().await);
    let before = life.blobs();
    let first = life.lose(yesterday.copied()).await;
    assert_eq!(life.head(), forked_at.next());
    life.write(3).await;
    let today = life.store.copied();
    life.write(60).await;
    assert!(life.tend().await);
    life.check("a loss").await;
    life.assert_kept(&before);
    life.assert_lineages(&[Lineage::FIRST, first]).await;
    let beside = life.archived(&Branch { stream: stream(), lineage: first }).await;
    assert_eq!(Lineage::named(beside[0].hash), first, "it begins with the claim");
    // A second loss within it, once its claim is only in the fold; and a third one, back to before the first.
    let before = life.blobs();
    let second = life.lose(today).await;
    life.write(60).await;
    assert!(life.tend().await);
    assert!(life.whole().await.records[0].record.seq > forked_at.next());
    life.write(60).await;
    assert!(life.tend().await);
    life.check("a second loss").await;
    let third = life.lose(yesterday).await;
    life.write(60).await;
    assert!(life.tend().await);
    life.check("a third loss").await;
    life.assert_kept(&before);
    life.assert_lineages(&[Lineage::FIRST, first, second, third]).await;
}

#[tokio::test]
async fn a_loss_that_nobody_accepted_is_refused_whatever_was_accepted_before() {
    let mut life = Life::begin().await;
    for round in 0..3 {
        life.write(40).await;
        assert!(life.tend().await, "round {round}: what was accepted is taken");
        let yesterday = life.store.copied();
        life.write(40).await;
        assert!(life.tend().await);
        let before = life.blobs();
        for left in [yesterday, Memory::new()] {
            life.meet(left).await;
            life.claim(None).await;
            life.write(60).await;
            let refused = life.carry().await.unwrap_err();
            // By a record that is there, or by the one after the last of them.
            let is_another =
                matches!(refused, Error::Archive(ArchiveError::Differs { .. } | ArchiveError::NoChain(_)));
            assert!(is_another, "round {round}: {refused:?}");
            assert_eq!(life.blobs(), before, "nothing was written");
        }
        life.lose(Memory::new()).await;
    }
}

#[tokio::test]
async fn what_does_not_follow_the_lineage_that_was_left_is_refused() {
    let mut life = Life::begin().await;
    life.write(40).await;
    assert!(life.tend().await);
    let left = life.store.copied();
    life.lose(left).await;
    let Whole { folded, records } = life.whole().await;
    let at_claim = records.len() - 1;
    let before = Branch { stream: stream(), lineage: folded.unwrap().lineage() };
    life.archive.store(&before, &records[..at_claim]).await.unwrap();
    // The claim names another record as the one before.
    let mut stranger = records[at_claim].clone();
    stranger = Stored::seal(stranger.record, Hash([7; 32])).unwrap();
    let refused = life.archive.store(&before, &[stranger.clone()]).await.unwrap_err();
    assert!(matches!(refused, ArchiveError::NoChain(_)), "{refused}");
    let refused = life.archive.store(&before, &[records[at_claim - 1].clone(), stranger]).await.unwrap_err();
    assert!(matches!(refused, ArchiveError::NoChain(_)), "{refused}");
    life.assert_lineages(&[Lineage::FIRST]).await;
    life.archive.store(&before, &records[at_claim..]).await.unwrap();
    life.assert_lineages(&[Lineage::FIRST, Lineage::named(records[at_claim].hash)]).await;
}

/// A store with one record to a page.
struct OneByOne(Arc<Memory>);

struct OnePage {
    reader: Box<dyn Reader>,
    left: VecDeque<Stored>,
}

#[async_trait]
impl Reader for OnePage {
    fn folded(&self) -> Option<&Folded> {
        self.reader.folded()
    }

    fn bytes(&self) -> usize {
        self.reader.bytes()
    }

    async fn page(&mut self) -> Result<Option<Page>, BackendError> {
        if self.left.is_empty()
            && let Some(Page { records, bytes: _ }) = self.reader.page().await?
        {
            self.left.extend(records);
        }
        let next = self.left.pop_front();
        Ok(next.map(|stored| Page { bytes: encode(&stored).len(), records: vec![stored] }))
    }
}

#[async_trait]
impl Backend for OneByOne {
    async fn streams(&self) -> Result<Vec<StreamId>, BackendError> {
        self.0.streams().await
    }

    async fn read(&self, stream: &StreamId) -> Result<Box<dyn Reader>, BackendError> {
        let reader = self.0.read(stream).await?;
        Ok(Box::new(OnePage { reader, left: VecDeque::new() }))
    }

    async fn head(&self, stream: &StreamId) -> Result<Option<Head>, BackendError> {
        self.0.head(stream).await
    }

    async fn forget(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.0.forget(stream).await
    }

    async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
        cut: Option<&Folded>,
    ) -> Result<(), AppendError> {
        self.0.append(stream, expected, records, cut).await
    }
}

#[tokio::test]
async fn the_first_record_waits_for_the_claim_that_tells_its_lineage() {
    let mut life = Life::begin().await;
    life.write(40).await;
    assert!(life.tend().await);
    let before = life.blobs();
    let lineage = life.lose(Memory::new()).await;
    let store = OneByOne(life.store.clone());
    let carry_all_before = |seconds: i64| {
        let retention = Retention { keep_bytes: usize::MAX, keep_ms: Some(0), ..retention(Seq(0)) };
        let (store, archive) = (&store, &life.archive);
        async move { carry(store, &stream(), &retention, archive, at(seconds)).await }
    };
    // The claim is the open end: only the first record is to go.
    assert_eq!(carry_all_before(life.clock + 1).await.unwrap(), None);
    assert_eq!(life.blobs(), before);
    life.clock += 1;
    life.journal.append(vec![fact(1)], at(life.clock)).await.unwrap();
    let carried = carry_all_before(life.clock + 1).await.unwrap();
    assert_eq!(carried.map(|carried| carried.through), Some(Seq(2)));
    let beside = life.archived(&Branch { stream: stream(), lineage }).await;
    assert_eq!(beside.iter().map(|stored| stored.record.seq.0).collect::<Vec<_>>(), [1, 2]);
    life.assert_kept(&before);
}

#[tokio::test]
async fn a_carry_over_a_loss_goes_on_after_a_failure_at_any_call() {
    for fault in [
        BlobsFault::Unavailable,
        BlobsFault::AmbiguousBeforeCommit,
        BlobsFault::AmbiguousAfterCommit,
        BlobsFault::Lost,
        BlobsFault::CorruptedRead(77),
    ] {
        let mut met = 0;
        for calls in 0..CALLS_MAX {
            let mut life = Life::begin().await;
            life.write(30).await;
            let yesterday = life.store.copied();
            life.write(30).await;
            assert!(life.tend().await);
            let lineage = life.lose(yesterday).await;
            life.write(40).await;
            let before = life.blobs();
            life.blobs.inject_after(calls, fault);
            let first = life.carry().await;
            let is_over = life.blobs.clear_faults() > 0;
            met += usize::from(first.is_err());
            assert!(life.tend().await, "{fault:?} at call {calls}");
            life.assert_kept(&before);
            life.assert_lineages(&[Lineage::FIRST, lineage]).await;
            life.check(&format!("{fault:?} at call {calls}")).await;
            if is_over {
                assert!(calls > 6, "{fault:?}: the carry had {calls} calls only");
                break;
            }
            assert!(calls + 1 < CALLS_MAX, "{fault:?}: still met at call {calls}");
        }
        assert_eq!(met == 0, fault == BlobsFault::AmbiguousAfterCommit, "{fault:?}");
    }
}

/// Whatever is lost and accepted in whatever order, nothing that was archived changes, everything new is taken, and it is one chain.
#[tokio::test]
async fn a_storm_of_accepted_losses_and_faults_keeps_every_lineage() {
    let (mut losses, mut tended) = (0_u64, 0_u64);
    for seed in 1..=SEEDS {
        let mut dice = Dice::of(seed);
        let mut life = Life::begin().await;
        let mut copies = vec![Memory::new()];
        for step in 0..STEPS {
            let before = life.blobs();
            match dice.roll(10) {
                0 => copies.push(life.store.copied()),
                1 => {
                    let copy = copies[dice.roll(copies.len() as u64) as usize].copied();
                    life.lose(copy).await;
                    losses += 1;
                }
                2 => life.claim(None).await,
                3 | 4 => {
                    life.blobs.inject_after(dice.roll(12) as usize, BlobsFault::AmbiguousBeforeCommit);
                    let _ = life.carry().await;
                    life.blobs.clear_faults();
                }
                5 | 6 => tended += u64::from(life.tend().await),
                _ => life.write(1 + dice.roll(30) as u16).await,
            }
            life.assert_kept(&before);
            if step % 5 == 4 {
                life.check(&format!("seed {seed}, step {step}")).await;
            }
        }
        life.write(60).await;
        assert!(life.tend().await, "seed {seed}");
        life.check(&format!("seed {seed}, at the end")).await;
    }
    assert!(losses > SEEDS && tended > SEEDS, "{losses} losses, {tended} cuts");
}

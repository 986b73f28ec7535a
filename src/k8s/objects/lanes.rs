//! Who writes next, of all journals. What writes now and then is let in at once; what writes without a pause goes in a lane of its own, in which
//! few do so at a time, so that one cluster's trouble delays no other's failover.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::Instant,
};

/// Writes in flight for all journals; whoever comes next waits in line. A journal has one at most, so when a thousand clusters write
/// at once, at 10 ms each, a failover's decision waits 0.3 s behind them. It is an eighth of what the API server's default
/// settings let all workloads of that rank do at once.
pub const WRITES_MAX: usize = 32;

/// Writes in flight of those journals that write without a pause: alone they are as fast as before, together they leave most of a small API
/// server to the others.
const BUSY_MAX: usize = 2;

/// Writes that a journal may make at once. Chosen, not measured: a failover is a few, and one of many shards at once shall not wait either.
const BURST: f64 = 64.0;

/// Writes a second that it may go on making. Chosen likewise: what goes on for long, a rollout or a reshard, waits for pods and slots.
const STEADY: f64 = 8.0;

/// Journals that are remembered; beyond it those that have not written lately are forgotten, which have all their writes again anyway.
const KNOWN_MAX: usize = 1_024;

/// The lanes.
pub(super) struct Lanes {
    /// First come, first served.
    all: Semaphore,
    busy: Semaphore,
    known: Mutex<HashMap<String, Bucket>>,
}

/// What a journal may still write.
#[derive(Clone, Copy)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn now(self) -> Bucket {
        let now = Instant::now();
        let more = now.duration_since(self.at).as_secs_f64() * STEADY;
        Bucket { left: (self.left + more).min(BURST), at: now }
    }
}

/// Leave to make one write.
pub(super) struct Leave<'a> {
    _all: SemaphorePermit<'a>,
    _busy: Option<SemaphorePermit<'a>>,
}

impl Lanes {
    pub(super) fn new() -> Lanes {
        Lanes { all: Semaphore::new(WRITES_MAX), busy: Semaphore::new(BUSY_MAX), known: Mutex::default() }
    }

    /// Waits until this journal may write; `None` if that takes longer than `patience`.
    pub(super) async fn enter(&self, journal: &str, patience: Duration) -> Option<Leave<'_>> {
        let is_busy = !self.spend(journal);
        let both = async {
            // Its place among the busy first: who waits there keeps nobody else out.
            let busy = if is_busy { Some(self.busy.acquire().await.ok()?) } else { None };
            Some(Leave { _all: self.all.acquire().await.ok()?, _busy: busy })
        };
        tokio::time::timeout(patience, both).await.ok().flatten()
    }

    /// True if the journal had a write left.
    fn spend(&self, journal: &str) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KNOWN_MAX && !known.contains_key(journal) {
            known.retain(|_, bucket| bucket.now().left < BURST);
        }
        let fresh = Bucket { left: BURST, at: Instant::now() };
        let bucket = known.entry(journal.to_owned()).or_insert(fresh);
        *bucket = bucket.now();
        let has_left = bucket.left >= 1.0;
        if has_left {
            bucket.left -= 1.0;
        }
        has_left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn journals_that_write_without_a_pause_wait_for_each_other_and_nobody_waits_for_them() {
        let lanes = Lanes::new();
        let names: Vec<String> = (0..BUSY_MAX + 2).map(|number| format!("busy-{number}")).collect();
        for name in &names {
            for _ in 0..BURST as usize {
                assert!(lanes.enter(name, PATIENCE).await.is_some());
            }
        }
        let mut held = Vec::new();
        for name in &names[..BUSY_MAX] {
            held.push(lanes.enter(name, PATIENCE).await.unwrap());
        }
        let begun = Instant::now();
        assert!(lanes.enter(&names[BUSY_MAX], PATIENCE).await.is_none(), "its lane is full");
        assert_eq!(begun.elapsed(), PATIENCE);
        let begun = Instant::now();
        for _ in 0..BURST as usize {
            assert!(lanes.enter("quiet", PATIENCE).await.is_some());
        }
        assert_eq!(begun.elapsed(), Duration::ZERO, "whoever was quiet goes at once");
        drop(held);
        assert!(lanes.enter(&names[BUSY_MAX], PATIENCE).await.is_some());
        // A pause, and it is as any other.
        tokio::time::advance(Duration::from_secs(1)).await;
        let held = {
            let mut all = Vec::new();
            for name in &names[..=BUSY_MAX] {
                all.push(lanes.enter(name, PATIENCE).await.unwrap());
            }
            all
        };
        assert_eq!(held.len(), BUSY_MAX + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn journals_that_are_quiet_are_forgotten() {
        let lanes = Lanes::new();
        for number in 0..KNOWN_MAX * 2 {
            lanes.enter(&number.to_string(), PATIENCE).await.unwrap();
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert!(lanes.known.lock().unwrap().len() <= KNOWN_MAX);
    }
}

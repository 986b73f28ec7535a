//! A deterministic world and driver, without I/O: stories and property tests run the real `turn()` against it. Time only
//! passes when nothing else happens.

mod act;
mod agent;
mod by_key;
mod faults;
mod gossip;
mod look;
mod network;
mod objects;
mod process;
mod reshard;
mod script;
mod world;

pub use faults::Perturbation;
pub use script::{Story, StoryError};
pub use world::World;

use crate::{
    decision::Decision,
    effect::Outcome,
    event::{BaselineOrigin, Event, Record},
    ids::{Seq, Timestamp},
    observation::{Executed, Seen},
    state::ClusterState,
    topology::terms,
    turn::turn,
};
use std::collections::BTreeSet;

/// Turns after which a story that does not come to rest is called endless.
const TURNS_MAX: usize = 4_000;
/// The driver's safety-net look when nothing wakes it. Milliseconds.
const PROBE_MS: i64 = 500;
/// What an effect takes in this world. Milliseconds.
const EFFECT_MS: i64 = 1;
/// A cluster is at rest when nothing was recorded for this long. Longer than every window and back-off of a story but the
/// rollout's own. Milliseconds.
const REST_MS: i64 = 12_000;

/// The operator, its journal and its world.
pub struct Sim {
    /// The world that is observed and changed.
    pub world: World,
    /// Everything recorded so far.
    pub records: Vec<Record>,
    /// What the operator knows.
    pub state: ClusterState,
    /// Faults injected into the operator.
    pub perturbation: Perturbation,
    /// The last record of each write: where a crash differs from a crash elsewhere.
    pub writes: BTreeSet<Seq>,
    /// Decisions of which something was done: whose outcomes can be lost.
    pub done: BTreeSet<Seq>,
    executed: Vec<Executed>,
    running: bool,
}

impl Sim {
    /// A new world with the operator not yet started.
    pub fn new(world: World, perturbation: Perturbation) -> Self {
        let (records, state, executed) = (Vec::new(), ClusterState::default(), Vec::new());
        let (writes, done) = (BTreeSet::new(), BTreeSet::new());
        Sim { world, records, state, perturbation, writes, done, executed, running: false }
    }

    /// Starts the operator: folds the journal and claims the next epoch.
    pub fn start(&mut self) {
        self.state = ClusterState::fold(&self.records);
        self.executed.clear();
        self.running = true;
        self.state.epoch.0 += 1;
        if self.records.is_empty() {
            self.record(Event::Baseline {
                cluster_uid: "uid-1".into(),
                namespace: "default".into(),
                name: "story".into(),
                origin: BaselineOrigin::Empty,
            });
        }
        let writer = format!("operator-{}", self.state.epoch);
        self.record(Event::EpochStarted { writer, version: "sim".into(), lost_through: None });
    }

    /// Stops the operator; the world goes on without it.
    pub fn stop(&mut self) {
        self.running = false;
        self.executed.clear();
        self.world.authority.clear();
    }

    fn record(&mut self, event: Event) {
        let time = self.world.now().max(self.state.head_time);
        self.record_at(time, event);
    }

    fn record_at(&mut self, time: Timestamp, event: Event) {
        let record = Record { seq: self.state.head.next(), epoch: self.state.epoch, time, event };
        self.state.apply(&record);
        self.records.push(record);
    }

    /// Runs until nothing has been recorded for `REST_MS`, or until `limit_ms` have passed. Error: it never rests.
    pub fn run(&mut self, limit_ms: Option<i64>) -> Result<(), String> {
        let until = limit_ms.map(|ms| self.world.now().plus_millis(ms));
        let mut last_news = self.world.now();
        for _ in 0..TURNS_MAX {
            let (busy, wake_at) = if self.running { self.pass() } else { (false, None) };
            if busy {
                last_news = self.world.now();
                continue;
            }
            let now = self.world.now();
            if until.is_some_and(|u| now >= u) || (until.is_none() && now.millis_since(last_news) >= REST_MS)
            {
                return Ok(());
            }
            let probe = now.plus_millis(PROBE_MS);
            let next =
                [wake_at.filter(|w| *w > now), until].into_iter().flatten().fold(probe, Timestamp::min);
            self.world.advance(next);
        }
        Err(format!("not at rest after {TURNS_MAX} turns: {:?}", self.state.standing))
    }

    /// One pass of the driver; true if anything was recorded.
    fn pass(&mut self) -> (bool, Option<Timestamp>) {
        let seen = Seen { executed: std::mem::take(&mut self.executed), ..self.world.look(&self.state) };
        let made = turn(&self.state, &seen, self.world.now());
        let busy = !made.events.is_empty();
        let mut decided: Vec<(Seq, Decision)> = Vec::new();
        for event in made.events {
            let decision = event.decided().cloned();
            self.record_at(made.now, event);
            decided.extend(decision.map(|d| (self.state.head, d)));
        }
        // The batch is one write: all of it is there or nothing. A crash right after it executes nothing.
        self.writes.extend(busy.then_some(self.state.head));
        if self.perturbation.take_crash(self.state.head) {
            self.start();
            return (true, None);
        }
        let decided_at = self.world.now();
        if busy {
            self.world.advance(decided_at.plus_millis(self.world.append_ms));
        }
        // What is not confirmed any more is said before anything is done about it.
        self.world.authority = self.state.confirmed().collect();
        for (seq, decision) in decided.into_iter().filter(|(_, d)| !d.effects.is_empty()) {
            let outcomes = self.execute(&decision, decided_at);
            self.done.insert(seq);
            if self.perturbation.loses_outcome(seq) {
                self.start();
                return (true, None);
            }
            self.executed.push(Executed { decision: seq, outcomes });
        }
        (busy, made.wake_at)
    }

    fn execute(&mut self, decision: &Decision, decided_at: Timestamp) -> Vec<(Timestamp, Outcome)> {
        let mut outcomes = Vec::new();
        let mut going = true;
        for effect in &decision.effects {
            let terms = terms(&self.state, decision);
            let age_ms = u64::try_from(self.world.now().millis_since(decided_at)).unwrap_or(0);
            let is_old = effect.age_max_ms(decision.promises()).is_some_and(|max_ms| age_ms > max_ms);
            let outcome = match (going, is_old) {
                (false, _) => Outcome::Skipped,
                (true, true) => Outcome::Superseded(format!("decided {age_ms} ms ago")),
                (true, false) => self.perturbation.apply(&mut self.world, effect, &terms),
            };
            going &= outcome == Outcome::Verified;
            self.world.pass(EFFECT_MS);
            outcomes.push((self.world.now(), outcome));
        }
        outcomes
    }
}

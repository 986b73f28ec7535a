//! What the agents of one cluster have said, and what its task lets them be told without being asked.

use crate::{clock::Clock, k8s::cache::Owner};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::{sync::Notify, time::Instant};
use valkeeper_agent::{
    proto::AgentState,
    wire::{self, Malformed},
};
use valkeeper_core::{
    ids::{MemberId, Seq, WriterEpoch},
    observation::{AgentFacts, Observed, ServerProcess, Why},
};

/// What one agent said last.
struct Kept {
    /// The agent's process, and the one before it, whose late words count no more.
    instance: String,
    former: Option<String>,
    /// The number of its news.
    number: u64,
    facts: AgentFacts,
    exited_run_id: String,
    at: Instant,
}

#[derive(Default)]
struct Inner {
    kept: BTreeMap<MemberId, Kept>,
    /// Who does not answer, since it was heard last.
    silent: BTreeMap<MemberId, Why>,
    confirmed: BTreeMap<MemberId, Seq>,
    confirmed_at: BTreeMap<MemberId, Instant>,
    deposed_by: Option<WriterEpoch>,
}

/// What is known of the agents of one cluster, for one task of one epoch.
pub struct Board {
    epoch: WriterEpoch,
    clock: Clock,
    /// Woken if there is something to act on.
    urgent: Arc<Notify>,
    /// Woken if anything else changed.
    normal: Arc<Notify>,
    inner: Mutex<Inner>,
}

impl Board {
    /// An empty board. `urgent` is woken when a server ended or a member is about to; `normal` when anything else changed.
    pub fn new(epoch: WriterEpoch, clock: Clock, urgent: Arc<Notify>, normal: Arc<Notify>) -> Board {
        Board { epoch, clock, urgent, normal, inner: Mutex::default() }
    }

    /// The epoch it is for.
    pub fn epoch(&self) -> WriterEpoch {
        self.epoch
    }

    /// An agent spoke. Of an agent's words the newest count, in whatever order they arrive.
    ///
    /// `Ok(false)`: it speaks for a process that another has followed.
    ///
    /// # Errors
    /// Its words cannot be understood.
    pub fn heard(&self, member: MemberId, state: AgentState) -> Result<bool, Malformed> {
        let epoch = WriterEpoch(state.epoch);
        if epoch > self.epoch {
            self.depose(epoch);
        }
        let (instance, number) = (state.instance.clone(), state.number);
        let exited_run_id = state.exited_run_id.clone();
        let facts = wire::facts(state, self.clock.now());
        let mut inner = self.inner();
        let mut facts = match facts {
            Ok(facts) => facts,
            Err(malformed) => {
                inner.kept.remove(&member);
                inner.silent.insert(member, Why::Garbled);
                return Err(malformed);
            }
        };
        let before = inner.kept.remove(&member);
        if before.as_ref().is_some_and(|old| old.former.as_ref() == Some(&instance)) {
            inner.kept.extend(before.map(|old| (member, old)));
            return Ok(false);
        }
        let was_silent = inner.silent.remove(&member).is_some();
        if let Some(mut old) = before {
            if old.instance == instance && number < old.number {
                old.at = Instant::now();
                inner.kept.insert(member, old);
                return Ok(true);
            }
            since_as_before(&old.facts, &mut facts);
            let former = if old.instance == instance { old.former } else { Some(old.instance) };
            self.wake(was_silent, &old.facts, &old.exited_run_id, &facts, &exited_run_id);
            let kept = Kept { instance, former, number, facts, exited_run_id, at: Instant::now() };
            inner.kept.insert(member, kept);
        } else {
            self.normal.notify_one();
            let kept = Kept { instance, former: None, number, facts, exited_run_id, at: Instant::now() };
            inner.kept.insert(member, kept);
        }
        Ok(true)
    }

    fn wake(&self, was_silent: bool, old: &AgentFacts, old_exited: &str, new: &AgentFacts, exited: &str) {
        if old_exited != exited || (new.leaving && !old.leaving) {
            self.urgent.notify_one();
        } else if was_silent || old != new {
            self.normal.notify_one();
        }
    }

    /// An agent did not answer when it was asked.
    pub fn silent(&self, member: MemberId) {
        if self.inner().silent.insert(member, Why::Silent).is_none() {
            self.normal.notify_one();
        }
    }

    /// A member is at another address: what was heard from the former one is nothing.
    pub fn forget(&self, member: MemberId) {
        let mut inner = self.inner();
        inner.kept.remove(&member);
        inner.silent.remove(&member);
    }

    /// What is known of an agent.
    pub fn facts(&self, member: MemberId) -> Observed<AgentFacts> {
        let inner = self.inner();
        match (inner.silent.get(&member), inner.kept.get(&member)) {
            (Some(why), _) => Observed::Unknown(*why),
            (None, Some(kept)) => Observed::Present(kept.facts.clone()),
            (None, None) => Observed::Unknown(Why::NotLooked),
        }
    }

    /// When an agent was heard last, if it was.
    pub fn heard_at(&self, member: MemberId) -> Option<Instant> {
        self.inner().kept.get(&member).map(|kept| kept.at)
    }

    /// True if the agent said that the process with this run id has ended. That stays true, whatever the agent does since.
    pub fn has_exited(&self, member: MemberId, run_id: &str) -> bool {
        !run_id.is_empty() && self.inner().kept.get(&member).is_some_and(|kept| kept.exited_run_id == run_id)
    }

    /// From now on these grants are confirmed to the holders who ask, and no others. To be called before a decision is executed.
    pub fn publish(&self, confirmed: impl Iterator<Item = (MemberId, Seq)>) {
        self.inner().confirmed = confirmed.collect();
    }

    /// Confirms a member's grant if it is in force, and remembers when.
    pub fn confirm(&self, member: MemberId, grant: Seq) -> bool {
        let mut inner = self.inner();
        let confirmed = inner.deposed_by.is_none() && inner.confirmed.get(&member) == Some(&grant);
        if confirmed {
            inner.confirmed_at.insert(member, Instant::now());
        }
        confirmed
    }

    /// When a member's grant was confirmed last, if it was.
    pub fn confirmed_at(&self, member: MemberId) -> Option<Instant> {
        self.inner().confirmed_at.get(&member).copied()
    }

    /// An agent knows a later writer.
    pub fn depose(&self, by: WriterEpoch) {
        let mut inner = self.inner();
        inner.deposed_by = inner.deposed_by.max(Some(by));
        self.normal.notify_one();
    }

    /// The highest epoch by which an agent refuses this writer, if one does.
    pub fn deposed(&self) -> Option<WriterEpoch> {
        self.inner().deposed_by
    }

    /// Never held across an await, and nothing that runs under it can panic.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same silence began once: a time that each report gives anew would be a new fact each time.
fn since_as_before(old: &AgentFacts, new: &mut AgentFacts) {
    if let (ServerProcess::Silent { since }, ServerProcess::Silent { since: again }) =
        (&old.server, &mut new.server)
        && old.run_id == new.run_id
    {
        *again = *since;
    }
}

/// The boards of all clusters that this process leads, by namespace and name.
#[derive(Default)]
pub struct Registry(Mutex<HashMap<Owner, Arc<Board>>>);

impl Registry {
    /// Gives a cluster its board. It is found until the seat is dropped, or another takes its place.
    pub fn open(self: &Arc<Self>, owner: &Owner, board: Arc<Board>) -> Seat {
        self.boards().insert(owner.clone(), Arc::clone(&board));
        Seat { registry: Arc::clone(self), owner: owner.clone(), board }
    }

    /// The board of a cluster.
    pub fn find(&self, owner: &Owner) -> Option<Arc<Board>> {
        self.boards().get(owner).cloned()
    }

    fn boards(&self) -> MutexGuard<'_, HashMap<Owner, Arc<Board>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A cluster's place in the registry.
pub struct Seat {
    registry: Arc<Registry>,
    owner: Owner,
    board: Arc<Board>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut boards = self.registry.boards();
        if boards.get(&self.owner).is_some_and(|board| Arc::ptr_eq(board, &self.board)) {
            boards.remove(&self.owner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use valkeeper_agent::proto;

    const A: MemberId = MemberId { shard: valkeeper_core::ids::ShardId(0), ordinal: 0 };

    fn board() -> (Board, Arc<Notify>, Arc<Notify>) {
        let (urgent, normal) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        (Board::new(WriterEpoch(4), Clock::start(), urgent.clone(), normal.clone()), urgent, normal)
    }

    fn state(instance: &str, number: u64) -> AgentState {
        AgentState {
            instance: instance.to_owned(),
            number,
            epoch: 4,
            brief: Some(proto::Brief::default()),
            gate: "commanded".to_owned(),
            run_id: "r1".to_owned(),
            ..AgentState::default()
        }
    }

    fn woken(notify: &Notify) -> bool {
        notify.notified().now_or_never().is_some()
    }

    #[tokio::test]
    async fn the_newest_words_count_in_whatever_order_they_arrive() {
        let (board, _, _) = board();
        board.heard(A, AgentState { leaving: true, ..state("one", 7) }).unwrap();
        board.heard(A, state("one", 6)).unwrap();
        assert!(board.facts(A).present().unwrap().leaving, "6 is older than 7");
        board.heard(A, state("two", 1)).unwrap();
        assert!(!board.facts(A).present().unwrap().leaving, "another process begins anew");
        board.heard(A, AgentState { leaving: true, ..state("one", 9) }).unwrap();
        assert!(!board.facts(A).present().unwrap().leaving, "the former process speaks no more");
    }

    #[tokio::test]
    async fn an_end_is_urgent_anything_else_is_not_and_the_same_is_nothing() {
        let (board, urgent, normal) = board();
        board.heard(A, state("one", 1)).unwrap();
        assert!(!woken(&urgent) && woken(&normal));
        board.heard(A, state("one", 2)).unwrap();
        assert!(!woken(&urgent) && !woken(&normal));
        let ended = AgentState { exited: "signal 9".into(), exited_run_id: "r1".into(), ..state("one", 3) };
        board.heard(A, ended).unwrap();
        assert!(woken(&urgent));
        assert!(board.has_exited(A, "r1") && !board.has_exited(A, "r2") && !board.has_exited(A, ""));
        let back = AgentState { run_id: "r2".into(), exited_run_id: "r1".into(), ..state("one", 4) };
        board.heard(A, back).unwrap();
        assert!(board.has_exited(A, "r1") && woken(&normal) && !woken(&urgent));
    }

    #[tokio::test]
    async fn a_silence_begins_once() {
        let (board, _, _) = board();
        board.heard(A, AgentState { silent_ms: 700, ..state("one", 1) }).unwrap();
        let first = board.facts(A);
        board.heard(A, AgentState { silent_ms: 900, ..state("one", 2) }).unwrap();
        assert_eq!(board.facts(A), first);
    }

    #[tokio::test]
    async fn only_what_was_published_last_is_confirmed() {
        let (board, _, _) = board();
        assert!(!board.confirm(A, Seq(5)));
        board.publish([(A, Seq(5))].into_iter());
        assert!(board.confirm(A, Seq(5)) && !board.confirm(A, Seq(4)));
        board.publish(std::iter::empty());
        assert!(!board.confirm(A, Seq(5)));
        board.publish([(A, Seq(5))].into_iter());
        board.heard(A, AgentState { epoch: 9, ..state("one", 1) }).unwrap();
        assert_eq!(board.deposed(), Some(WriterEpoch(9)));
        assert!(!board.confirm(A, Seq(5)), "a deposed writer confirms nothing");
    }

    #[tokio::test]
    async fn who_does_not_answer_is_silent_and_who_talks_nonsense_garbled() {
        let (board, _, _) = board();
        assert_eq!(board.facts(A), Observed::Unknown(Why::NotLooked));
        board.heard(A, state("one", 1)).unwrap();
        board.silent(A);
        assert_eq!(board.facts(A), Observed::Unknown(Why::Silent));
        board.heard(A, state("one", 2)).unwrap();
        assert!(board.facts(A).present().is_some());
        assert!(board.heard(A, AgentState { gate: "ajar".into(), ..state("one", 3) }).is_err());
        assert_eq!(board.facts(A), Observed::Unknown(Why::Garbled));
    }

    #[test]
    fn a_seat_that_was_taken_over_takes_nothing_with_it() {
        let registry = Arc::new(Registry::default());
        let owner = ("shop".to_owned(), "orders".to_owned());
        let first = registry.open(&owner, Arc::new(board().0));
        let second = registry.open(&owner, Arc::new(board().0));
        drop(first);
        assert!(registry.find(&owner).is_some());
        drop(second);
        assert!(registry.find(&owner).is_none());
    }
}

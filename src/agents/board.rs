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

/// Highest epoch that is taken for a writer's. A claim is a start of the operator or a change of leader: a million of them is one a
/// minute for two years. Above it an agent talks nonsense, and following it would leave no numbers.
pub const EPOCH_MAX: WriterEpoch = WriterEpoch(1_000_000);

/// How far above everything that was granted here what an agent knows may be: of a journal that was lost, a cluster's whole life. Above it it talks
/// nonsense, and following it would leave no numbers.
const GRANT_AHEAD_MAX: u64 = 1_000_000_000_000;

/// What one agent said last.
struct Kept {
    /// The agent's process: the one that answered a greeting last.
    instance: String,
    /// The number of its news.
    number: u64,
    facts: AgentFacts,
    exited_run_id: String,
    mounted: String,
    at: Instant,
    /// True once its news have arrived: it knows the way.
    brings_news: bool,
}

#[derive(Default)]
struct Inner {
    kept: BTreeMap<MemberId, Kept>,
    /// Who does not answer, since it was heard last.
    silent: BTreeMap<MemberId, Why>,
    confirmed: BTreeMap<MemberId, Seq>,
    confirmed_at: BTreeMap<MemberId, Instant>,
    /// Who says that a later writer has spoken, and by which epoch.
    claims: BTreeMap<MemberId, WriterEpoch>,
    granted_up_to: Seq,
    doubts: BTreeMap<MemberId, Arc<Notify>>,
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

    /// Woken when what the agent of a member is should be asked at its address: words came that count for nothing until then.
    pub fn doubts(&self, member: MemberId) -> Arc<Notify> {
        Arc::clone(self.inner().doubts.entry(member).or_default())
    }

    /// An agent answered a greeting at the address where the member is now. From now on only what this process says counts.
    ///
    /// # Errors
    /// Its words cannot be understood.
    pub fn greeted(&self, member: MemberId, state: AgentState) -> Result<(), Malformed> {
        let epoch = WriterEpoch(state.epoch);
        if epoch > EPOCH_MAX {
            self.inner().silent.insert(member, Why::Garbled);
            return Err(Malformed("epoch: no writer has it"));
        }
        if epoch > self.epoch {
            self.depose(member, epoch);
        } else {
            self.inner().claims.remove(&member);
        }
        let mut inner = self.inner();
        let former = inner.kept.remove(&member);
        self.take(&mut inner, member, state, former, false)
    }

    /// An agent answered a command. `Ok(false)`: as for news.
    ///
    /// # Errors
    /// Its words cannot be understood.
    pub fn answered(&self, member: MemberId, state: AgentState) -> Result<bool, Malformed> {
        self.spoke(member, state, false)
    }

    /// An agent brought news. `Ok(false)`: it is not the process that was greeted last, or it knows a later writer. Then what it
    /// says is nothing, and the agent is greeted: a member that is cut off at a former address has a good certificate, too.
    ///
    /// # Errors
    /// Its words cannot be understood.
    pub fn news(&self, member: MemberId, state: AgentState) -> Result<bool, Malformed> {
        self.spoke(member, state, true)
    }

    fn spoke(&self, member: MemberId, state: AgentState, is_news: bool) -> Result<bool, Malformed> {
        let mut inner = self.inner();
        let current = inner.kept.get(&member).is_some_and(|kept| kept.instance == state.instance);
        if !current || WriterEpoch(state.epoch) > self.epoch {
            if let Some(doubts) = inner.doubts.get(&member) {
                doubts.notify_one();
            }
            return Ok(false);
        }
        let former = inner.kept.remove(&member);
        self.take(&mut inner, member, state, former, is_news).map(|()| true)
    }

    /// Of a process's words the newest count, in whatever order they arrive.
    fn take(
        &self,
        inner: &mut Inner,
        member: MemberId,
        state: AgentState,
        former: Option<Kept>,
        is_news: bool,
    ) -> Result<(), Malformed> {
        let (instance, number) = (state.instance.clone(), state.number);
        let (exited_run_id, mounted) = (state.exited_run_id.clone(), state.mounted.clone());
        let mut facts = wire::facts(state, self.clock.now()).inspect_err(|_| {
            inner.silent.insert(member, Why::Garbled);
        })?;
        if facts.brief.grant.0 > inner.granted_up_to.0.saturating_add(GRANT_AHEAD_MAX) {
            inner.silent.insert(member, Why::Garbled);
            return Err(Malformed("brief.grant: it is above every number"));
        }
        let was_silent = inner.silent.remove(&member).is_some();
        let same = former.as_ref().filter(|old| old.instance == instance);
        let brings_news = is_news || same.is_some_and(|old| old.brings_news);
        if same.is_some_and(|old| number < old.number) {
            let newer = former.map(|old| Kept { at: Instant::now(), brings_news, ..old });
            inner.kept.extend(newer.map(|newer| (member, newer)));
            return Ok(());
        }
        match &former {
            Some(old) => {
                since_as_before(&old.facts, &mut facts);
                self.wake(was_silent, &old.facts, &old.exited_run_id, &facts, &exited_run_id);
            }
            None => self.normal.notify_one(),
        }
        let kept = Kept { instance, number, facts, exited_run_id, mounted, at: Instant::now(), brings_news };
        inner.kept.insert(member, kept);
        Ok(())
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
        inner.doubts.remove(&member);
        inner.claims.remove(&member);
    }

    /// What is known of an agent.
    pub fn facts(&self, member: MemberId) -> Observed<AgentFacts> {
        let inner = self.inner();
        if inner.claims.contains_key(&member) {
            return Observed::Unknown(Why::Garbled);
        }
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

    /// True if the process that was greeted last has brought news.
    pub fn brings_news(&self, member: MemberId) -> bool {
        self.inner().kept.get(&member).is_some_and(|kept| kept.brings_news)
    }

    /// Which versions of Secrets a member's agent has mounted; it is never recorded. Empty if it does not say.
    pub fn mounted(&self, member: MemberId) -> String {
        let inner = self.inner();
        let kept = inner.kept.get(&member).filter(|kept| !kept.mounted.is_empty());
        kept.map(|kept| format!("{} {}", kept.mounted, kept.facts.certificate.thumbprint)).unwrap_or_default()
    }

    /// True if the agent said that the process with this run id has ended. That stays true, whatever the agent does since.
    pub fn has_exited(&self, member: MemberId, run_id: &str) -> bool {
        !run_id.is_empty() && self.inner().kept.get(&member).is_some_and(|kept| kept.exited_run_id == run_id)
    }

    /// From now on these grants are confirmed to the holders who ask, and no others. To be called before a decision is executed.
    pub fn publish(&self, confirmed: impl Iterator<Item = (MemberId, Seq)>) {
        self.inner().confirmed = confirmed.collect();
    }

    /// Confirms a member's grant to this process of its agent if it is in force, and remembers when.
    pub fn confirm(&self, member: MemberId, instance: &str, grant: Seq) -> bool {
        let mut inner = self.inner();
        let current = inner.kept.get(&member).is_some_and(|kept| kept.instance == instance);
        let confirmed = current && inner.claims.is_empty() && inner.confirmed.get(&member) == Some(&grant);
        if confirmed {
            inner.confirmed_at.insert(member, Instant::now());
        }
        confirmed
    }

    /// A command has confirmed a member's grant.
    pub fn spoke_for(&self, member: MemberId) {
        self.inner().confirmed_at.insert(member, Instant::now());
    }

    /// When a member's grant was confirmed last, if it was.
    pub fn confirmed_at(&self, member: MemberId) -> Option<Instant> {
        self.inner().confirmed_at.get(&member).copied()
    }

    /// Nothing above this was granted by this journal.
    pub fn granted_up_to(&self, grant: Seq) {
        self.inner().granted_up_to = grant;
    }

    /// An agent says that it knows a later writer.
    pub fn depose(&self, member: MemberId, by: WriterEpoch) {
        let mut inner = self.inner();
        // Nonsense is as good as a refusal without a number.
        let by = if by > EPOCH_MAX { WriterEpoch(self.epoch.0.saturating_add(1)) } else { by };
        if inner.claims.insert(member, by).is_none() {
            tracing::info!(%member, epoch = by.0, "an agent refuses this writer: it knows a later one");
        }
        self.normal.notify_one();
    }

    /// The highest epoch by which agents refuse this writer, if half of all do and no more obey it. One among others may be wrong, and is then not
    /// listened to. A later writer has the journal's head: nothing is decided here any more, whatever agents say.
    pub fn deposed(&self) -> Option<WriterEpoch> {
        let inner = self.inner();
        let obeys =
            |member: &&MemberId| !inner.claims.contains_key(member) && !inner.silent.contains_key(member);
        let (refusing, obeying) = (inner.claims.len(), inner.kept.keys().filter(obeys).count());
        let is_one_of_many = refusing < obeying || refusing * 2 < inner.doubts.len();
        inner.claims.values().copied().max().filter(|_| !is_one_of_many)
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
        board.greeted(A, state("one", 1)).unwrap();
        assert!(!board.brings_news(A));
        assert!(board.news(A, AgentState { leaving: true, ..state("one", 7) }).unwrap());
        board.greeted(A, state("one", 6)).unwrap();
        assert!(board.facts(A).present().unwrap().leaving, "6 is older than 7");
        assert!(board.brings_news(A));
        board.greeted(A, state("two", 1)).unwrap();
        assert!(!board.facts(A).present().unwrap().leaving, "another process begins anew");
        assert!(!board.brings_news(A), "and nobody knows its way");
    }

    #[tokio::test]
    async fn only_who_was_greeted_last_is_heard_and_confirmed() {
        let (board, _, normal) = board();
        let doubts = board.doubts(A);
        board.publish([(A, Seq(5))].into_iter());
        assert_eq!(board.news(A, state("one", 1)).ok(), Some(false), "nobody was greeted yet");
        assert!(woken(&doubts) && !woken(&normal) && !board.confirm(A, "one", Seq(5)));
        assert_eq!(board.facts(A), Observed::Unknown(Why::NotLooked));
        board.greeted(A, state("one", 1)).unwrap();
        assert!(woken(&normal) && board.confirm(A, "one", Seq(5)));
        let at = board.confirmed_at(A);
        for words in
            [state("cut off", 9), AgentState { epoch: 9, gate: "ajar".into(), ..state("cut off", 9) }]
        {
            let (before, heard_at) = (board.facts(A), board.heard_at(A));
            assert_eq!(board.news(A, words).ok(), Some(false));
            assert!(woken(&doubts) && !board.confirm(A, "cut off", Seq(5)));
            assert_eq!((board.facts(A), board.heard_at(A), board.deposed()), (before, heard_at, None));
        }
        assert_eq!(board.confirmed_at(A), at);
        assert_eq!(board.news(A, AgentState { epoch: 9, ..state("one", 2) }).ok(), Some(false));
        assert!(woken(&doubts) && board.deposed().is_none(), "that is for the answer to a greeting");
        board.forget(A);
        assert_eq!(board.news(A, state("one", 3)).ok(), Some(false), "it may be at the former address");
        assert!(!board.confirm(A, "one", Seq(5)) && board.confirmed_at(A) == at);
    }

    #[tokio::test]
    async fn an_end_is_urgent_anything_else_is_not_and_the_same_is_nothing() {
        let (board, urgent, normal) = board();
        board.greeted(A, state("one", 1)).unwrap();
        assert!(!woken(&urgent) && woken(&normal));
        board.news(A, state("one", 2)).unwrap();
        assert!(!woken(&urgent) && !woken(&normal));
        let ended = AgentState { exited: "signal 9".into(), exited_run_id: "r1".into(), ..state("one", 3) };
        board.news(A, ended).unwrap();
        assert!(woken(&urgent));
        assert!(board.has_exited(A, "r1") && !board.has_exited(A, "r2") && !board.has_exited(A, ""));
        let back = AgentState { run_id: "r2".into(), exited_run_id: "r1".into(), ..state("one", 4) };
        board.news(A, back).unwrap();
        assert!(board.has_exited(A, "r1") && woken(&normal) && !woken(&urgent));
    }

    #[tokio::test]
    async fn a_silence_begins_once() {
        let (board, _, _) = board();
        board.greeted(A, AgentState { silent_ms: 700, ..state("one", 1) }).unwrap();
        let first = board.facts(A);
        board.news(A, AgentState { silent_ms: 900, ..state("one", 2) }).unwrap();
        assert_eq!(board.facts(A), first);
    }

    #[tokio::test]
    async fn only_what_was_published_last_is_confirmed() {
        let (board, _, _) = board();
        board.greeted(A, state("one", 1)).unwrap();
        assert!(!board.confirm(A, "one", Seq(5)));
        board.publish([(A, Seq(5))].into_iter());
        assert!(board.confirm(A, "one", Seq(5)) && !board.confirm(A, "one", Seq(4)));
        board.publish(std::iter::empty());
        assert!(!board.confirm(A, "one", Seq(5)));
        board.publish([(A, Seq(5))].into_iter());
        board.greeted(A, AgentState { epoch: 9, ..state("one", 1) }).unwrap();
        assert_eq!(board.deposed(), Some(WriterEpoch(9)));
        assert!(!board.confirm(A, "one", Seq(5)), "a deposed writer confirms nothing");
    }

    #[tokio::test]
    async fn who_does_not_answer_is_silent_and_who_talks_nonsense_garbled() {
        let (board, _, _) = board();
        assert_eq!(board.facts(A), Observed::Unknown(Why::NotLooked));
        board.greeted(A, state("one", 1)).unwrap();
        board.silent(A);
        assert_eq!(board.facts(A), Observed::Unknown(Why::Silent));
        board.news(A, state("one", 2)).unwrap();
        assert!(board.facts(A).present().is_some());
        assert!(board.news(A, AgentState { gate: "ajar".into(), ..state("one", 3) }).is_err());
        assert_eq!(board.facts(A), Observed::Unknown(Why::Garbled));
    }

    #[tokio::test]
    async fn one_of_three_that_refuses_or_talks_nonsense_is_set_aside_and_deposes_nobody() {
        let (board, _, _) = board();
        let others = [MemberId::new(0, 1), MemberId::new(0, 2)];
        let all: Vec<_> = others.iter().chain([&A]).map(|member| board.doubts(*member)).collect();
        board.greeted(A, AgentState { epoch: 9, ..state("one", 1) }).unwrap();
        assert_eq!(board.deposed(), None, "the others have not answered yet");
        for member in others {
            board.greeted(member, state("two", 1)).unwrap();
        }
        board.publish([(others[0], Seq(5))].into_iter());
        assert_eq!((board.deposed(), board.facts(A)), (None, Observed::Unknown(Why::Garbled)));
        assert!(!board.confirm(others[0], "two", Seq(5)), "it may be right");
        board.greeted(others[0], AgentState { epoch: 8, ..state("two", 2) }).unwrap();
        assert_eq!(board.deposed(), Some(WriterEpoch(9)), "two of three are");
        for member in [A, others[0]] {
            board.greeted(member, state("one", 3)).unwrap();
        }
        assert_eq!((board.deposed(), board.facts(A).is_unknown()), (None, false));
        let far = WriterEpoch(EPOCH_MAX.0 + 1);
        assert!(board.greeted(A, AgentState { epoch: far.0, ..state("one", 4) }).is_err());
        let grant = |grant| Some(proto::Brief { grant, ..proto::Brief::default() });
        let jumps = AgentState { brief: grant(u64::MAX), ..state("one", 5) };
        assert!(board.greeted(A, jumps).is_err());
        assert_eq!((board.deposed(), board.facts(A)), (None, Observed::Unknown(Why::Garbled)));
        let of_a_lost_journal = AgentState { brief: grant(5_000_000), ..state("one", 6) };
        assert!(board.greeted(A, of_a_lost_journal).is_ok() && board.facts(A).present().is_some());
        drop(all);
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

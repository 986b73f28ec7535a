//! Slots that go to another node key by key, one after the other from the highest down, beside everything else that the agent does. What was
//! told last is what is still to go. A failure ends it and leaves the slot in hand half-way: who tells anew finishes it or takes it back.

use crate::{
    local::{Error, Session, SlotIs, Target},
    shared::Agent,
};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;
use valkeeper_core::{
    ids::NodeId,
    info::{RawRole, RawSource},
    nodes::{Life, Nodes, Open},
    slots::SlotSet,
};

/// How long it may take the own node to hear of a slot that is the target's already: the target tells it at once.
const GOSSIP_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two looks for that.
const GOSSIP_PAUSE: Duration = Duration::from_millis(10);

/// What is to go.
#[derive(Clone, Debug)]
pub struct Order {
    /// The server that gives, which was checked.
    pub run_id: String,
    pub to: NodeId,
    pub slots: SlotSet,
}

/// What is told to go, and what became of it.
#[derive(Default)]
pub struct Handing(Mutex<State>);

#[derive(Default)]
struct State {
    /// While somebody works at it.
    job: Option<Job>,
    /// With which words the last one ended that did not come to its end.
    failure: Option<String>,
}

struct Job {
    left: Order,
    in_hand: Option<u16>,
}

impl Job {
    /// True if an order is for the slot in hand alone.
    fn is_at(&self, order: &Order) -> bool {
        let Order { run_id, to, slots } = order;
        *run_id == self.left.run_id && *to == self.left.to && *slots == only(self.in_hand)
    }
}

/// What to do with an order.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    /// Somebody must begin.
    Begin,
    /// Somebody is about it.
    GoesOn,
}

impl Handing {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes an order in place of the one before. The error is how that one failed, which is told once.
    fn tell(&self, order: Order) -> Result<Told, String> {
        self.change(|state| match (state.failure.take(), state.job.as_mut()) {
            (Some(words), _) => Err(words),
            // Asked about what is in hand, and nothing else: the rest is still to go.
            (None, Some(job)) if job.is_at(&order) => Ok(Told::GoesOn),
            (None, Some(job)) => {
                job.left = Order { slots: order.slots.without(&only(job.in_hand)), ..order };
                Ok(Told::GoesOn)
            }
            (None, None) => {
                state.job = Some(Job { left: order, in_hand: None });
                Ok(Told::Begin)
            }
        })
    }

    /// Nothing more shall go. The slot that is in hand all the same, if it is one of these: it goes to its end.
    pub fn take_back(&self, slots: &SlotSet) -> Option<u16> {
        self.change(|state| {
            state.failure = None;
            let job = state.job.as_mut()?;
            job.left.slots = SlotSet::default();
            job.in_hand.filter(|slot| slots.contains(*slot))
        })
    }

    /// The next slot, and what was told of it. With none left the job is over.
    fn next(&self) -> Option<(u16, Order)> {
        self.change(|state| {
            let next = state.job.as_mut().and_then(|job| {
                job.in_hand = job.left.slots.iter().next_back();
                job.left.slots = job.left.slots.without(&only(job.in_hand));
                Some((job.in_hand?, job.left.clone()))
            });
            if next.is_none() {
                state.job = None;
            }
            next
        })
    }

    fn fail(&self, words: String) {
        self.change(|state| *state = State { job: None, failure: Some(words) });
    }
}

fn only(slot: Option<u16>) -> SlotSet {
    slot.into_iter().collect()
}

/// Why a slot did not go.
#[derive(Debug, thiserror::Error)]
enum Stopped {
    #[error("{step}: {}", words(source))]
    Step { step: &'static str, source: Error },
    #[error("the member is ending")]
    Leaving,
    #[error("the server's writes are stopped")]
    NoWrites,
    #[error("the server is another process")]
    OtherProcess,
    #[error("its node is no primary that serves")]
    NoPrimary,
    #[error("its node does not serve it")]
    NotServed,
    #[error("it is half-way to {0}, which has a part of its keys")]
    HalfWay(NodeId),
    #[error("its node knows no address of {0}")]
    NoAddress(NodeId),
    #[error("keys in {0} do not go by key")]
    Databases(String),
    #[error("{0} keys do not go")]
    KeysLeft(u64),
    #[error("{0} is at the address of {1}")]
    OtherNode(NodeId, NodeId),
    #[error("no replica confirms what has gone")]
    Unconfirmed,
}

/// What the server said, bare.
fn words(error: &Error) -> String {
    match error {
        Error::Refused(said) => said.clone(),
        Error::Silent
        | Error::Lost(_)
        | Error::Garbled(_)
        | Error::Nodes(_)
        | Error::Users(_)
        | Error::Unverified(_) => error.to_string(),
    }
}

trait At<T> {
    fn at(self, step: &'static str) -> Result<T, Stopped>;
}

impl<T> At<T> for Result<T, Error> {
    fn at(self, step: &'static str) -> Result<T, Stopped> {
        self.map_err(|source| Stopped::Step { step, source })
    }
}

/// Begins to hand over, or goes on with this in place of what was told before.
pub fn hand_over(agent: &Arc<Agent>, order: Order) -> Result<(), String> {
    match agent.handing.tell(order)? {
        Told::Begin => drop(tokio::spawn(run(agent.clone()))),
        Told::GoesOn => {}
    }
    Ok(())
}

async fn run(agent: Arc<Agent>) {
    let mut road = None;
    while let Some((slot, order)) = agent.handing.next() {
        if let Err(error) = give(&agent, &mut road, slot, &order).await {
            tracing::warn!(slot, to = %order.to, error = %error, "a slot has not been handed over; no further one goes");
            return agent.handing.fail(format!("slot {slot}: {error}"));
        }
    }
    tracing::info!("the slots are handed over");
}

/// The way to a target.
struct Road {
    run_id: String,
    to: NodeId,
    own: Session,
    target: Target,
}

impl Road {
    async fn build(agent: &Agent, order: &Order, nodes: &Nodes) -> Result<Road, Stopped> {
        let Order { run_id, to, slots: _ } = order.clone();
        let host = nodes.get(&to).and_then(|node| node.address.clone());
        let host = host.ok_or_else(|| Stopped::NoAddress(to.clone()))?;
        let mut own = agent.local.session().await.at("connecting")?;
        let others = own.other_databases().await.at("INFO")?;
        if !others.is_empty() {
            return Err(Stopped::Databases(others.join(", ")));
        }
        let at = RawSource { host, port: agent.config.args.server_port };
        let mut target = agent.local.target(at).await.at("connecting to the target")?;
        // An address may be another member's by now, and all have the same users.
        let there = target.session.id().await.at("MYID of the target")?;
        if there != to {
            return Err(Stopped::OtherNode(there, to));
        }
        Ok(Road { run_id, to, own, target })
    }

    fn is_of(&self, order: &Order) -> bool {
        self.run_id == order.run_id && self.to == order.to
    }
}

/// Whether the agent may still take anything from its server. Not behind the lock of those who act: they go first, and this notices.
fn may_go_on(agent: &Agent, order: &Order) -> Result<(), Stopped> {
    agent.read(|known| match () {
        () if known.leaving => Err(Stopped::Leaving),
        () if known.stopped.is_some() => Err(Stopped::NoWrites),
        () if known.process.is_none() || known.run_id != order.run_id => Err(Stopped::OtherProcess),
        () => Ok(()),
    })
}

/// The nodes by the own one's word, if that is a primary that serves, and its server the one that is meant.
async fn look(agent: &Agent, order: &Order) -> Result<Nodes, Stopped> {
    may_go_on(agent, order)?;
    let look = agent.local.look().await.at("looking")?;
    if look.info.run_id != order.run_id {
        return Err(Stopped::OtherProcess);
    }
    let is_primary = look.info.role == RawRole::Primary;
    look.nodes.filter(|nodes| is_primary && nodes.myself.primary.is_none()).ok_or(Stopped::NoPrimary)
}

fn is_gone(nodes: &Nodes, slot: u16, to: &NodeId) -> bool {
    nodes.others.iter().any(|node| node.id == *to && node.slots.contains(slot))
}

/// Whether the own node hears that the slot is the target's.
async fn becomes_gone(agent: &Agent, slot: u16, order: &Order) -> Result<bool, Stopped> {
    let until = Instant::now() + GOSSIP_TIMEOUT;
    loop {
        let is_gone = is_gone(&look(agent, order).await?, slot, &order.to);
        if is_gone || Instant::now() >= until {
            return Ok(is_gone);
        }
        tokio::time::sleep(GOSSIP_PAUSE).await;
    }
}

/// Whether another node that lives has a part of the slot's keys.
fn half_way(nodes: &Nodes, slot: u16, to: &NodeId) -> Option<NodeId> {
    let lives = |id: &NodeId| nodes.get(id).is_some_and(|n| n.life == Life::Alive && n.primary.is_none());
    nodes.myself.open.iter().find_map(|open| match open {
        Open::Migrating(number, other) if *number == slot && other != to && lives(other) => {
            Some(other.clone())
        }
        Open::Migrating(..) | Open::Importing(..) => None,
    })
}

async fn give(agent: &Agent, road: &mut Option<Road>, slot: u16, order: &Order) -> Result<(), Stopped> {
    let nodes = look(agent, order).await?;
    if !nodes.myself.slots.contains(slot) {
        return if is_gone(&nodes, slot, &order.to) { Ok(()) } else { Err(Stopped::NotServed) };
    }
    if let Some(other) = half_way(&nodes, slot, &order.to) {
        return Err(Stopped::HalfWay(other));
    }
    let (me, to) = (&nodes.myself.id, &order.to);
    let has_replica = nodes.others.iter().any(|n| n.primary.as_ref() == Some(me) && n.life == Life::Alive);
    let Road { own, target, .. } = match road.take().filter(|road| road.is_of(order)) {
        Some(built) => road.insert(built),
        None => road.insert(Road::build(agent, order, &nodes).await?),
    };
    match target.session.set_slot(slot, SlotIs::Importing(me)).await {
        // It says so of a slot that is its own, too.
        Err(Error::Refused(_)) if becomes_gone(agent, slot, order).await? => return Ok(()),
        done => done.at("SETSLOT IMPORTING at the target")?,
    }
    own.set_slot(slot, SlotIs::Migrating(to)).await.at("SETSLOT MIGRATING")?;
    loop {
        may_go_on(agent, order)?;
        let keys = own.keys(slot).await.at("GETKEYSINSLOT")?;
        if keys.is_empty() {
            break;
        }
        own.migrate(&keys, target).await.at("MIGRATE")?;
        // Before the next: a successor that still has what has gone would send it once more, over what clients have written there since.
        if has_replica && !own.is_confirmed().await.at("WAIT")? {
            return Err(Stopped::Unconfirmed);
        }
    }
    // Said once more, because it waits while the server hands its shard over to a replica and is refused afterwards: who is elected just
    // when the target takes the slot may be believed instead of it, and the target would drop the keys.
    own.set_slot(slot, SlotIs::Migrating(to)).await.at("SETSLOT MIGRATING")?;
    let left = own.count(slot).await.at("COUNTKEYSINSLOT")?;
    if left > 0 {
        return Err(Stopped::KeysLeft(left));
    }
    may_go_on(agent, order)?;
    // The target first: the other way round a crash in between would leave the slot without an owner.
    target.session.set_slot(slot, SlotIs::Of(to)).await.at("SETSLOT NODE at the target")?;
    own.set_slot(slot, SlotIs::Of(to)).await.at("SETSLOT NODE")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(slots: &str) -> Order {
        let to = "a".repeat(40).parse().unwrap();
        Order { run_id: "r".to_owned(), to, slots: slots.parse().unwrap() }
    }

    fn next(handing: &Handing) -> Option<u16> {
        handing.next().map(|(slot, _)| slot)
    }

    #[test]
    fn slots_go_from_the_highest_down_and_what_was_told_last_is_what_is_still_to_go() {
        let handing = Handing::default();
        assert_eq!(handing.tell(order("1-3 9")), Ok(Told::Begin));
        assert_eq!((next(&handing), next(&handing)), (Some(9), Some(3)));
        assert_eq!(handing.tell(order("3 5 7")), Ok(Told::GoesOn), "3 is on its way");
        assert_eq!(next(&handing), Some(7));
        assert_eq!(handing.tell(order("7")), Ok(Told::GoesOn), "no word of the others");
        assert_eq!((next(&handing), next(&handing)), (Some(5), None));
        assert_eq!(handing.tell(order("1")), Ok(Told::Begin), "that one is over");
    }

    #[test]
    fn what_is_taken_back_does_not_go_but_for_the_slot_in_hand() {
        let handing = Handing::default();
        assert_eq!(handing.take_back(&"1-3".parse().unwrap()), None);
        assert_eq!(handing.tell(order("1-3")), Ok(Told::Begin));
        assert_eq!(next(&handing), Some(3));
        assert_eq!(handing.take_back(&SlotSet::all()), Some(3));
        assert_eq!(next(&handing), None);
    }

    #[test]
    fn a_failure_is_told_once_and_to_a_request_that_begins_nothing() {
        let handing = Handing::default();
        assert_eq!(handing.tell(order("1-3")), Ok(Told::Begin));
        assert_eq!(next(&handing), Some(3));
        handing.fail("slot 3: MIGRATE: IOERR".to_owned());
        assert_eq!(next(&handing), None);
        assert_eq!(handing.tell(order("1-3")), Err("slot 3: MIGRATE: IOERR".to_owned()));
        assert_eq!(next(&handing), None);
        assert_eq!(handing.tell(order("1-3")), Ok(Told::Begin));
        handing.fail("slot 3: MIGRATE: IOERR".to_owned());
        assert_eq!(handing.take_back(&SlotSet::all()), None);
        assert_eq!(handing.tell(order("5")), Ok(Told::Begin), "what was taken back has no words left");
    }
}

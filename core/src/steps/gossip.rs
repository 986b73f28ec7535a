//! Wants: every node of a Valkey Cluster to know every other where it is now, and every slot to have an owner.
//! Proof: what each member's node says itself (`CLUSTER NODES`), of members that answer in this look.
//! Refuses: to give out slots as for a new cluster once any node owns one or knows another, or while a node is known that is nobody's;
//!   slots of which nobody knows whose they were before the user confirms that they are empty; to forget a node while a member is
//!   silent, while anybody reaches it or replicates it.
//! Story: cluster_create, cluster_addresses_changed, cluster_volume_lost, cluster_shard_lost, cluster_volume_lost_manual.

use crate::{
    decide::{StepOutcome, View},
    decision::{BlockReason, Decision, Reason, Scope, StepName, WaitReason},
    effect::Effect,
    ids::{MemberId, NodeId, ShardId, Timestamp},
    observation::NodeFacts,
    slots::{SLOTS, SlotSet},
    spec::{Topology, Verb},
    state::failure_key,
    steps::{
        reshard::{JOB_QUICK_MS, LOOK_AGAIN_MS},
        retry_at, unless_failing,
    },
    topology,
};
use std::collections::{BTreeMap, BTreeSet};

/// Most nodes that are told of another, or told to forget one, in one decision: a record has 64 KiB, one of these some 150 bytes, and each
/// takes some milliseconds in which nobody looks.
const TOLD_MAX: usize = 64;

/// True if every shard's primary answers, all that answer know each other and every primary sees every slot served: slots can be handed
/// over. A node that is gone owns nothing then.
pub fn is_quiet(view: &View<'_>) -> bool {
    let speakers = speakers(view);
    let answers = |shard: ShardId| {
        topology::serving_primary(view, shard).is_some_and(|primary| speakers.contains_key(&primary))
    };
    view.spec.shard_ids().all(answers) && agree(view, &speakers)
}

/// A member that answers: its address now, and what its node says.
#[derive(Clone, Copy)]
struct Speaker<'a> {
    address: &'a str,
    node: &'a NodeFacts,
}

type Speakers<'a> = BTreeMap<MemberId, Speaker<'a>>;

/// Slots of a new cluster, introductions, farewells, slots without an owner; in this order.
pub fn step(view: &View<'_>) -> StepOutcome {
    match view.spec.topology {
        Topology::Replication => return StepOutcome::Satisfied,
        Topology::Cluster => {}
    }
    let speakers = speakers(view);
    let decision = if speakers.values().all(|s| s.node.knows.is_empty() && s.node.slots.is_empty()) {
        // Slots first: a config epoch can only be set before anybody is met.
        assign(view, &speakers)
    } else {
        introduce(view, &speakers).or_else(|| {
            // Whoever is known and gone may be held for the owner of slots.
            if strangers(&speakers).next().is_some() {
                forget(view, &speakers)
            } else {
                reclaim(view, &speakers)
            }
        })
    };
    match decision.map(|decision| unless_failing(view, decision)) {
        Some(outcome) => outcome,
        None if is_settled(view, &speakers) => StepOutcome::Satisfied,
        None if has_unaccounted(view, &speakers) => {
            StepOutcome::Blocked(BlockReason::SlotsUnaccounted, None, Vec::new())
        }
        None => StepOutcome::Waiting(WaitReason::GossipUnsettled, None, look_again(view)),
    }
}

/// Soon, where the next job waits for it: a source that deletes what it gave answers no look for a moment.
fn look_again(view: &View<'_>) -> Option<Timestamp> {
    let last = view.state.shards.values().filter_map(|shard| shard.handed_at).max()?;
    let by_key = view.state.shards.values().any(|shard| !shard.by_key.is_empty());
    let waited_for = !by_key && !is_quiet(view) && view.now.millis_since(last) < JOB_QUICK_MS;
    waited_for.then(|| view.now.plus_millis(LOOK_AGAIN_MS))
}

fn speakers<'a>(view: &View<'a>) -> Speakers<'a> {
    let speaker = |id: MemberId| {
        view.reading(id)?;
        let member = view.member(id)?;
        member.server().filter(|server| !server.loading)?;
        member.agent()?;
        Some((id, Speaker { address: member.address()?, node: member.node()? }))
    };
    view.state.members.keys().filter_map(|id| speaker(*id)).collect()
}

/// Node ids that are known and of nobody who answers.
fn strangers<'a>(speakers: &'a Speakers<'_>) -> impl Iterator<Item = &'a NodeId> {
    let known = speakers.values().flat_map(|s| s.node.knows.keys());
    known.filter(|id| speakers.values().all(|s| s.node.id != **id))
}

/// True if everyone who answers knows everyone else and nobody else, and every primary sees every slot served.
fn is_settled(view: &View<'_>, speakers: &Speakers<'_>) -> bool {
    agree(view, speakers) && strangers(speakers).next().is_none()
}

/// True if everyone who answers knows everyone else, and every primary sees every slot served.
fn agree(view: &View<'_>, speakers: &Speakers<'_>) -> bool {
    let acquainted = speakers.values().all(|at| speakers.values().all(|other| is_known(at, other)));
    let sees_all = |shard: ShardId| {
        let primary = topology::serving_primary(view, shard).and_then(|id| speakers.get(&id));
        primary.is_none_or(|s| s.node.covered == SLOTS)
    };
    acquainted && view.spec.shard_ids().all(sees_all)
}

/// `at` knows `other` by its id, at its address. Of itself a node may show an address of before; others go by theirs.
fn is_known(at: &Speaker<'_>, other: &Speaker<'_>) -> bool {
    at.node.id == other.node.id || at.node.knows_at(&other.node.id, other.address)
}

/// The slots of a new cluster: one run for each shard, as even as can be.
fn spread(shards: &[ShardId]) -> BTreeMap<ShardId, SlotSet> {
    let count = shards.len().max(1);
    let begin = |at: usize| u16::try_from(usize::from(SLOTS) * at / count).unwrap_or(SLOTS);
    shards.iter().enumerate().map(|(at, shard)| (*shard, (begin(at)..begin(at + 1)).collect())).collect()
}

/// Gives out all slots, once every member answers and every shard has a primary.
fn assign(view: &View<'_>, speakers: &Speakers<'_>) -> Option<Decision> {
    if !view.spec.members().all(|id| speakers.contains_key(&id)) {
        return None;
    }
    let shards: Vec<ShardId> = view.spec.shard_ids().collect();
    let mut decision = Decision::new(StepName::Gossip, Scope::Cluster, Reason::SlotsAssigned);
    for (shard, slots) in spread(&shards) {
        let epoch = Some(u64::from(shard.0) + 1);
        decision.effects.push(add_slots(view, speakers, shard, slots, epoch)?);
    }
    Some(decision)
}

fn add_slots(
    view: &View<'_>,
    speakers: &Speakers<'_>,
    shard: ShardId,
    slots: SlotSet,
    epoch: Option<u64>,
) -> Option<Effect> {
    let primary = topology::serving_primary(view, shard)?;
    let node = speakers.get(&primary)?.node.id.clone();
    Some(Effect::AddSlots { server: topology::server(view, primary)?, node, slots, epoch })
}

/// The one that knows most of the others where they are now, of equals the first, is told of the rest, and every replica of its
/// primary, which it would hear of a second later. Of two that know each other where they were, one is told: gossip tells a new address only of
/// who is held for dead, and who is held for dead stays so for seconds. Gossip does the rest.
fn introduce(view: &View<'_>, speakers: &Speakers<'_>) -> Option<Decision> {
    let knows = |at: &Speaker<'_>| speakers.values().filter(|other| is_known(at, other)).count();
    let best = speakers.iter().max_by_key(|(id, at)| (knows(at), std::cmp::Reverse(**id)));
    let anchor = best.map(|(id, _)| *id)?;
    let mut decision = Decision::new(StepName::Gossip, Scope::Cluster, Reason::NodesMet);
    decision.about = Some(anchor);
    let others = speakers.keys().map(|member| (anchor, *member));
    let primary = |id: MemberId| topology::serving_primary(view, id.shard).map(|primary| (id, primary));
    let replicas = speakers.keys().filter(|id| **id != anchor).filter_map(|id| primary(*id));
    let asked: BTreeSet<(MemberId, MemberId)> =
        others.chain(replicas.filter(|(_, primary)| *primary != anchor)).collect();
    let further = moved(speakers).filter(|(a, b)| !asked.contains(&(*a, *b)) && !asked.contains(&(*b, *a)));
    let pairs = asked.iter().copied().chain(further);
    let meets = pairs.filter_map(|(from, member)| meet(view, speakers, from, member));
    decision.effects.extend(meets.take(TOLD_MAX));
    some(decision)
}

/// Pairs of which one knows the other at another address than it has now; each pair once.
fn moved(speakers: &Speakers<'_>) -> impl Iterator<Item = (MemberId, MemberId)> {
    let knows_of = |a: &MemberId, b: &MemberId| {
        let (at, other) = (speakers.get(a)?, speakers.get(b)?);
        (at.node.knows.contains_key(&other.node.id) && !is_known(at, other)).then_some((*a, *b))
    };
    let pairs = speakers.keys().flat_map(|a| speakers.keys().filter(move |b| *b > a).map(move |b| (a, b)));
    pairs.filter_map(move |(a, b)| knows_of(a, b).or_else(|| knows_of(b, a)))
}

/// Tells one of another, unless it knows it, or a handshake is under way: that is left to end by itself.
fn meet(view: &View<'_>, speakers: &Speakers<'_>, from: MemberId, member: MemberId) -> Option<Effect> {
    let (at, other) = (speakers.get(&from)?, speakers.get(&member)?);
    if is_known(at, other) || at.node.meeting.contains(other.address) {
        return None;
    }
    let (server, address) = (topology::server(view, from)?, other.address.to_owned());
    Some(Effect::Meet { server, member, address }).filter(|effect| is_due(view, effect))
}

/// Node ids that are nobody's: only if every wanted member answers, else it may be the id of one who is silent; and only if nobody
/// reaches it.
fn forget(view: &View<'_>, speakers: &Speakers<'_>) -> Option<Decision> {
    if !view.spec.members().all(|id| speakers.contains_key(&id)) {
        return None;
    }
    let reached =
        speakers.values().flat_map(|s| s.node.knows.keys().filter(|id| !s.node.failed.contains(*id)));
    // A replica does not forget its primary, and nobody votes for the replica of one that he does not know.
    let followed = speakers.values().filter_map(|s| s.node.primary.as_ref());
    let kept: BTreeSet<&NodeId> = reached.chain(followed).collect();
    let gone: BTreeSet<&NodeId> = strangers(speakers).filter(|id| !kept.contains(id)).collect();
    let mut decision = Decision::new(StepName::Gossip, Scope::Cluster, Reason::NodesForgotten);
    // One after the other by everybody: whoever still knows it tells the others again once a minute has passed.
    let known = gone.iter().flat_map(|node| speakers.iter().map(move |(id, at)| (*node, *id, at)));
    let known = known.filter(|(node, _, at)| at.node.knows.contains_key(*node));
    let told = known.filter_map(|(node, id, _)| {
        Some(Effect::Forget { server: topology::server(view, id)?, node: node.clone() })
    });
    decision.effects.extend(told.filter(|effect| is_due(view, effect)).take(TOLD_MAX));
    some(decision)
}

/// Slots that no node of a member serves, if every shard's primary answers: else its owner may only be silent.
fn unowned(view: &View<'_>, speakers: &Speakers<'_>) -> SlotSet {
    let answers = |shard: ShardId| {
        topology::serving_primary(view, shard).is_some_and(|primary| speakers.contains_key(&primary))
    };
    // Slots that are being handed over may be missing where nodes are asked one after the other.
    let misses = |s: &Speaker<'_>| s.node.primary.is_none() && s.node.covered < SLOTS;
    if !view.spec.shard_ids().all(answers) || !speakers.values().any(misses) {
        return SlotSet::default();
    }
    // Primaries by gossip, behind a gate or not: their slots are theirs.
    let owners = speakers.values().filter(|s| s.node.primary.is_none());
    owners.fold(SlotSet::all(), |left, s| left.without(&s.node.slots))
}

/// Whose slots are known of nobody.
fn unrecorded(view: &View<'_>) -> SlotSet {
    view.state.shards.values().fold(SlotSet::all(), |left, shard| left.without(&shard.slots))
}

/// True if slots are nobody's of which nobody knows whose they were: their keys may be on volumes that are not here.
fn has_unaccounted(view: &View<'_>, speakers: &Speakers<'_>) -> bool {
    strangers(speakers).next().is_none() && !unowned(view, speakers).common(&unrecorded(view)).is_empty()
}

/// Gives slots without an owner to the shard that was seen to serve them last; those of which nobody knows that, as for a new cluster, if the
/// user confirms that they are empty.
fn reclaim(view: &View<'_>, speakers: &Speakers<'_>) -> Option<Decision> {
    let unowned = unowned(view, speakers);
    if unowned.is_empty() {
        return None;
    }
    let confirmed = view.spec.confirm_blank.as_ref().filter(|token| view.is_open(Verb::ConfirmBlank, token));
    let free = confirmed.map(|_| unrecorded(view)).unwrap_or_default();
    let shards: Vec<ShardId> = view.spec.shard_ids().collect();
    let mut decision = Decision::new(StepName::Gossip, Scope::Cluster, Reason::SlotsReclaimed);
    for (shard, share) in spread(&shards) {
        let owed = view.shard(shard).slots.with(&share.common(&free)).common(&unowned);
        if owed.is_empty() {
            continue;
        }
        let effect = add_slots(view, speakers, shard, owed, None)?;
        if is_due(view, &effect) {
            decision.effects.push(effect);
        }
    }
    some(decision)
}

fn some(decision: Decision) -> Option<Decision> {
    (!decision.effects.is_empty()).then_some(decision)
}

/// False while the effect has failed lately.
fn is_due(view: &View<'_>, effect: &Effect) -> bool {
    let failed = view.state.failures.get(&failure_key(Scope::Cluster, effect));
    failed.is_none_or(|(count, last)| retry_at(*count, *last) <= view.now)
}

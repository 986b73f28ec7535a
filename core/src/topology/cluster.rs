//! Valkey Cluster: one primary per shard, by `CLUSTER FAILOVER` and `CLUSTER REPLICATE`; nodes are known by their ids. Facts in
//! `docs/CLUSTER.md`.

use super::{
    label, replica_link,
    replication::{HANDOVER_MAX_MS, attach_others, consents},
    server, serving_primary,
};
use crate::{
    decide::View,
    effect::{Effect, Promotion},
    ids::{MemberId, NodeId},
    observation::{NodeFacts, RoleLabel, Source},
    slots::SLOTS,
};

/// Promote, then everything that may fail without harm. Who was primary before is made a replica by its own nodes.
pub fn promote(view: &View<'_>, chosen: MemberId) -> Vec<Effect> {
    let (Some(target), Some(facts), Some(reading), Some(by)) = (
        server(view, chosen),
        view.member(chosen).and_then(|m| m.server()),
        view.reading(chosen),
        promotion(view, chosen),
    ) else {
        return Vec::new();
    };
    let (replid, offset, consents) = (facts.replid.clone(), reading.offset, consents(view, chosen));
    let mut effects = vec![Effect::Promote { server: target, replid, offset, consents, by }];
    effects.extend(label(view, chosen, RoleLabel::Primary));
    effects.extend(attach_others(view, chosen, &[chosen]));
    effects
}

/// How a member's node becomes primary: by its gate alone, by vote, or, where there can be no majority, without.
fn promotion(view: &View<'_>, chosen: MemberId) -> Option<Promotion> {
    let node = node_of(view, chosen)?;
    if node.primary.is_none() {
        return Some(Promotion::Open);
    }
    // No node stands for a primary without slots, whoever asks it to.
    if view.shard(chosen.shard).slots.is_empty() {
        return Some(Promotion::Takeover);
    }
    // Nobody takes over who does not hear those that serve: it may know owners of slots that are none any more.
    let by_vote = is_electable(view, chosen) || is_deaf(view, chosen);
    Some(if by_vote { Promotion::Force } else { Promotion::Takeover })
}

/// True if the member's node hears no majority of the other primaries that serve, as far as there are any.
fn is_deaf(view: &View<'_>, member: MemberId) -> bool {
    let Some(node) = node_of(view, member) else { return false };
    let serves = |id: &MemberId| {
        id.shard != member.shard
            && view.reading(*id).is_some()
            && node_of(view, *id).is_some_and(|by| !by.down)
    };
    let serving: Vec<MemberId> = primaries(view).filter(serves).collect();
    let unheard = |id: &&MemberId| node_of(view, **id).is_some_and(|by| node.failed.contains(&by.id));
    serving.iter().filter(unheard).count() * 2 > serving.len()
}

/// True if a majority of the primaries would vote for the member's node, as far as their words in this look tell.
pub fn is_electable(view: &View<'_>, member: MemberId) -> bool {
    let Some(node) = node_of(view, member) else { return false };
    let votes = |by: &MemberId| {
        // One that refuses its clients has just started and does not vote, or reaches no majority itself. Without slots it has no vote: a shard
        // that began anew gets them back only when all primaries are there.
        let has_vote = |by: &NodeFacts| by.primary.is_none() && !by.slots.is_empty() && !by.down;
        let would = |by: &NodeFacts| has_vote(by) && !by.failed.contains(&node.id);
        view.reading(*by).is_some() && node_of(view, *by).is_some_and(would)
    };
    primaries(view).filter(|by| by.shard != member.shard && votes(by)).count() > voters(view) / 2
}

/// True if a majority of the primaries and the member's node know each other where they are now: nobody votes for whom he does not hear.
/// After a restart at another address that takes gossip up to a second.
pub fn is_heard(view: &View<'_>, candidate: MemberId) -> bool {
    let knows = |a: MemberId, b: MemberId| {
        let address = view.member(b).and_then(|m| m.address());
        let pair = node_of(view, a).zip(node_of(view, b)).zip(address);
        pair.is_some_and(|((node, other), address)| node.knows_at(&other.id, address))
    };
    let hears = |primary: &MemberId| knows(*primary, candidate) && knows(candidate, *primary);
    primaries(view).filter(hears).count() > voters(view) / 2
}

/// True if a majority of the primaries serves and holds the member's node for dead, and that refuses its clients and hears no majority of them.
pub fn is_shut_out(view: &View<'_>, member: MemberId) -> bool {
    let Some(node) = node_of(view, member).filter(|node| node.down && view.reading(member).is_some()) else {
        return false;
    };
    let heard = primaries(view).filter(|id| {
        let other = node_of(view, *id).filter(|_| *id != member);
        other.is_none_or(|other| !node.failed.contains(&other.id))
    });
    let says_so = |by: &MemberId| {
        let other = node_of(view, *by).filter(|by| !by.down);
        view.reading(*by).is_some() && other.is_some_and(|by| by.failed.contains(&node.id))
    };
    let against = primaries(view).filter(|by| *by != member && says_so(by)).count();
    against > voters(view) / 2 && heard.count() <= voters(view) / 2
}

/// How many shards have slots, and so a vote.
fn voters(view: &View<'_>) -> usize {
    view.state.shards.values().filter(|shard| !shard.slots.is_empty()).count()
}

/// The serving primaries of shards that have slots.
fn primaries(view: &View<'_>) -> impl Iterator<Item = MemberId> {
    let owners = view.state.shards.iter().filter(|(_, shard)| !shard.slots.is_empty());
    owners.filter_map(|(id, _)| serving_primary(view, *id))
}

/// `CLUSTER FAILOVER` on the replica; the old primary takes part and follows.
pub fn hand_over(view: &View<'_>, from: MemberId, to: MemberId) -> Vec<Effect> {
    let (Some(old), Some(new), Some(node)) = (server(view, from), server(view, to), node_of(view, from))
    else {
        return Vec::new();
    };
    let mut effects = vec![Effect::Handover {
        from: old,
        to: new,
        timeout_ms: HANDOVER_MAX_MS,
        consents: consents(view, to),
        node: Some(node.id.clone()),
    }];
    effects.extend(label(view, to, RoleLabel::Primary));
    effects.extend(label(view, from, RoleLabel::Replica));
    effects.extend(attach_others(view, to, &[from, to]));
    effects
}

/// `CLUSTER REPLICATE` the primary's node, if the member's agent answers and its node has met that one. At the gate it must own no slot by its own
/// word: Valkey refuses that, and gossip has yet to tell it that they are another's.
pub fn attach(view: &View<'_>, member: MemberId, primary: MemberId) -> Option<Effect> {
    view.member(member)?.agent()?;
    let to: &NodeId = &node_of(view, primary)?.id;
    let node = node_of(view, member)?;
    node.knows.get(to)?;
    let is_gated = matches!(replica_link(view, member), Some((Source::Gate { .. }, _)));
    if is_gated && node.primary.is_none() && !node.slots.is_empty() {
        return None;
    }
    let to_address = view.member(primary)?.address()?.to_owned();
    Some(Effect::Attach { server: server(view, member)?, to: primary, to_address, node: Some(to.clone()) })
}

/// Open, and a replica of the primary's node; its address may still be the one of before.
pub fn follows(view: &View<'_>, member: MemberId, primary: MemberId) -> bool {
    let (Some(node), Some(of)) = (node_of(view, member), node_of(view, primary)) else { return false };
    let open = |source: &Source| matches!(source, Source::Member(_) | Source::Foreign(_));
    replica_link(view, member).is_some_and(|(source, _)| open(&source))
        && node.primary.as_ref() == Some(&of.id)
}

/// A primary in whose view every slot is served, or a replica that its node says is the primary's; neither refuses clients.
pub fn is_settled(view: &View<'_>, member: MemberId, primary: MemberId) -> bool {
    let (Some(node), Some(of)) = (node_of(view, member), node_of(view, primary)) else { return false };
    if member == primary {
        return node.primary.is_none() && node.covered == SLOTS && !node.down;
    }
    !node.down && node.primary.as_ref() == Some(&of.id)
}

fn node_of<'a>(view: &View<'a>, member: MemberId) -> Option<&'a NodeFacts> {
    view.member(member)?.node()
}

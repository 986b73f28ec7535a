//! Members of a Valkey Cluster that answer the operator, but not each other on the cluster bus: in words, for whoever has to find out why.

use crate::{
    config::BUS_PORT,
    ids::{MemberId, NodeId},
    observation::NodeFacts,
    slots::SLOTS,
    spec::Topology,
    state::{ClusterState, MemberState},
};
use std::collections::{BTreeMap, BTreeSet};

/// Most members that are named as those that others have trouble with: one that is cut off is one, and a list of all helps nobody.
const NAMED_MAX: usize = 3;

/// A member that answers: what its node says, and its address.
struct Speaker<'a> {
    node: &'a NodeFacts,
    address: &'a str,
}

type Speakers<'a> = BTreeMap<MemberId, Speaker<'a>>;
/// Each with those that it has trouble with.
type Pairs = BTreeMap<MemberId, BTreeSet<MemberId>>;

/// What is amiss between nodes whose servers answer: who is held for dead, who is not known where it is now, and which primaries do not see
/// every slot served. `None` if nothing is, or if they are no Valkey Cluster.
pub fn trouble(state: &ClusterState) -> Option<String> {
    match state.spec.as_ref()?.topology {
        Topology::Replication => return None,
        Topology::Cluster => {}
    }
    let speakers: Speakers<'_> =
        state.members.iter().filter_map(|(id, member)| Some((*id, speaker(member)?))).collect();
    let dead = pairs(&speakers, |at, id, _| at.failed.contains(id));
    let unmet = pairs(&speakers, |at, id, address| !at.knows_at(id, address));
    let bus = format!("these answer and do not hear each other on the cluster bus, port {BUS_PORT}");
    let told = [
        named(&bus, dead),
        named("these do not know each other where they are now", unmet),
        unserved(&speakers),
    ];
    let told: Vec<String> = told.into_iter().flatten().collect();
    (!told.is_empty()).then(|| told.join("; "))
}

fn speaker(member: &MemberState) -> Option<Speaker<'_>> {
    // One that loads does not talk on the bus meanwhile.
    member.server().filter(|server| !server.loading)?;
    Some(Speaker { node: member.node()?, address: member.address()? })
}

/// Pairs of which one says `trouble` of the other, by either.
fn pairs(speakers: &Speakers<'_>, trouble: impl Fn(&NodeFacts, &NodeId, &str) -> bool) -> Pairs {
    let mut found = Pairs::new();
    for (a, at) in speakers {
        for (b, other) in speakers.iter().filter(|(b, _)| *b != a) {
            if trouble(at.node, &other.node.id, other.address) {
                found.entry(*a).or_default().insert(*b);
                found.entry(*b).or_default().insert(*a);
            }
        }
    }
    found
}

/// The members with the most trouble, each with whom: where one is cut off from five, it is that one and not the five.
fn named(what: &str, mut pairs: Pairs) -> Option<String> {
    let mut told = Vec::new();
    while told.len() < NAMED_MAX {
        let most = pairs.iter().max_by_key(|(id, with)| (with.len(), std::cmp::Reverse(**id)));
        let Some(worst) = most.map(|(id, _)| *id) else { break };
        let with = pairs.remove(&worst).unwrap_or_default();
        for other in &with {
            if let Some(rest) = pairs.get_mut(other) {
                rest.remove(&worst);
            }
        }
        pairs.retain(|_, with| !with.is_empty());
        told.push(format!("{worst} and {}", list(&with)));
    }
    let more = if pairs.is_empty() { "" } else { ", and more" };
    (!told.is_empty()).then(|| format!("{what}: {}{more}", told.join(", ")))
}

fn list(members: &BTreeSet<MemberId>) -> String {
    members.iter().map(MemberId::to_string).collect::<Vec<_>>().join(" ")
}

fn unserved(speakers: &Speakers<'_>) -> Option<String> {
    let misses = |s: &Speaker<'_>| s.node.primary.is_none() && s.node.covered < SLOTS;
    let least = speakers.iter().filter(|(_, s)| misses(s)).min_by_key(|(_, s)| s.node.covered);
    least.map(|(id, s)| format!("{} of {SLOTS} slots served by the view of {id}", s.node.covered))
}

//! What must hold of every journal, whoever wrote it: checked by the simulator after every story, by property tests and by
//! the replay tool.

use crate::{
    decision::{Decision, Reason},
    effect::Effect,
    event::{Event, Record},
    ids::{MemberId, Seq},
    observation::{ExportState, Link, NodeFacts, ObjectKind, ObjectRef, ServerRole, Source},
    slots::SlotSet,
    state::{ClusterState, MemberState, Pending},
};

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The record that breaks it.
    pub seq: Seq,
    /// Which invariant, and how.
    pub text: String,
}

/// Every violation in a stream's records, in order.
pub fn check(records: &[Record]) -> Vec<Violation> {
    check_from(ClusterState::default(), records)
}

/// As [`check`], of a stream whose beginning is `state`: the fold of records that are gone.
pub fn check_from(mut state: ClusterState, records: &[Record]) -> Vec<Violation> {
    let mut found = Vec::new();
    for record in records {
        let mut say = |text: String| found.push(Violation { seq: record.seq, text });
        sequence(&state, record, &mut say);
        match &record.event {
            Event::Decided { decision, evidence: _ } => promotion(&state, decision, &mut say),
            Event::EffectsEnded(executed) => match state.pending.get(&executed.decision) {
                None => say(format!("outcomes of {} which is not pending", executed.decision)),
                Some(p) if p.decision.effects.len() != executed.outcomes.len() => {
                    say(format!(
                        "{} has {} effects and {} outcomes",
                        executed.decision,
                        p.decision.effects.len(),
                        executed.outcomes.len()
                    ));
                }
                Some(_) => {}
            },
            Event::DecisionClosed { decision, how: _ } if !state.pending.contains_key(decision) => {
                say(format!("closes {decision}, which is not pending"));
            }
            Event::DecisionClosed { .. }
            | Event::Baseline { .. }
            | Event::EpochStarted { .. }
            | Event::SpecChanged(_)
            | Event::PodChanged { .. }
            | Event::ServerChanged { .. }
            | Event::AgentChanged { .. }
            | Event::RouteChanged { .. }
            | Event::ObjectChanged { .. }
            | Event::StandingChanged { .. }
            | Event::Trimmed { .. }
            | Event::NodeChanged { .. }
            | Event::SlotsWeighed { .. }
            | Event::LevelRaised { .. } => {}
        }
        state.apply(record);
    }
    found
}

fn sequence(state: &ClusterState, record: &Record, say: &mut impl FnMut(String)) {
    if state.head.0 != 0 && record.seq != state.head.next() {
        say(format!("sequence {} follows {}", record.seq, state.head));
    }
    if record.time < state.head_time {
        say(format!("time goes back from {} to {}", state.head_time, record.time));
    }
    let claims = matches!(record.event, Event::EpochStarted { .. } | Event::Baseline { .. });
    if record.epoch < state.epoch || (record.epoch > state.epoch && !claims) {
        say(format!("epoch {} after {} without a claim", record.epoch, state.epoch));
    }
}

/// Laws 4, 5 and 6 as far as a record shows them: nobody is promoted beside a living primary, and only who has data; and no slot is lost.
fn promotion(state: &ClusterState, decision: &Decision, say: &mut impl FnMut(String)) {
    for effect in &decision.effects {
        match effect {
            Effect::Promote { server, replid: _, offset: _, consents: _, by: _ } => {
                let id = server.member;
                let demoted = |other: MemberId| {
                    let first = decision.effects.iter().take_while(|e| !matches!(e, Effect::Promote { .. }));
                    first
                        .clone()
                        .any(|e| matches!(e, Effect::Attach { server, .. } if server.member == other))
                };
                let beside = |(i, m): &(MemberId, &MemberState)| *i != id && m.is_primary() && !demoted(*i);
                if let Some((other, _)) = state.members_of(id.shard).find(beside) {
                    say(format!("promotes {id} while {other} is seen to be primary"));
                }
                let begins = matches!(decision.reason, Reason::Bootstrap | Reason::DataLost);
                if let Some(why) = unfit(state, id).filter(|_| !begins) {
                    say(format!("promotes {id}, which {why}"));
                }
                if decision.grant != Some(id) {
                    say(format!("promotes {id} without granting it the shard"));
                }
            }
            Effect::Handover { from, to, timeout_ms: _, consents: _, node: _ } => {
                if !state.members.get(&from.member).is_some_and(|m| m.is_primary()) {
                    say(format!("hands over from {}, which is not seen to be primary", from.member));
                }
                if let Some(why) = unfit(state, to.member) {
                    say(format!("hands over to {}, which {why}", to.member));
                }
                let beside = |p: &&Pending| p.epoch == state.epoch && p.decision.elects();
                if decision.successor_of_a_node().is_some() && state.pending.values().any(|p| beside(&p)) {
                    say(format!("hands over to {} beside another election", to.member));
                }
            }
            Effect::Route { shard, to, .. } => {
                let holder = state.shards.get(shard).and_then(|s| s.holder()).map(|(id, _)| id);
                if decision.grant.or(holder) != Some(*to) {
                    say(format!("routes shard {shard} to {to}, which holds no grant"));
                }
            }
            Effect::Unroute { shard, .. } => {
                let pod_stays = |m: &MemberState| m.facts.pod.present().is_some_and(|pod| !pod.deleting);
                let stays = |m: &MemberState| pod_stays(m) && m.server().is_some();
                if let Some((id, _)) = state.members_of(*shard).find(|(_, m)| stays(m)) {
                    say(format!("routes shard {shard} to nobody, and {id} stays"));
                }
            }
            // What is open is closed where it is.
            Effect::MigrateSlots { server, to, .. } if server.member == *to => {}
            Effect::MigrateSlots { server, slots, to, node: _, keys: _, by: _ } => {
                handed_over(state, server.member, *to, slots, say);
            }
            Effect::Delete { object, uid: _ } => deleted(state, object, say),
            Effect::Attach { .. }
            | Effect::Promise { .. }
            | Effect::Brief { .. }
            | Effect::Fence { .. }
            | Effect::Label { .. }
            | Effect::Configure { .. }
            | Effect::Disconnect { .. }
            | Effect::DeletePod { .. }
            | Effect::Apply { .. }
            | Effect::Meet { .. }
            | Effect::AddSlots { .. }
            | Effect::Forget { .. }
            | Effect::ReleaseFinalizer => {}
        }
    }
}

/// A shard gives what it owns, to another that is there, one job at a time.
fn handed_over(
    state: &ClusterState,
    from: MemberId,
    to: MemberId,
    slots: &SlotSet,
    say: &mut impl FnMut(String),
) {
    let node = |id: MemberId| state.members.get(&id).and_then(|m| m.node());
    if !slots.without(&node(from).map(|n| n.slots.clone()).unwrap_or_default()).is_empty() {
        say(format!("hands over slots that {from} does not serve"));
    }
    if from.shard == to.shard || !state.members.get(&to).is_some_and(|m| m.is_primary()) {
        say(format!("hands slots over from {from} to {to}, which cannot get them"));
    }
    let running = |n: &NodeFacts| n.exports.iter().any(|e| e.state == ExportState::Running);
    if node(from).is_some_and(running) {
        say(format!("{from} is handing slots over already"));
    }
}

/// Nothing is deleted of a shard that owns a slot, but the Service of a member that is not wanted.
fn deleted(state: &ClusterState, object: &ObjectRef, say: &mut impl FnMut(String)) {
    let facts = state.objects.get(object);
    if !facts.is_some_and(|facts| facts.surplus) {
        say(format!("deletes {object}, which is wanted"));
    }
    if object.kind == ObjectKind::Service {
        return;
    }
    let owned = facts.and_then(|f| f.shard).and_then(|id| state.shards.get(&id));
    if owned.is_some_and(|shard| !shard.slots.is_empty()) {
        say(format!("deletes {object} of a shard that owns slots"));
    }
    let node = facts.and_then(|f| f.shard).and_then(|id| state.holder_node(id));
    if node.is_some_and(|node| !node.importing.is_empty()) {
        say(format!("deletes {object} of a shard that has a part of a slot's keys"));
    }
}

fn unfit(state: &ClusterState, id: MemberId) -> Option<&'static str> {
    let Some(server) = state.members.get(&id).and_then(|m| m.server()) else {
        return Some("does not answer");
    };
    match &server.role {
        _ if server.loading => Some("is loading"),
        ServerRole::Replica { source: Source::Gate { had_history: false }, link: _ } => Some("is blank"),
        ServerRole::Replica { source: _, link: Link::Syncing } => Some("is in a full synchronisation"),
        ServerRole::Replica { source: _, link: Link::Up | Link::Down } => None,
        ServerRole::Primary => Some("is primary already"),
    }
}

//! A turn: all of a driver's pass that is not I/O. Observations, closing of in-doubt decisions and new decisions come
//! out as one batch, to be durable before anything is executed: by one append, unless it is too large for one. Cannot fail.

use crate::{
    decide::decide,
    decision::{Decision, Scope, Verdict, WaitReason},
    event::{CloseReason, Event, Record},
    ids::{Seq, Timestamp},
    observation::{MemberFacts, Observed, Seen, SpecFact},
    state::ClusterState,
};
use std::borrow::Cow;

/// What a turn brings forth.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    /// The time of the turn: to be given to the append.
    pub now: Timestamp,
    /// To be appended. Empty if nothing changed: a steady cluster records nothing.
    pub events: Vec<Event>,
    /// When to look again even if nothing wakes the driver.
    pub wake_at: Option<Timestamp>,
}

/// One turn: `state` is the fold of everything recorded, `seen` a fresh look, `now` the clock, raised
/// above the head's time if it lags behind: every turn has its own time.
pub fn turn(state: &ClusterState, seen: &Seen, now: Timestamp) -> Turn {
    let mut batch = Batch {
        now: now.max(Timestamp(state.head_time.0 + 1)),
        state: Cow::Borrowed(state),
        events: Vec::new(),
    };
    for event in changed(state, seen) {
        batch.push(event);
    }
    let Verdict { mut decisions, standing, wake_at } = decide(&batch.state, &seen.evidence, batch.now);
    for (seq, how) in settle_doubts(&batch.state, &mut decisions, &standing.waits) {
        batch.push(Event::DecisionClosed { decision: seq, how });
    }
    for decision in decisions {
        batch.push(Event::Decided { decision: Box::new(decision), evidence: seen.evidence.clone() });
    }
    if standing != batch.state.standing {
        batch.push(Event::StandingChanged { standing, evidence: seen.evidence.clone() });
    }
    Turn { now: batch.now, events: batch.events, wake_at }
}

struct Batch<'a> {
    now: Timestamp,
    /// Most turns change nothing.
    state: Cow<'a, ClusterState>,
    events: Vec<Event>,
}

impl Batch<'_> {
    /// Adds an event and folds it, exactly as reading it back from the journal would.
    fn push(&mut self, event: Event) {
        let record = Record { seq: self.state.head.next(), epoch: self.state.epoch, time: self.now, event };
        self.state.to_mut().apply(&record);
        self.events.push(record.event);
    }
}

/// The facts of a look that differ from what is known, and the outcomes it brings, as events.
pub fn changed(state: &ClusterState, seen: &Seen) -> Vec<Event> {
    let Seen { spec, members, routes, objects, weights, evidence: _, executed } = seen;
    let mut events: Vec<Event> = executed.iter().cloned().map(Event::EffectsEnded).collect();
    events.extend(spec.iter().filter(|s| spec_differs(state, s)).cloned().map(Event::SpecChanged));
    let (unseen, unrouted) = (MemberFacts::default(), Observed::default());
    for (id, facts) in members {
        let known = state.members.get(id).map_or(&unseen, |member| &member.facts);
        if known.pod != facts.pod {
            events.push(Event::PodChanged { member: *id, pod: facts.pod.clone() });
        }
        if known.server != facts.server {
            events.push(Event::ServerChanged { member: *id, server: facts.server.clone() });
        }
        if known.agent != facts.agent {
            events.push(Event::AgentChanged { member: *id, agent: facts.agent.clone() });
        }
        if let Some(node) = facts.node.as_ref().filter(|node| known.node.as_ref() != Some(*node)) {
            events.push(Event::NodeChanged { member: *id, node: node.clone() });
        }
    }
    for (member, weights) in weights {
        events.push(Event::SlotsWeighed { member: *member, weights: weights.clone() });
    }
    for (shard, route) in routes {
        let known = state.shards.get(shard).map_or(&unrouted, |shard| &shard.route);
        if known != route {
            events.push(Event::RouteChanged { shard: *shard, route: route.clone() });
        }
    }
    for (object, facts) in objects {
        if state.objects.get(object) != Some(facts) {
            events.push(Event::ObjectChanged { object: object.clone(), facts: facts.clone() });
        }
    }
    events
}

fn spec_differs(state: &ClusterState, seen: &SpecFact) -> bool {
    if !state.spec_seen {
        return true;
    }
    match seen {
        SpecFact::Valid(spec) => state.spec_error.is_some() || state.spec.as_ref() != Some(spec),
        SpecFact::Invalid(why) => state.spec_error.as_ref() != Some(why),
        SpecFact::Deleting => !state.deleting,
    }
}

/// Decisions recorded in an earlier epoch whose outcome nobody knows: the fresh look decides. If it asks for the very
/// same effects, they are issued again under the same ids; otherwise the old decision is superseded. Until the scope has
/// been looked at, it stays open.
fn settle_doubts(
    state: &ClusterState,
    decisions: &mut [Decision],
    waits: &[crate::decision::Wait],
) -> Vec<(Seq, CloseReason)> {
    let unseen = |scope: Scope| {
        waits
            .iter()
            .any(|w| w.reason == WaitReason::NotObserved && (w.scope == scope || w.scope == Scope::Cluster))
    };
    let in_doubt = state.pending.iter().filter(|(_, p)| p.epoch < state.epoch && !unseen(p.decision.scope));
    let mut closed = Vec::new();
    for (seq, pending) in in_doubt {
        let same = decisions
            .iter_mut()
            .find(|d| d.scope == pending.decision.scope && d.effects == pending.decision.effects);
        match same {
            Some(decision) => {
                decision.reissue_of = Some(pending.decision.reissue_of.unwrap_or(*seq));
                closed.push((*seq, CloseReason::Reissued));
            }
            None => closed.push((*seq, CloseReason::Superseded)),
        }
    }
    closed
}

//! `why OBJ|MEMBER|SHARD`: which decisions made something what it is, newest last, with reasons and outcomes.

use crate::{
    Error,
    history::{Gone, History},
    line::{self, Joined},
    report::{Finding, Report},
    table::Table,
};
use serde::Serialize;
use std::{fmt::Write, str::FromStr};
use valkeeper_core::{
    decision::{Decision, Scope},
    effect::Effect,
    event::{Event, Record},
    ids::{MemberId, ShardId},
    observation::ObjectRef,
    state::ClusterState,
};

/// What is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A member: `0-1`.
    Member(MemberId),
    /// An owned object: `StatefulSet/orders-0`.
    Object(ObjectRef),
    /// A shard, its primary and route: `shard/0`.
    Shard(ShardId),
}

/// A text that is no [`Subject`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a member (0-1), a shard (shard/0) or an object (StatefulSet/orders-0), not {0:?}")]
pub struct NotASubject(String);

impl FromStr for Subject {
    type Err = NotASubject;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(shard) = text.strip_prefix("shard/").and_then(|n| n.parse().ok()) {
            return Ok(Subject::Shard(ShardId(shard)));
        }
        if let Ok(member) = text.parse() {
            return Ok(Subject::Member(member));
        }
        ObjectRef::try_from(text.to_owned()).map(Subject::Object).map_err(|_| NotASubject(text.to_owned()))
    }
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Subject::Member(member) => write!(f, "{member}"),
            Subject::Object(object) => write!(f, "{object}"),
            Subject::Shard(shard) => write!(f, "shard {shard}"),
        }
    }
}

/// A record that bears on the subject.
#[derive(Clone, Debug, Serialize)]
pub struct Cause {
    /// Its sequence.
    pub seq: u64,
    /// RFC 3339, UTC.
    pub time: String,
    /// What it says.
    pub text: String,
    /// For a decision: code and meaning of its reason.
    pub reason: Option<(&'static str, &'static str)>,
    /// For a decision: what became of it, if it had effects.
    pub outcome: Option<String>,
}

/// The answer of `why`.
#[derive(Clone, Debug, Serialize)]
pub struct Causes {
    /// What was asked about.
    pub subject: String,
    /// What is known of it at the end of the stream.
    pub now: String,
    /// What waits for it or is blocked by it at the end of the stream.
    pub standing: Vec<String>,
    /// Records that are gone, and may have been about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gone: Option<Gone>,
    /// Decisions about it, each with the last fact seen before it, in order.
    pub causes: Vec<Cause>,
}

/// Finds the decisions about a subject and the facts that they followed from. Errors: [`Error::NeverSeen`].
pub fn why(history: &History, subject: &Subject) -> Result<Causes, Error> {
    let joined = Joined::new(history);
    let mut causes: Vec<Cause> = Vec::new();
    let mut last_fact: Option<&Record> = None;
    for record in history.records() {
        if is_fact_about(record, subject) {
            last_fact = Some(record);
        }
        let Some(decision) = line::decided(record).filter(|d| concerns(d, subject)) else { continue };
        causes.extend(last_fact.take().map(|fact| cause(fact, None, None)));
        let outcome = joined.end(record.seq).map(|r| joined.text(r));
        let reason = (decision.reason.code(), decision.reason.explain());
        causes.push(cause(record, Some(reason), outcome));
    }
    // What changed after the last decision was not decided here; it explains what is to be seen now.
    causes.extend(last_fact.map(|fact| cause(fact, None, None)));
    let state = history.end();
    let gone = history.gone().filter(|_| is_known(&state, subject)).cloned();
    if causes.is_empty() && gone.is_none() {
        return Err(Error::NeverSeen { subject: subject.to_string() });
    }
    Ok(Causes {
        subject: subject.to_string(),
        now: now(&state, subject),
        standing: standing(&state, subject),
        gone,
        causes,
    })
}

fn cause(record: &Record, reason: Option<(&'static str, &'static str)>, outcome: Option<String>) -> Cause {
    Cause { seq: record.seq.0, time: record.time.to_string(), text: line::text(record), reason, outcome }
}

fn is_fact_about(record: &Record, subject: &Subject) -> bool {
    match (&record.event, subject) {
        (
            Event::PodChanged { member, pod: _ }
            | Event::ServerChanged { member, server: _ }
            | Event::AgentChanged { member, agent: _ }
            | Event::NodeChanged { member, node: _ }
            | Event::SlotsWeighed { member, weights: _ },
            Subject::Member(wanted),
        ) => member == wanted,
        (Event::RouteChanged { shard, route: _ }, Subject::Shard(wanted)) => shard == wanted,
        (Event::ServerChanged { member, server: _ }, Subject::Shard(wanted)) => member.shard == *wanted,
        (Event::ObjectChanged { object, facts: _ }, Subject::Object(wanted)) => object == wanted,
        (
            Event::Baseline { .. }
            | Event::EpochStarted { .. }
            | Event::SpecChanged(_)
            | Event::PodChanged { .. }
            | Event::ServerChanged { .. }
            | Event::AgentChanged { .. }
            | Event::NodeChanged { .. }
            | Event::SlotsWeighed { .. }
            | Event::RouteChanged { .. }
            | Event::ObjectChanged { .. }
            | Event::Decided { .. }
            | Event::EffectsEnded(_)
            | Event::DecisionClosed { .. }
            | Event::StandingChanged { .. }
            | Event::Trimmed { .. }
            | Event::LevelRaised { .. },
            _,
        ) => false,
    }
}

/// True if a decision is about the subject, gives it something or does something to it.
fn concerns(decision: &Decision, subject: &Subject) -> bool {
    match subject {
        Subject::Member(member) => {
            decision.about == Some(*member)
                || decision.grant == Some(*member)
                || decision.candidates.iter().any(|c| c.member == *member)
                || decision.discards.iter().any(|d| d.member == *member)
                || decision.effects.iter().any(|e| touches(e, *member))
        }
        Subject::Shard(shard) => {
            decision.scope == Scope::Shard(*shard)
                || decision.effects.iter().any(|effect| moves_slots_of(effect, *shard))
        }
        Subject::Object(object) => decision
            .effects
            .iter()
            .any(|e| matches!(e, Effect::Apply { object: o, .. } | Effect::Delete { object: o, .. } if o == object)),
    }
}

fn moves_slots_of(effect: &Effect, shard: ShardId) -> bool {
    match effect {
        Effect::AddSlots { server, .. } => server.member.shard == shard,
        Effect::MigrateSlots { server, to, .. } => server.member.shard == shard || to.shard == shard,
        Effect::Promote { .. }
        | Effect::Promise { .. }
        | Effect::Brief { .. }
        | Effect::Fence { .. }
        | Effect::Attach { .. }
        | Effect::Handover { .. }
        | Effect::Meet { .. }
        | Effect::Forget { .. }
        | Effect::Route { .. }
        | Effect::Unroute { .. }
        | Effect::Label { .. }
        | Effect::Configure { .. }
        | Effect::Disconnect { .. }
        | Effect::DeletePod { .. }
        | Effect::Apply { .. }
        | Effect::Delete { .. }
        | Effect::ReleaseFinalizer => false,
    }
}

fn touches(effect: &Effect, member: MemberId) -> bool {
    match effect {
        Effect::Promote { server, .. }
        | Effect::Configure { server, .. }
        | Effect::Disconnect { server }
        | Effect::Fence { server }
        | Effect::AddSlots { server, .. }
        | Effect::Forget { server, .. } => server.member == member,
        Effect::Meet { server, member: met, .. } => server.member == member || *met == member,
        Effect::Brief { member: of, .. } => *of == member,
        Effect::Promise { member: of, candidate, .. } => *of == member || *candidate == member,
        Effect::Attach { server, to, .. } | Effect::MigrateSlots { server, to, .. } => {
            server.member == member || *to == member
        }
        Effect::Handover { from, to, .. } => from.member == member || to.member == member,
        Effect::Route { to, .. } => *to == member,
        Effect::Label { member: of, .. } | Effect::DeletePod { member: of, .. } => *of == member,
        Effect::Unroute { .. } | Effect::Apply { .. } | Effect::Delete { .. } | Effect::ReleaseFinalizer => {
            false
        }
    }
}

fn is_known(state: &ClusterState, subject: &Subject) -> bool {
    match subject {
        Subject::Member(member) => state.members.contains_key(member),
        Subject::Shard(shard) => state.shards.contains_key(shard),
        Subject::Object(object) => state.objects.contains_key(object),
    }
}

fn now(state: &ClusterState, subject: &Subject) -> String {
    match subject {
        Subject::Member(member) => {
            let holder = state.shards.get(&member.shard).and_then(|s| s.holder());
            let grant = match holder {
                Some((id, number)) if id == *member => {
                    format!("holds grant {number} of shard {}", member.shard)
                }
                Some((id, number)) => format!("grant {number} of shard {} is held by {id}", member.shard),
                None => format!("nobody holds a grant of shard {}", member.shard),
            };
            let known = state.members.get(member).cloned().unwrap_or_default();
            let node = known.node().map(|node| format!("; {}", line::node(*member, node)));
            format!("{}; {grant}{}", line::server(*member, &known.facts.server), node.unwrap_or_default())
        }
        Subject::Shard(shard) => {
            let known = state.shards.get(shard).cloned().unwrap_or_default();
            let holder = known.holder().map(|(member, number)| format!("{member} holds grant {number}"));
            let holder = holder.unwrap_or_else(|| "nobody holds a grant".to_owned());
            // A Valkey Cluster has no route: clients find the owner of a slot themselves.
            let reached = match known.slots.len() {
                0 => line::route(*shard, &known.route),
                _ => format!("shard {shard} has the slots {}", known.slots),
            };
            format!("{holder}; {reached}")
        }
        Subject::Object(object) => {
            let facts = state.objects.get(object).map(line::object_facts);
            facts.unwrap_or_else(|| "not looked at".to_owned())
        }
    }
}

fn standing(state: &ClusterState, subject: &Subject) -> Vec<String> {
    let concerns = |scope: Scope, about: Option<MemberId>| match subject {
        Subject::Member(member) => {
            about == Some(*member) || (about.is_none() && scope == Scope::Shard(member.shard))
        }
        Subject::Shard(shard) => scope == Scope::Shard(*shard),
        Subject::Object(_) => scope == Scope::Cluster,
    };
    let blocks = state.standing.blocks.iter().filter(|b| concerns(b.scope, b.about)).map(line::block);
    blocks.chain(state.standing.waits.iter().filter(|w| concerns(w.scope, w.about)).map(line::wait)).collect()
}

impl Report for Causes {
    fn text(&self) -> String {
        let Causes { subject: _, now, standing, gone, causes } = self;
        let mut text = format!("now: {now}\n");
        for line in standing {
            let _ = writeln!(text, "     {line}");
        }
        if let Some(gone) = gone {
            let _ = writeln!(text, "     {gone}");
        }
        text.push('\n');
        for Cause { seq, time, text: what, reason, outcome } in causes {
            let _ = writeln!(text, "{time}  [j:{seq}]  {what}");
            if let Some((_, meaning)) = reason {
                let _ = writeln!(text, "    because: {meaning}");
            }
            if let Some(outcome) = outcome {
                let _ = writeln!(text, "    outcome {outcome}");
            }
        }
        text
    }

    fn csv(&self) -> Option<String> {
        let mut table = Table::new(["seq", "time", "reason", "text", "outcome"]);
        for Cause { seq, time, text, reason, outcome } in &self.causes {
            let code = reason.map(|(code, _)| code).unwrap_or_default();
            let outcome = outcome.clone().unwrap_or_default();
            table.push([seq.to_string(), time.clone(), code.to_owned(), text.clone(), outcome]);
        }
        Some(table.csv())
    }

    fn finding(&self) -> Finding {
        Finding::Clean
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::story;

    fn seqs(subject: &str) -> Vec<u64> {
        let causes = why(&story::failover().into(), &subject.parse().unwrap()).unwrap().causes;
        causes.iter().map(|c| c.seq).collect()
    }

    #[test]
    fn a_member_is_explained_by_its_facts_and_the_decisions_about_it() {
        assert_eq!(seqs("0-0"), [7, 11, 12, 13, 19, 20]);
        let text = why(&story::failover().into(), &"0-0".parse().unwrap()).unwrap().text();
        assert!(text.starts_with(
            "now: 0-0 at the gate, history aaaaaaaa (run run-9, 9.0.0); grant 13 of shard 0 is held by 0-1\n"
        ));
        assert!(text.contains("     Membership waits: ReplicaSyncing (0-0)\n"), "{text}");
        assert!(text.contains("    outcome of 20: attach 0-0 to 0-1 failed: timed out\n"), "{text}");
        assert!(text.contains("    because: The primary's process is proven gone"), "{text}");
    }

    #[test]
    fn a_shard_is_explained_by_every_decision_of_its_scope() {
        let causes = why(&story::failover().into(), &"shard/0".parse().unwrap()).unwrap();
        let decided: Vec<u64> = causes.causes.iter().filter(|c| c.reason.is_some()).map(|c| c.seq).collect();
        assert_eq!(decided, [11, 13, 18, 20]);
        assert!(causes.now.starts_with("0-1 holds grant 13; shard 0 route to 10.0.0.2"), "{}", causes.now);
    }

    #[test]
    fn slots_and_introductions_explain_a_member_and_its_shard() {
        let asked = |subject: &str| why(&story::clustered().0.into(), &subject.parse().unwrap()).unwrap();
        let seqs = |causes: Causes| causes.causes.iter().map(|c| c.seq).collect::<Vec<_>>();
        let now = asked("0-0").now;
        assert!(now.contains("; holds grant 11 of shard 0; 0-0 node aaaaaaaa primary, epoch 3, "), "{now}");
        assert_eq!(seqs(asked("0-0")), [7, 11, 12, 13]);
        assert_eq!(seqs(asked("0-2")).last(), Some(&13), "it was introduced");
        assert_eq!(seqs(asked("shard/0")).last(), Some(&13), "it was given slots");
        assert!(asked("shard/0").now.ends_with("; shard 0 has the slots 0-5460"), "{}", asked("shard/0").now);
        assert!(!seqs(asked("0-1")).contains(&13));
    }

    #[test]
    fn an_object_is_explained_by_what_was_seen_and_applied() {
        use valkeeper_core::{
            decision::{Reason, StepName},
            ids::Digest,
            observation::{ObjectFacts, Observed},
        };
        let mut book = story::adopted();
        let object = ObjectRef::try_from("Service/orders".to_owned()).unwrap();
        let facts = ObjectFacts {
            wanted: Digest("d1".into()),
            wanted_revision: None,
            shard: None,
            vital: false,
            surplus: false,
            live: Observed::Absent,
        };
        book.add(20, Event::ObjectChanged { object: object.clone(), facts });
        let mut applies = Decision::new(StepName::Objects, Scope::Cluster, Reason::ObjectApplied);
        applies.effects = vec![Effect::Apply { object: object.clone(), digest: Digest("d1".into()) }];
        book.add(20, story::decided(applies, story::readings(20, &[])));
        let causes = why(&book.0.into(), &Subject::Object(object)).unwrap();
        assert_eq!(causes.now, "missing (wanted d1)");
        assert_eq!(causes.causes.iter().map(|c| c.seq).collect::<Vec<_>>(), [12, 13]);
    }

    #[test]
    fn what_was_never_seen_is_said_so_and_nonsense_is_refused() {
        let error = why(&story::failover().into(), &"3-0".parse().unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "nothing in this stream is about 3-0");
        assert!("Deployment/orders".parse::<Subject>().is_err());
        assert!("shard/x".parse::<Subject>().is_err());
    }
}

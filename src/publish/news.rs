//! Kubernetes Events: what is told of a record, given the state before it.

use crate::k8s::events::{News, Severity};
use valkeeper_core::{
    decision::{Block, Decision, Reason, Standing},
    effect::Outcome,
    event::{Event, Record},
    ids::Seq,
    projection::status,
    state::ClusterState,
};

/// What is to be told of a record, given the state before it.
pub fn news(before: &ClusterState, record: &Record) -> Vec<News> {
    match &record.event {
        Event::Decided { decision, evidence: _ } => vec![decided(decision, record.seq)],
        Event::EffectsEnded(executed) => before
            .pending
            .get(&executed.decision)
            .map(|pending| unverified(&pending.decision, &executed.outcomes, record.seq))
            .unwrap_or_default(),
        Event::StandingChanged { standing, evidence: _ } => blocked(before, standing, record.seq),
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
        | Event::DecisionClosed { .. }
        | Event::Trimmed { .. }
        | Event::LevelRaised { .. } => Vec::new(),
    }
}

fn decided(decision: &Decision, seq: Seq) -> News {
    let effects: Vec<String> = decision.effects.iter().map(ToString::to_string).collect();
    let about = decision.about.map(|m| format!(" ({m})")).unwrap_or_default();
    let todo = if effects.is_empty() { String::new() } else { format!(": {}", effects.join("; ")) };
    let lost: Vec<String> = decision
        .discards
        .iter()
        .map(|d| {
            format!(
                "; discards what only {} has after {} at offset {}",
                d.member,
                d.replid,
                d.kept_offset.unwrap_or(0)
            )
        })
        .collect();
    let loses = !decision.discards.is_empty() || decision.reason == Reason::DataLost;
    News {
        severity: if loses { Severity::Warning } else { Severity::Normal },
        reason: decision.reason.code(),
        action: format!("{:?}", decision.step),
        note: format!("{}{about}{todo}{}", decision.scope, lost.concat()),
        seq,
        index: 0,
    }
}

fn unverified(
    decision: &Decision,
    outcomes: &[(valkeeper_core::ids::Timestamp, Outcome)],
    seq: Seq,
) -> Vec<News> {
    let ended = decision.effects.iter().zip(outcomes).enumerate();
    ended
        .filter_map(|(index, (effect, (_, outcome)))| match outcome {
            Outcome::Failed(_) | Outcome::Refused(_) | Outcome::Futile(_) | Outcome::Superseded(_) => {
                Some(News {
                    severity: Severity::Warning,
                    reason: decision.reason.code(),
                    action: effect.verb().to_owned(),
                    note: format!("{effect}: {outcome}"),
                    seq,
                    index,
                })
            }
            Outcome::Verified | Outcome::Skipped => None,
        })
        .collect()
}

fn blocked(before: &ClusterState, now: &Standing, seq: Seq) -> Vec<News> {
    let is_new = |block: &&Block| {
        !before.standing.blocks.iter().any(|b| (b.scope, b.reason) == (block.scope, block.reason))
    };
    let news = now.blocks.iter().filter(is_new).enumerate();
    news.map(|(index, block)| News {
        severity: Severity::Warning,
        reason: block.reason.code(),
        action: format!("{:?}", block.step),
        note: status::blocked(before, block),
        seq,
        index,
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_core::{
        decision::{BlockReason, Scope, StepName},
        effect::Effect,
        ids::{ShardId, Timestamp, WriterEpoch},
        observation::{Evidence, Executed},
        state::Pending,
    };

    #[test]
    fn outcomes_that_are_as_wanted_are_no_news() {
        let mut decision = Decision::new(StepName::Routing, Scope::Shard(ShardId(0)), Reason::RouteMoved);
        decision.effects = vec![Effect::ReleaseFinalizer, Effect::ReleaseFinalizer, Effect::ReleaseFinalizer];
        let mut before = ClusterState::default();
        before.pending.insert(Seq(4), Pending { decision, epoch: WriterEpoch(1) });
        let outcomes = [Outcome::Verified, Outcome::Failed("no".into()), Outcome::Skipped];
        let ended = outcomes.into_iter().map(|o| (Timestamp(0), o)).collect();
        let event = Event::EffectsEnded(Executed { decision: Seq(4), outcomes: ended });
        let record = Record { seq: Seq(5), epoch: WriterEpoch(1), time: Timestamp(0), event };
        let told = news(&before, &record);
        assert_eq!(told.len(), 1);
        assert_eq!(
            (told[0].severity, told[0].reason, told[0].seq),
            (Severity::Warning, "RouteMoved", Seq(5))
        );
    }

    #[test]
    fn a_block_is_told_once() {
        let block = Block {
            step: StepName::Failover,
            scope: Scope::Shard(ShardId(0)),
            reason: BlockReason::NothingFenced,
            about: None,
            candidates: Vec::new(),
        };
        let standing = Standing { waits: Vec::new(), blocks: vec![block] };
        let event = Event::StandingChanged { standing: standing.clone(), evidence: Evidence::default() };
        let record = Record { seq: Seq(9), epoch: WriterEpoch(1), time: Timestamp(0), event };
        let mut state = ClusterState::default();
        assert_eq!(news(&state, &record).len(), 1);
        state.standing = standing;
        assert_eq!(news(&state, &record), []);
    }
}

//! The policy: which rule runs when. `decide` is pure and total; replay runs it again over recorded state and evidence.

use crate::{
    decision::{Block, BlockReason, Candidate, Decision, Scope, StepName, Verdict, Wait, WaitReason},
    ids::{MemberId, ShardId, Timestamp},
    observation::{Evidence, Reading},
    spec::{DesiredCluster, Verb},
    state::{ClusterState, MemberState, ShardState},
    steps, topology,
};
use std::sync::LazyLock;

/// What a step finds for its scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StepOutcome {
    /// Nothing to do.
    Satisfied,
    /// Something will come by itself; look again at the given time at the latest.
    Waiting(WaitReason, Option<MemberId>, Option<Timestamp>),
    /// Someone or something must change the situation.
    Blocked(BlockReason, Option<MemberId>, Vec<Candidate>),
    /// Something is to be done.
    Decided(Box<Decision>),
}

/// What steps look at: state, evidence, the clock and the valid spec.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// Everything known.
    pub state: &'a ClusterState,
    /// Readings of this look.
    pub evidence: &'a Evidence,
    /// Now.
    pub now: Timestamp,
    /// The spec in force, with every shard that has to be there: one that is not wanted any more stays until it has given its slots.
    pub spec: &'a DesiredCluster,
    /// What the rules before this one have decided in this turn, as far as a rule for the whole cluster looks at it.
    pub decided: &'a [Decision],
}

/// A reading older than this says nothing about who is ahead: at 1 GB/s of writes it would be off by 1 GB, but the
/// survey that precedes a promotion takes readings in under a second or not at all. Milliseconds.
pub const READING_AGE_MAX_MS: i64 = 1_000;

impl<'a> View<'a> {
    /// A member's state, if anything is known of it.
    pub fn member(&self, id: MemberId) -> Option<&'a MemberState> {
        self.state.members.get(&id)
    }

    /// A shard's state; nothing known is the empty state.
    pub fn shard(&self, id: ShardId) -> &'a ShardState {
        static UNKNOWN: LazyLock<ShardState> = LazyLock::new(ShardState::default);
        self.state.shards.get(&id).unwrap_or(&UNKNOWN)
    }

    /// A reading that is fresh enough to be compared.
    pub fn reading(&self, id: MemberId) -> Option<&'a Reading> {
        self.evidence.readings.get(&id).filter(|r| self.now.millis_since(r.taken_at) <= READING_AGE_MAX_MS)
    }

    /// True if the user's word has not been served yet.
    pub fn is_open(&self, verb: Verb, word: &str) -> bool {
        !self.state.is_spent(verb, word)
    }

    /// The members that shall exist in a shard, in order.
    pub fn wanted(&self, shard: ShardId) -> impl Iterator<Item = MemberId> + use<'_> {
        self.spec.members().filter(move |m| m.shard == shard)
    }
}

enum Rule {
    /// Runs once; holds only cluster-wide rules after it.
    Cluster(fn(&View<'_>) -> StepOutcome),
    /// Runs for each shard; holds only that shard.
    Shard(fn(&View<'_>, ShardId) -> StepOutcome),
    /// Runs for the whole cluster, even if that is held, unless something was decided for it: holds nothing, as members reach each other
    /// or not whatever is wrong with objects.
    Mesh(fn(&View<'_>) -> StepOutcome),
    /// Runs for each shard in which nothing was decided, even if it is held: what can be repaired without a primary.
    Repair(fn(&View<'_>, ShardId) -> StepOutcome),
}

/// The rules, in the order of their precedence, after finalize and guard, which end the verdict unless they are satisfied. The
/// order is the policy.
const STEPS: &[(StepName, Rule)] = &[
    (StepName::Failover, Rule::Shard(steps::failover::step)),
    (StepName::Routing, Rule::Shard(steps::routing::step)),
    (StepName::Objects, Rule::Cluster(steps::objects::step)),
    (StepName::Membership, Rule::Shard(steps::membership::step)),
    (StepName::Gossip, Rule::Mesh(steps::gossip::step)),
    (StepName::Reshard, Rule::Mesh(steps::reshard::step)),
    (StepName::Rollout, Rule::Shard(steps::rollout::step)),
    (StepName::Rollout, Rule::Repair(steps::rollout::repair)),
    (StepName::Settings, Rule::Repair(steps::settings::step)),
    (StepName::Routing, Rule::Repair(steps::routing::close)),
    (StepName::Routing, Rule::Repair(steps::routing::withdraw_names)),
];

/// What is to be done, what is waited for and what is blocked, given everything known, this look's readings and the time.
pub fn decide(state: &ClusterState, evidence: &Evidence, now: Timestamp) -> Verdict {
    let mut verdict = Verdict::default();
    if take(&mut verdict, StepName::Finalize, Scope::Cluster, steps::finalize::step(state, now)) {
        return verdict;
    }
    let spec = match steps::guard::step(state) {
        Ok(spec) => spec,
        Err(outcome) => {
            take(&mut verdict, StepName::Guard, Scope::Cluster, *outcome);
            return verdict;
        }
    };
    // A shard that is not wanted any more is looked after as long as it owns slots.
    let kept = DesiredCluster { shards: state.shards_kept(spec.shards, now), ..spec.clone() };
    let view = View { state, evidence, now, spec: &kept, decided: &[] };
    let mut held: Vec<Scope> = Vec::new();
    for (name, rule) in STEPS {
        match rule {
            Rule::Cluster(step) => run(&mut verdict, &mut held, &view, *name, Scope::Cluster, || step(&view)),
            Rule::Shard(step) => {
                for shard in view.spec.shard_ids() {
                    run(&mut verdict, &mut held, &view, *name, Scope::Shard(shard), || step(&view, shard));
                }
            }
            Rule::Mesh(step) => {
                let decided = verdict.decisions.iter().any(|d| d.scope == Scope::Cluster);
                if !decided && !state.is_pending(Scope::Cluster) {
                    let outcome = step(&View { decided: &verdict.decisions, ..view });
                    take(&mut verdict, *name, Scope::Cluster, outcome);
                }
            }
            Rule::Repair(step) => {
                for shard in view.spec.shard_ids() {
                    let scope = Scope::Shard(shard);
                    let decided = verdict.decisions.iter().any(|d| d.scope == scope);
                    if !decided && !state.is_pending(scope) {
                        take(&mut verdict, *name, scope, step(&view, shard));
                    }
                }
            }
        }
    }
    verdict.standing.blocks.extend(view.spec.shard_ids().filter_map(|shard| cannot_start(&view, shard)));
    let refused = view.spec.shard_ids().filter_map(|shard| steps::settings::refused(&view, shard));
    verdict.standing.blocks.extend(refused);
    verdict
}

/// What a person has to see at once, whatever else the shard waits for. It holds nothing.
fn cannot_start(view: &View<'_>, shard: ShardId) -> Option<Block> {
    let is_it = |id: &MemberId| view.member(*id).is_some_and(|member| member.trouble().is_some());
    let (step, scope, reason) = (StepName::Rollout, Scope::Shard(shard), BlockReason::MemberCannotStart);
    let is_refused = |id: &MemberId| {
        let workload = steps::objects::workload(view, shard).and_then(|(_, facts)| facts.live.present());
        let is_absent = view.member(*id).is_none_or(|member| member.facts.pod.is_absent());
        is_absent && workload.is_some_and(|live| live.pods_refused.is_some())
    };
    let about = view.wanted(shard).find(|id| is_it(id) || is_refused(id))?;
    Some(Block { step, scope, reason, about: Some(about), candidates: Vec::new() })
}

fn run(
    verdict: &mut Verdict,
    held: &mut Vec<Scope>,
    view: &View<'_>,
    name: StepName,
    scope: Scope,
    step: impl FnOnce() -> StepOutcome,
) {
    if held.contains(&scope) {
        return;
    }
    let outcome = if view.state.is_pending(scope) {
        StepOutcome::Waiting(WaitReason::EffectsPending, None, None)
    } else {
        step()
    };
    let outcome = one_shard_down(verdict, view, one_election(verdict, view, outcome));
    if take(verdict, name, scope, outcome) {
        held.push(scope);
    }
}

/// Until when a shard hands slots over key by key, or gets some, as far as was seen. Who is elected just when a slot changes hands may be
/// believed instead of who has got it, and that one would drop its keys.
fn moves_by_key(view: &View<'_>, shard: ShardId) -> Option<Timestamp> {
    let known = view.shard(shard);
    let node = view.state.holder_node(shard)?;
    let open = !known.by_key.is_empty() || !node.migrating.is_empty() || !node.importing.is_empty();
    let until = known.handed_at?.plus_millis(steps::reshard::BY_KEY_SILENT_MS);
    Some(until).filter(|until| open && *until > view.now)
}

/// What was decided in this turn so far, and what this epoch has decided and not seen the end of.
fn under_way<'a>(verdict: &'a Verdict, view: &'a View<'_>) -> impl Iterator<Item = &'a Decision> {
    let pending = view.state.pending.values().filter(|p| p.epoch == view.state.epoch).map(|p| &p.decision);
    verdict.decisions.iter().chain(pending)
}

/// Two handovers between nodes at once take each other's votes: the one without a majority stands with its writes paused until it is given
/// up, three seconds later. So one waits for the other, and for nodes that have restarted to be heard.
fn one_election(verdict: &Verdict, view: &View<'_>, outcome: StepOutcome) -> StepOutcome {
    let StepOutcome::Decided(decision) = outcome else { return outcome };
    let Some(to) = decision.successor_of_a_node() else { return StepOutcome::Decided(decision) };
    if let Some(until) = moves_by_key(view, to.shard) {
        return StepOutcome::Waiting(WaitReason::SlotsMoving, Some(to), Some(until));
    }
    if under_way(verdict, view).any(Decision::elects) {
        return StepOutcome::Waiting(WaitReason::ElectionElsewhere, Some(to), None);
    }
    if !topology::is_heard(view, to) {
        return StepOutcome::Waiting(WaitReason::GossipUnsettled, Some(to), None);
    }
    StepOutcome::Decided(decision)
}

/// A primary without a replica takes its shard with it when it is restarted: one shard at a time, and none beside one that is down anyway.
fn one_shard_down(verdict: &Verdict, view: &View<'_>, outcome: StepOutcome) -> StepOutcome {
    let StepOutcome::Decided(decision) = outcome else { return outcome };
    let Some(primary) = steps::rollout::takes_down(view, &decision) else {
        return StepOutcome::Decided(decision);
    };
    // A node that has just come back refuses its clients for two seconds more, and is not ready.
    let is_down = |shard: ShardId| {
        let serving = topology::serving_primary(view, shard);
        let serves = serving.is_some_and(|id| !view.state.is_leaving(id) && topology::is_ready(view, id, id));
        shard != primary.shard && view.shard(shard).has_served() && !serves
    };
    if under_way(verdict, view).any(|other| steps::rollout::takes_down(view, other).is_some())
        || view.spec.shard_ids().any(is_down)
    {
        return StepOutcome::Waiting(WaitReason::ShardDownElsewhere, Some(primary), None);
    }
    StepOutcome::Decided(decision)
}

/// Enters an outcome into the verdict; true if it holds its scope.
fn take(verdict: &mut Verdict, step: StepName, scope: Scope, outcome: StepOutcome) -> bool {
    match outcome {
        StepOutcome::Satisfied => return false,
        StepOutcome::Waiting(reason, about, wake_at) => {
            verdict.standing.waits.push(Wait { step, scope, reason, about });
            verdict.wake_at = match (verdict.wake_at, wake_at) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        StepOutcome::Blocked(reason, about, candidates) => {
            verdict.standing.blocks.push(Block { step, scope, reason, about, candidates });
        }
        StepOutcome::Decided(decision) => verdict.decisions.push(*decision),
    }
    true
}

//! Wants: every server to have the settings of the spec, as far as it takes them while it runs.
//! Proof: what each agent says that its server began with or took since.
//! Refuses: while paused or in a failover; to tell a server whose pod is to be made anew, which begins with them; to tell the primary before its
//!   replicas have taken them.
//! Story: settings_live, settings_refused.

use crate::{
    decide::{StepOutcome, View},
    decision::{Block, BlockReason, Decision, OperationKind, Reason, Scope, StepName},
    effect::Effect,
    ids::{MemberId, ShardId},
    observation::{ObjectFacts, ObjectKind, ObjectRef},
    state::failure_key,
    steps::{objects, rollout, unless_failing},
    topology,
};

/// After so many refusals it is told: what passes by itself has passed, 600 ms after the first. Count.
const REFUSALS_TOLD: u32 = 3;

/// Tells those that lack them, the primary last.
pub fn step(view: &View<'_>, shard: ShardId) -> StepOutcome {
    let scope = Scope::Shard(shard);
    let Some(wanted) = view.spec.settings.as_ref() else { return StepOutcome::Satisfied };
    if view.spec.paused || view.state.operation(OperationKind::Failover, scope).is_some() {
        return StepOutcome::Satisfied;
    }
    let primary = topology::serving_primary(view, shard);
    let mut lacking: Vec<MemberId> = view.wanted(shard).filter(|id| lacks(view, *id)).collect();
    lacking.sort_by_key(|id| Some(*id) == primary);
    let tell = |id: &MemberId| {
        Some(Effect::Configure { server: topology::server(view, *id)?, settings: wanted.digest.clone() })
    };
    let mut decision = Decision::new(StepName::Settings, scope, Reason::SettingsChanged);
    decision.about = lacking.first().copied();
    decision.effects = lacking.iter().filter_map(tell).collect();
    unless_failing(view, decision)
}

/// What a person has to see for as long as it is so, whatever is being tried. It holds nothing.
pub fn refused(view: &View<'_>, shard: ShardId) -> Option<Block> {
    let wanted = &view.spec.settings.as_ref()?.digest;
    let refuses = |id: &MemberId| {
        let words = view.member(*id).and_then(|member| member.settings_refused.as_ref());
        let effect = Effect::Configure { server: topology::server(view, *id)?, settings: wanted.clone() };
        let (count, _) = view.state.failures.get(&failure_key(Scope::Shard(shard), &effect))?;
        (words.is_some_and(|(of, _)| of == wanted) && *count >= REFUSALS_TOLD && lacks(view, *id))
            .then_some(*id)
    };
    let about = view.wanted(shard).find_map(|id| refuses(&id))?;
    let (step, scope, reason) = (StepName::Settings, Scope::Shard(shard), BlockReason::SettingsRefused);
    Some(Block { step, scope, reason, about: Some(about), candidates: Vec::new() })
}

/// True while a server runs that has other settings. Until it has these the configuration stays as it was: what is refused shall not keep
/// a server from its next start.
pub fn is_awaited(view: &View<'_>) -> bool {
    view.spec.settings.is_some() && view.spec.members().any(|id| lacks(view, id))
}

/// True if the member's pod keeps other settings than the configuration has by now: a server that does not start for them never does.
pub fn began_with_others(view: &View<'_>, id: MemberId) -> bool {
    let is_conf = |(object, facts): (&ObjectRef, &ObjectFacts)| {
        object.kind == ObjectKind::ConfigMap && objects::differs(facts)
    };
    let kept = view.member(id).and_then(|member| member.agent()?.settings.as_ref());
    let wanted = view.spec.settings.as_ref().map(|settings| &settings.digest);
    kept.is_some() && wanted.is_some() && kept != wanted && !view.state.objects.iter().any(is_conf)
}

/// True if the member's server runs with other settings, and with the revision of the spec.
fn lacks(view: &View<'_>, id: MemberId) -> bool {
    let (Some(wanted), Some(member)) = (view.spec.settings.as_ref(), view.member(id)) else { return false };
    let (Some(server), Some(agent)) = (member.server(), member.agent()) else { return false };
    let differs = agent.settings.as_ref().is_some_and(|settings| *settings != wanted.digest);
    differs
        && agent.run_id == server.run_id
        && !server.loading
        && !view.state.is_leaving(id)
        && !rollout::is_stale(view, id)
}

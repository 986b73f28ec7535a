//! Wants: every server to have the settings of the spec, as far as it takes them while it runs.
//! Proof: what each agent says that its server began with or took since; the server's own word if it refuses.
//! Refuses: while paused or in a failover; to tell a server whose pod is to be made anew, which begins with them; to tell the primary before its
//!   replicas have taken them.
//! Story: settings_live, settings_refused, settings_refused_alone.

use crate::{
    decide::{StepOutcome, View},
    decision::{Block, BlockReason, Decision, OperationKind, Reason, Scope, StepName},
    effect::Effect,
    ids::{Digest, MemberId, ShardId},
    observation::{ContainerPhase, ObjectFacts, ObjectKind, ObjectRef, Observed},
    state::SettingsRefused,
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

/// What a person has to see for as long as it is so, whatever is being tried, and whoever is away. It holds nothing.
pub fn refused(view: &View<'_>, shard: ShardId) -> Option<Block> {
    let wanted = &view.spec.settings.as_ref()?.digest;
    let told = |id: &MemberId| refusal(view, *id, wanted).is_some_and(|by| by.count >= REFUSALS_TOLD);
    let about = view.wanted(shard).find(told)?;
    let (step, scope, reason) = (StepName::Settings, Scope::Shard(shard), BlockReason::SettingsRefused);
    Some(Block { step, scope, reason, about: Some(about), candidates: Vec::new() })
}

/// True while the configuration has to stay as it was: a server has refused these settings, or one that runs with others has not been told
/// yet, or nobody knows what it has. What a server refuses shall not keep it from its next start.
pub fn hold_configuration(view: &View<'_>) -> bool {
    let Some(wanted) = view.spec.settings.as_ref().map(|settings| &settings.digest) else { return false };
    view.spec.members().any(|id| refusal(view, id, wanted).is_some() || may_refuse(view, id, wanted))
}

/// What the member's server has said of these settings, if it refused them last and does not have them.
fn refusal<'a>(view: &View<'a>, id: MemberId, wanted: &Digest) -> Option<&'a SettingsRefused> {
    let member = view.member(id).filter(|_| !rollout::is_stale(view, id))?;
    let has_them = member.agent().is_some_and(|agent| agent.settings.as_ref() == Some(wanted));
    member.settings_refused.as_ref().filter(|by| by.settings == *wanted && !has_them)
}

/// True of a member that may still refuse these settings. Who does not know is not taken to agree; a server that does not start cannot be told.
fn may_refuse(view: &View<'_>, id: MemberId, wanted: &Digest) -> bool {
    let Some(member) = view.member(id) else { return false };
    if view.state.is_leaving(id) || rollout::is_stale(view, id) {
        return false;
    }
    match (&member.facts.pod, &member.facts.agent) {
        (Observed::Unknown(_), _) => true,
        (Observed::Absent, _) | (Observed::Present(_), Observed::Absent) => false,
        (Observed::Present(pod), Observed::Unknown(_)) => pod.container == ContainerPhase::Running,
        (Observed::Present(_), Observed::Present(agent)) => {
            let starts = agent.start_failure.is_none() || member.server().is_some();
            starts && agent.settings.as_ref().is_some_and(|settings| settings != wanted)
        }
    }
}

/// True if the member's pod keeps other settings than the configuration has by now: a server that does not start for them never does. Not
/// where the new ones were refused.
pub fn began_with_others(view: &View<'_>, id: MemberId) -> bool {
    let is_conf = |(object, facts): (&ObjectRef, &ObjectFacts)| {
        object.kind == ObjectKind::ConfigMap && objects::differs(facts)
    };
    let Some(wanted) = view.spec.settings.as_ref().map(|settings| &settings.digest) else { return false };
    let kept = view.member(id).and_then(|member| member.agent()?.settings.as_ref());
    kept.is_some_and(|kept| kept != wanted)
        && !view.state.objects.iter().any(is_conf)
        && !view.spec.members().any(|id| refusal(view, id, wanted).is_some())
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

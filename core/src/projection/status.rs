//! State as conditions: kstatus' Ready, Reconciling and Stalled, and PrimaryAvailable. Reasons are typed, see `reason.rs`, so that a condition, a Kubernetes Event, a metric and an audit use the same words.

use crate::{
    config::ServerVersion,
    decide::View,
    decision::{Block, BlockReason, Operation, OperationKind, Reason, Scope, StepName, WaitReason},
    ids::{MemberId, ShardId},
    observation::{Evidence, ObjectRef},
    projection::{
        bus,
        reason::{ConditionReason, StatusReason},
    },
    spec::DesiredCluster,
    state::{ClusterState, Failing, MemberState},
    steps::{objects, reshard, rollout},
    topology,
};

/// Most objects of others that one message names: a Kubernetes Event has 1 kB. Count.
const TAKEN_SHOWN_MAX: usize = 3;

/// Names of the conditions that follow from state alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConditionKind {
    /// Everything is as the spec wants it.
    Ready,
    /// Work is under way or awaited.
    Reconciling,
    /// Nothing goes on until someone changes something.
    Stalled,
    /// Every shard has a primary that serves and is routed to.
    PrimaryAvailable,
}

impl ConditionKind {
    /// The condition's type in `status.conditions`.
    pub fn as_str(self) -> &'static str {
        match self {
            ConditionKind::Ready => "Ready",
            ConditionKind::Reconciling => "Reconciling",
            ConditionKind::Stalled => "Stalled",
            ConditionKind::PrimaryAvailable => "PrimaryAvailable",
        }
    }
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Which.
    pub kind: ConditionKind,
    /// Its status.
    pub holds: bool,
    /// Why it is so.
    pub reason: ConditionReason,
    /// One sentence.
    pub message: String,
}

/// What a cluster's status says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Ready, Reconciling, Stalled, PrimaryAvailable.
    pub conditions: Vec<Condition>,
    /// The primary of each shard that has one, routed or not.
    pub primaries: Vec<(ShardId, MemberId)>,
    /// Members that serve their purpose.
    pub members_ready: u32,
    /// Members wanted.
    pub members_wanted: u32,
    /// Generation of the spec in force.
    pub generation: Option<i64>,
    /// How far slots are on their way, if any is to move.
    pub resharding: Option<Resharding>,
}

/// How far slots are on their way to where the spec wants them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resharding {
    /// Slots that have another shard since it began. Count.
    pub slots_moved: u32,
    /// Slots that are still to move. Count.
    pub slots_left: u32,
    /// At the pace so far. Seconds.
    pub seconds_left: Option<u64>,
    /// Why the last handover of slots came to nothing, if it did: Valkey's words.
    pub message: Option<String>,
}

/// Projects the state.
pub fn status(state: &ClusterState) -> Status {
    let served = state.desired(state.head_time).map(|spec| served(state, &spec)).unwrap_or_default();
    let stalled = stalled(state);
    let waiting = match state.spec {
        None => Some(not_observed()),
        Some(_) => reconciling(state, served.ready, served.wanted),
    };
    let ready = stalled.clone().or_else(|| waiting.clone());
    // What a person has just changed is answered whatever else there is to say.
    let ready = ready.map(|(reason, message)| (reason, format!("{}{message}", refused(state))));
    let conditions = vec![
        condition(ConditionKind::Ready, ready.is_none(), ready, "every member serves and is routed"),
        condition(ConditionKind::Reconciling, waiting.is_some(), waiting, "nothing is under way"),
        condition(ConditionKind::Stalled, stalled.is_some(), stalled, "nothing is blocked"),
        primary_available(state, served.unserved),
    ];
    let generation = state.spec.as_ref().map(|s| s.generation);
    let Served { primaries, ready: members_ready, wanted: members_wanted, unserved: _ } = served;
    let resharding = resharding(state);
    Status { conditions, primaries, members_ready, members_wanted, generation, resharding }
}

fn resharding(state: &ClusterState) -> Option<Resharding> {
    let left: usize = reshard::planned(state).iter().map(|m| m.slots.len()).sum();
    let open = state.operation(OperationKind::Reshard, Scope::Cluster);
    if left == 0 && open.is_none() {
        return None;
    }
    let slots_moved = open.map_or(0, |o| o.slots_moved);
    let lasted_ms = open.map_or(0, |o| state.head_time.millis_since(o.opened_at));
    let pace = |left: usize| {
        let all_ms = u64::try_from(lasted_ms).ok()?.saturating_mul(left as u64);
        Some(all_ms.checked_div(u64::from(slots_moved))?.div_ceil(1_000))
    };
    let message = reshard::failed(state).map(|(from, words)| format!("{from}: {words}"));
    let slots_left = u32::try_from(left).unwrap_or(u32::MAX);
    Some(Resharding { slots_moved, slots_left, seconds_left: pace(left), message })
}

/// What a reshard says of itself.
fn progress(state: &ClusterState) -> String {
    let Some(Resharding { slots_moved, slots_left, seconds_left: _, message }) = resharding(state) else {
        return String::new();
    };
    let failed = message.map(|words| format!("; the last handover came to nothing: {words}"));
    let held = held_up(state).map(|why| format!("; {why}"));
    let more = failed.into_iter().chain(held).collect::<String>();
    format!(": {slots_moved} slots moved, {slots_left} left{more}")
}

/// Why a reshard does not go on, if that is not the usual course of it.
fn held_up(state: &ClusterState) -> Option<String> {
    if state.spec.as_ref().is_some_and(|spec| spec.paused) {
        return Some("nothing more moves while spec.paused is true".to_owned());
    }
    let wait = state.standing.waits.iter().find(|wait| wait.step == StepName::Reshard)?;
    let why = || format!("{}{}: {}", wait.reason.code(), whom(wait.about), explained(state, wait.reason));
    (wait.reason != WaitReason::SlotsMoving).then(why)
}

/// Why a step waits, and for whom, where its reason says only what for.
fn explained(state: &ClusterState, reason: WaitReason) -> String {
    let may_be_the_bus = [WaitReason::GossipUnsettled, WaitReason::ReplicaSyncing].contains(&reason);
    let more = if may_be_the_bus { trouble(state) } else { String::new() };
    format!("{}{more}", reason.explain())
}

/// Why the first object that is not what it should be was not applied or deleted, in the API server's words; empty if all were.
fn refused(state: &ClusterState) -> String {
    let told = |(object, words): (&ObjectRef, &String)| {
        let facts = state.objects.get(object).filter(|facts| objects::differs(facts))?;
        let what = if facts.surplus { "deleted" } else { "applied" };
        Some(format!("{object} is not {what}: {words}. "))
    };
    state.refusals.iter().find_map(told).unwrap_or_default()
}

/// What nodes say of each other that they should not, in parentheses.
fn trouble(state: &ClusterState) -> String {
    bus::trouble(state).map(|trouble| format!(" ({trouble})")).unwrap_or_default()
}

/// The member that a sentence is about, in parentheses.
fn whom(about: Option<MemberId>) -> String {
    about.map(|member| format!(" ({member})")).unwrap_or_default()
}

/// A reason, and the sentence beside it.
type Why = (ConditionReason, String);

fn not_observed() -> Why {
    (ConditionReason::Wait(WaitReason::NotObserved), "the spec has not been read yet".to_owned())
}

/// That something of the kind goes on.
fn under_way(kind: OperationKind) -> ConditionReason {
    match kind {
        OperationKind::Failover => StatusReason::Failover.into(),
        OperationKind::Switchover => ConditionReason::Decision(Reason::Switchover),
        OperationKind::Rollout => StatusReason::Rollout.into(),
        OperationKind::Reshard => StatusReason::Reshard.into(),
    }
}

#[derive(Default)]
struct Served {
    primaries: Vec<(ShardId, MemberId)>,
    ready: u32,
    wanted: u32,
    unserved: Option<Unserved>,
}

/// A shard without a primary that is routed and serves its clients.
struct Unserved {
    shard: ShardId,
    /// Its primary, if it has one that answers and refuses them (`cluster_state:fail`).
    refusing: Option<MemberId>,
}

fn served(state: &ClusterState, spec: &DesiredCluster) -> Served {
    let evidence = Evidence::default();
    let view = View { state, evidence: &evidence, now: state.head_time, spec, decided: &[] };
    let primaries: Vec<(ShardId, MemberId)> =
        spec.shard_ids().filter_map(|s| topology::serving_primary(&view, s).map(|p| (s, p))).collect();
    let is_ready =
        |id: &MemberId| primaries.iter().any(|(s, p)| *s == id.shard && topology::is_ready(&view, *id, *p));
    let ready = u32::try_from(spec.members().filter(is_ready).count()).unwrap_or(u32::MAX);
    let wanted = u32::try_from(spec.members().count()).unwrap_or(u32::MAX);
    let refuses = |p: &MemberId| state.members.get(p).is_some_and(|m| m.down_since.is_some());
    let unserved = spec.shard_ids().find_map(|shard| {
        let primary = primaries.iter().find(|(of, _)| *of == shard).map(|(_, p)| *p);
        let refusing = primary.filter(refuses);
        let is_served = refusing.is_none() && primary.is_some_and(|p| topology::is_routed(&view, p));
        (!is_served).then_some(Unserved { shard, refusing })
    });
    Served { primaries, ready, wanted, unserved }
}

fn condition(kind: ConditionKind, holds: bool, why: Option<Why>, otherwise: &str) -> Condition {
    let (reason, message) = why.unwrap_or_else(|| (StatusReason::AsWanted.into(), otherwise.to_owned()));
    Condition { kind, holds, reason, message }
}

fn primary_available(state: &ClusterState, unserved: Option<Unserved>) -> Condition {
    let kind = ConditionKind::PrimaryAvailable;
    match (&state.spec, unserved) {
        (None, _) => condition(kind, false, Some(not_observed()), ""),
        (Some(_), Some(Unserved { shard, refusing })) => {
            let scope = Scope::Shard(shard);
            let block = state.standing.blocks.iter().find(|b| b.scope == scope);
            let wait = state.standing.waits.iter().find(|w| w.scope == scope);
            let (reason, text) = match (block, refusing, wait) {
                (Some(b), _, _) => (ConditionReason::Block(b.reason), b.reason.explain()),
                (None, Some(_), _) => {
                    let reason = WaitReason::GossipUnsettled;
                    (
                        ConditionReason::Wait(reason),
                        "its primary answers and refuses its clients (cluster_state:fail)",
                    )
                }
                (None, None, Some(w)) => (ConditionReason::Wait(w.reason), w.reason.explain()),
                (None, None, None) => {
                    (StatusReason::PrimaryUnknown.into(), "no member is seen to be primary and routed")
                }
            };
            condition(kind, false, Some((reason, format!("shard {shard}: {text}"))), "")
        }
        (Some(_), None) => condition(kind, true, None, "every shard has a primary and is routed to it"),
    }
}

fn stalled(state: &ClusterState) -> Option<Why> {
    if let Some(error) = &state.spec_error {
        return Some((ConditionReason::Block(BlockReason::SpecInvalid), error.clone()));
    }
    let told = |block: &Block| (ConditionReason::Block(block.reason), blocked(state, block));
    let block = state.standing.blocks.iter().find(|b| b.reason != BlockReason::Paused);
    let refused = state.spec.as_ref().and_then(|spec| spec.refused.clone());
    let refused = refused.map(|why| (StatusReason::AnnotationRefused.into(), why));
    block.map(told).or(refused).or_else(|| version_differs(state))
}

/// A server that runs what the spec wants, and says that it is of another version than the spec.
fn version_differs(state: &ClusterState) -> Option<Why> {
    let (spec, evidence) = (state.spec.as_ref()?, Evidence::default());
    let said = spec.version.as_ref()?;
    let view = View { state, evidence: &evidence, now: state.head_time, spec, decided: &[] };
    let of = |text: &str| text.parse::<ServerVersion>().ok();
    let differs = |id: MemberId| {
        let runs = of(&state.members.get(&id)?.server()?.version)?;
        (Some(runs) != of(said) && !rollout::is_stale(&view, id)).then_some((id, runs))
    };
    let (id, runs) = spec.members().find_map(differs)?;
    let text = format!(
        "spec.version: {said:?} is not what {id} runs; allowed: {runs}, or none where the image's tag says it"
    );
    Some((StatusReason::VersionDiffers.into(), text))
}

/// Why a step is blocked, in full sentences.
pub fn blocked(state: &ClusterState, block: &Block) -> String {
    let taken = if block.reason == BlockReason::NameTaken { taken(state) } else { String::new() };
    let member = block.about.and_then(|id| state.members.get(&id));
    let words = if block.reason == BlockReason::SettingsRefused {
        member.and_then(|known| known.settings_refused.as_ref()).map(|refused| refused.words.as_str())
    } else {
        member.and_then(MemberState::trouble).or_else(|| refused_pods(state, block.about?))
    };
    let trouble = words.map(|words| format!("{words}. ")).unwrap_or_default();
    format!("{}{}: {taken}{trouble}{}", block.scope, whom(block.about), block.reason.explain())
}

/// Why the member's pod is not made, if there is none.
fn refused_pods(state: &ClusterState, member: MemberId) -> Option<&str> {
    let is_absent = state.members.get(&member).is_none_or(|known| known.facts.pod.is_absent());
    let of_shard = state.objects.values().filter(|facts| is_absent && facts.shard == Some(member.shard));
    of_shard.filter_map(|facts| facts.live.present()?.pods_refused.as_deref()).next()
}

/// What fails there, since when, and what is said of it.
fn failing(state: &ClusterState, scope: Scope) -> String {
    let Some(Failing { key: _, effect, since, count, words }) = state.failing.get(&scope.to_string()) else {
        return String::new();
    };
    format!(" Failing since {since}, {count} times so far: {effect}: {words}")
}

/// The objects under our names that are somebody else's, and whose they are. One after the other has to go: the first say enough.
fn taken(state: &ClusterState) -> String {
    let all = state.objects.iter().filter_map(|(object, facts)| Some((object, facts.taken_by()?)));
    all.take(TAKEN_SHOWN_MAX).map(|(object, owner)| format!("{object} belongs to {owner}. ")).collect()
}

fn reconciling(state: &ClusterState, ready: u32, wanted: u32) -> Option<Why> {
    // A failover is what matters, however long something else goes on.
    let is_failover = |open: &&Operation| open.kind == OperationKind::Failover;
    if let Some(open) = state.operations.iter().find(is_failover).or(state.operations.first()) {
        let more = match open.kind {
            OperationKind::Reshard => progress(state),
            // An old primary that the bus does not reach, and that is back before it is over, keeps it open.
            OperationKind::Failover => trouble(state),
            OperationKind::Switchover | OperationKind::Rollout => String::new(),
        };
        return Some((
            under_way(open.kind),
            format!(
                "{:?} of {} is under way since {} [j:{}]{more}.{}",
                open.kind,
                open.scope,
                open.opened_at,
                open.id,
                failing(state, open.scope)
            ),
        ));
    }
    if let Some(wait) = state.standing.waits.first() {
        return Some((
            ConditionReason::Wait(wait.reason),
            format!(
                "{}{}: {}{}",
                wait.scope,
                whom(wait.about),
                explained(state, wait.reason),
                failing(state, wait.scope)
            ),
        ));
    }
    if resharding(state).is_some() {
        return Some((
            StatusReason::Reshard.into(),
            format!("slots are not where the spec wants them{}", progress(state)),
        ));
    }
    if let Some((object, _)) = state.objects.iter().find(|(_, f)| objects::differs(f)) {
        return Some((
            ConditionReason::Wait(WaitReason::ObjectMissing),
            format!("{object} is not yet what the spec wants"),
        ));
    }
    if !state.pending.is_empty() {
        return Some((
            ConditionReason::Wait(WaitReason::EffectsPending),
            "effects of a decision are under way".to_owned(),
        ));
    }
    (ready < wanted).then(|| {
        (
            ConditionReason::Wait(WaitReason::ReplicaSyncing),
            format!("{ready} of {wanted} members are ready{}", trouble(state)),
        )
    })
}

//! Recorded decisions into the world. Nothing here chooses: an effect says who, where and what must still be true; the
//! first that is not verified ends its decision.

use crate::{
    agents::Paused,
    claim,
    cluster::Cluster,
    command,
    k8s::{self, apply, slice},
    objects,
};
use futures::future::join_all;
use kube::ResourceExt;
use std::{collections::BTreeMap, time::Duration};
use tokio::time::Instant;
use tracing::Instrument;
use valkeeper_core::{
    decision::Decision,
    effect::{Effect, Outcome},
    ids::{EffectId, MemberId, ShardId, Timestamp},
    observation::{Executed, RoleLabel},
    topology, words,
};
use valkeeper_journal::Recorded;

/// Bound on one promise: a round trip and one write to a disk, which takes milliseconds and seldom more. The promises of a
/// decision are asked for side by side, so this is what a peer that does not answer costs.
const PROMISE_MAX: Duration = Duration::from_millis(400);

/// Most characters of the API server's words that are recorded.
const WORDS_MAX: usize = 1_000;

/// Bound on one effect. Every kind has tighter bounds of its own, except a handover, whose own limit comes on top of this.
const EFFECT_MAX: Duration = Duration::from_secs(8);

/// Executes the decisions side by side, each one's effects in order. A decision without effects needs no outcome.
pub async fn all(cluster: &Cluster, decisions: &[Recorded<Decision>], decided_at: Instant) -> Vec<Executed> {
    let with_effects = decisions.iter().filter(|d| !d.value().effects.is_empty());
    join_all(with_effects.map(|decision| {
        let span =
            tracing::info_span!("decision", j = decision.seq().0, reason = decision.value().reason.code());
        one(cluster, decision, decided_at).instrument(span)
    }))
    .await
}

async fn one(cluster: &Cluster, decision: &Recorded<Decision>, decided_at: Instant) -> Executed {
    let mut outcomes: Vec<(Timestamp, Outcome)> = Vec::new();
    let named = decision.value().reissue_of.unwrap_or(decision.seq());
    let effects = &decision.value().effects;
    for group in effects.chunk_by(|a, b| is_promise(a) && is_promise(b)) {
        let stopped = outcomes.iter().any(|(_, outcome)| *outcome != Outcome::Verified);
        let promised = decision.value().promises();
        let ended = group.iter().map(|effect| async move {
            let skipped = Outcome::Skipped;
            if stopped { skipped } else { perform(cluster, decision, effect, promised, decided_at).await }
        });
        for (effect, outcome) in group.iter().zip(join_all(ended).await) {
            cluster.shell.metrics.ended(effect.verb(), &outcome);
            // The same id after a crash and a re-issue, and the one that `valkeeper-replay show` prints.
            let id = EffectId::derive(&cluster.id.uid, named, outcomes.len());
            tracing::info!(%id, %effect, %outcome, "ended");
            outcomes.push((cluster.clock.now(), outcome));
        }
    }
    Executed { decision: decision.seq(), outcomes }
}

async fn perform(
    cluster: &Cluster,
    decision: &Recorded<Decision>,
    effect: &Effect,
    promised: bool,
    decided_at: Instant,
) -> Outcome {
    if let Err(error) = cluster.shell.leadership.check() {
        return Outcome::Superseded(error.to_string());
    }
    if decision.epoch() != cluster.state.epoch {
        return Outcome::Superseded(format!(
            "decided in epoch {}, this is {}",
            decision.epoch(),
            cluster.state.epoch
        ));
    }
    let age_ms = decided_at.elapsed().as_millis();
    if effect.age_max_ms(promised).is_some_and(|max_ms| age_ms > u128::from(max_ms)) {
        return Outcome::Superseded(format!("decided {age_ms} ms ago"));
    }
    tokio::time::timeout(bound(effect, promised), run(cluster, decision, effect))
        .await
        .unwrap_or_else(|_| Outcome::Failed("not ended in time".to_owned()))
}

/// True for what may be done side by side: each concerns another member's agent, and none depends on another.
fn is_promise(effect: &Effect) -> bool {
    matches!(effect, Effect::Promise { .. })
}

/// Bound on an effect. What is only asked before a promotion must leave time for that.
fn bound(effect: &Effect, promised: bool) -> Duration {
    match effect {
        Effect::Brief { .. } if promised => PROMISE_MAX,
        Effect::Handover { timeout_ms, .. } => EFFECT_MAX + Duration::from_millis(u64::from(*timeout_ms)),
        Effect::Promise { .. } => PROMISE_MAX,
        Effect::Promote { .. }
        | Effect::Brief { .. }
        | Effect::Fence { .. }
        | Effect::Attach { .. }
        | Effect::Meet { .. }
        | Effect::AddSlots { .. }
        | Effect::MigrateSlots { .. }
        | Effect::Forget { .. }
        | Effect::Route { .. }
        | Effect::Unroute { .. }
        | Effect::Label { .. }
        | Effect::Configure { .. }
        | Effect::Disconnect { .. }
        | Effect::DeletePod { .. }
        | Effect::Apply { .. }
        | Effect::Delete { .. }
        | Effect::ReleaseFinalizer => EFFECT_MAX,
    }
}

async fn run(cluster: &Cluster, decision: &Recorded<Decision>, effect: &Effect) -> Outcome {
    let brief = &topology::terms(&cluster.state, decision.value());
    match effect {
        Effect::Promote { server, replid, offset, consents, by } => {
            let at = Paused { replid: replid.clone(), offset: *offset };
            of_command(command::promote(cluster, server, brief, &at, *consents, *by).await)
        }
        Effect::Promise { member, address, candidate: _ } => {
            of_command(command::promise(cluster, *member, address, brief).await)
        }
        Effect::Brief { member, address } => {
            of_command(command::tell(cluster, *member, address, brief).await)
        }
        Effect::Fence { server } => of_command(command::fence(cluster, server).await),
        Effect::Attach { server, to: _, to_address, node } => {
            of_command(command::attach(cluster, server, brief, to_address, node.as_ref()).await)
        }
        Effect::Meet { server, member, address } => {
            of_command(command::meet(cluster, server, *member, address).await)
        }
        Effect::AddSlots { server, node, slots, epoch } => {
            of_command(command::add_slots(cluster, server, node, slots, *epoch).await)
        }
        Effect::MigrateSlots { server, slots, to: _, node, keys: _, by } => {
            of_command(command::migrate_slots(cluster, server, slots, node, *by).await)
        }
        Effect::Forget { server, node } => of_command(command::forget(cluster, server, node).await),
        Effect::Configure { server, settings } => {
            of_command(command::configure(cluster, server, settings).await)
        }
        Effect::Disconnect { server } => of_command(command::disconnect(cluster, server).await),
        Effect::Handover { from, to, consents, timeout_ms, node } => {
            command::hand_over(cluster, (from, to), brief, *consents, *timeout_ms, node.as_ref()).await
        }
        Effect::Route { shard, to, address, resource_version } => {
            of_request(route(cluster, *shard, *to, address, resource_version).await)
        }
        Effect::Unroute { shard, resource_version } => {
            of_request(unroute(cluster, *shard, resource_version).await)
        }
        Effect::Label { member, pod_uid, role } => of_request(label(cluster, *member, pod_uid, *role).await),
        Effect::DeletePod { member, pod_uid, grace_s } => {
            of_request(delete_pod(cluster, *member, pod_uid, *grace_s).await)
        }
        Effect::Apply { object, digest } => of_request(crate::owned::apply(cluster, object, digest).await),
        Effect::Delete { object, uid } => of_request(crate::owned::delete(cluster, object, uid).await),
        Effect::ReleaseFinalizer => of_request(release(cluster).await),
    }
}

fn of_command(told: Result<(), Outcome>) -> Outcome {
    told.err().unwrap_or(Outcome::Verified)
}

fn of_request(ended: Result<Outcome, k8s::Error>) -> Outcome {
    ended.unwrap_or_else(|error| of_error(&error))
}

/// What an answer of the API server says of the effect: a precondition that did not hold, or a failure.
fn of_error(error: &k8s::Error) -> Outcome {
    // An admission webhook may say anything, and a record has a limit.
    let text = words::of_others(&k8s::chain(error), WORDS_MAX);
    match error {
        k8s::Error::Conflict { .. } | k8s::Error::NotFound { .. } => Outcome::Superseded(text),
        k8s::Error::NamespaceEnds { .. } => Outcome::Futile(text),
        k8s::Error::Refused { .. }
        | k8s::Error::Ambiguous { .. }
        | k8s::Error::Malformed { .. }
        | k8s::Error::Settings(_) => Outcome::Failed(text),
    }
}

async fn route(
    cluster: &Cluster,
    shard: ShardId,
    to: MemberId,
    address: &str,
    resource_version: &str,
) -> Result<Outcome, k8s::Error> {
    let (namespace, name) = &cluster.id.owner;
    let world = &cluster.shell.world;
    let slice_name = objects::names::route(name, shard);
    let Some(live) = world.slices.get(namespace, &slice_name) else {
        return Ok(Outcome::Superseded(format!("there is no EndpointSlice/{slice_name}")));
    };
    let pod_name = objects::names::pod(name, to);
    let pod = world.pods.get(namespace, &pod_name);
    let at_address = |p: &k8s_openapi::api::core::v1::Pod| {
        p.status.as_ref().and_then(|s| s.pod_ip.as_deref()) == Some(address)
    };
    let Some(pod) = pod.filter(|p| at_address(p)) else {
        return Ok(Outcome::Superseded(format!("{to} is not at {address} now")));
    };
    let target = slice::Target {
        address: address.to_owned(),
        pod: pod_name,
        pod_uid: pod.uid().unwrap_or_default(),
        node: pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default(),
    };
    let client = &cluster.shell.clients.requests;
    let moved = slice::route(client, &live, resource_version, &target, cluster.state.epoch).await?;
    world.slices.written(&moved);
    Ok(Outcome::Verified)
}

async fn unroute(cluster: &Cluster, shard: ShardId, resource_version: &str) -> Result<Outcome, k8s::Error> {
    let (namespace, name) = &cluster.id.owner;
    let slices = &cluster.shell.world.slices;
    let slice_name = objects::names::route(name, shard);
    let Some(live) = slices.get(namespace, &slice_name) else {
        return Ok(Outcome::Superseded(format!("there is no EndpointSlice/{slice_name}")));
    };
    let client = &cluster.shell.clients.requests;
    let closed = slice::unroute(client, &live, resource_version, cluster.state.epoch).await?;
    slices.written(&closed);
    Ok(Outcome::Verified)
}

async fn label(
    cluster: &Cluster,
    member: MemberId,
    pod_uid: &str,
    role: RoleLabel,
) -> Result<Outcome, k8s::Error> {
    let (namespace, name) = &cluster.id.owner;
    let client = &cluster.shell.clients.requests;
    let (pod, labels) = (objects::names::pod(name, member), labels_of(role));
    let pod = apply::label_pod(client, namespace, &pod, pod_uid, &labels).await?;
    cluster.shell.world.pods.written(&pod);
    Ok(Outcome::Verified)
}

/// A pod that goes is without a name. Whoever stays has one, also a pod whose template did not give it.
fn labels_of(role: RoleLabel) -> BTreeMap<&'static str, Option<&'static str>> {
    let named = match role {
        RoleLabel::Primary | RoleLabel::Replica => Some(objects::names::NAMED),
        RoleLabel::Leaving => None,
    };
    BTreeMap::from([(objects::names::ROLE_LABEL, Some(role.as_str())), (objects::names::NAMED_LABEL, named)])
}

async fn delete_pod(
    cluster: &Cluster,
    member: MemberId,
    pod_uid: &str,
    grace_s: Option<u32>,
) -> Result<Outcome, k8s::Error> {
    let (namespace, name) = &cluster.id.owner;
    let client = &cluster.shell.clients.requests;
    let pod_name = objects::names::pod(name, member);
    if let Some(leaving) = apply::delete_pod(client, namespace, &pod_name, pod_uid, grace_s).await? {
        cluster.shell.world.pods.written(&leaving);
    }
    Ok(Outcome::Verified)
}

async fn release(cluster: &Cluster) -> Result<Outcome, k8s::Error> {
    claim::release(&cluster.shell, &cluster.id).await?;
    Ok(Outcome::Verified)
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_core::effect::{DECISION_AGE_MAX_MS, Promotion};

    #[test]
    fn promises_are_given_time_and_what_follows_them_as_well() {
        let member = valkeeper_core::ids::MemberId::new(0, 1);
        let promise = Effect::Promise { member, address: "10.0.0.1".into(), candidate: member };
        let server =
            valkeeper_core::effect::Server { member, run_id: "r".into(), address: "10.0.0.1".into() };
        let replid = valkeeper_core::ids::ReplId("a".into());
        let promote = Effect::Promote { server, replid, offset: 1, consents: 0, by: Promotion::Detach };
        let [alone, promised] = [false, true].map(|promised| promote.age_max_ms(promised).unwrap());
        assert_eq!(alone, DECISION_AGE_MAX_MS);
        let brief = Effect::Brief { member, address: "10.0.0.1".into() };
        for asked in [&promise, &brief] {
            assert!(Duration::from_millis(promised - alone) > bound(asked, true), "{asked}");
        }
        assert_eq!(bound(&brief, false), EFFECT_MAX, "nobody waits for it");
        assert!(is_promise(&promise) && !is_promise(&promote));
    }

    #[test]
    fn a_precondition_that_does_not_hold_is_no_failure() {
        let conflict = k8s::Error::Conflict { what: "replace".into(), message: "modified".into() };
        assert!(matches!(of_error(&conflict), Outcome::Superseded(_)));
        let silent = k8s::Error::Ambiguous { what: "replace".into(), source: None };
        assert!(matches!(of_error(&silent), Outcome::Failed(_)));
    }

    #[test]
    fn a_pod_that_goes_loses_its_name_and_one_that_stays_has_it() {
        let named = |role| labels_of(role)[objects::names::NAMED_LABEL];
        assert_eq!([RoleLabel::Primary, RoleLabel::Replica].map(named), [Some("true"); 2]);
        assert_eq!(named(RoleLabel::Leaving), None);
        assert_eq!(labels_of(RoleLabel::Leaving)[objects::names::ROLE_LABEL], Some("leaving"));
    }
}

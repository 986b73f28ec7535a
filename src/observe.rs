//! One look at a cluster: facts and readings, no conclusions. Everything but the members' servers comes from the caches, so a
//! look costs the API server nothing. What nobody could look at is left out or Unknown, never Absent.

use crate::{
    api::{Parsed, parse_all, v1alpha1::ValkeyCluster},
    cluster::{Cluster, Pace},
    k8s::{self, slice, watch::node_ready},
    objects,
    owned::{self, NotRendered},
    reconcile::Error,
    valkey::Look,
};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::ResourceExt;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};
use valkeeper_core::{
    ids::{Digest, MemberId, ShardId},
    observation::{
        ContainerPhase, Evidence, MemberFacts, NodeHealth, ObjectFacts, ObjectRef, Observed, PodFacts,
        Reading, RoleLabel, RouteFacts, Seen, ServerFacts, SpecFact, Why,
    },
};

/// Looks at everything; `None` if the resource is gone.
///
/// # Errors
/// [`Error::Deposed`] if a server knows a later writer.
pub async fn look(cluster: &mut Cluster, pace: Pace) -> Result<Option<Seen>, Error> {
    let (namespace, name) = cluster.id.owner.clone();
    let resource = cluster.shell.world.clusters.get(&namespace, &name);
    let Some(resource) = resource.filter(|r| r.uid().as_deref() == Some(&cluster.id.uid)) else {
        return Ok(None);
    };
    let (spec, objects) = spec_and_objects(cluster, &resource).await;
    let pods = pods(cluster, &spec);
    let looks = servers(cluster, &pods, pace).await?;
    let (members, evidence) = members(cluster, pods, looks);
    let routes = routes(cluster, &spec);
    let executed = cluster.executed.clone();
    Ok(Some(Seen { spec: Some(spec), members, routes, objects, evidence, executed }))
}

/// The spec, and the objects that it renders to. Without a usable spec there is nothing to compare objects with.
async fn spec_and_objects(
    cluster: &mut Cluster,
    resource: &ValkeyCluster,
) -> (SpecFact, BTreeMap<ObjectRef, ObjectFacts>) {
    let parsed: Parsed = match parse_all(resource, &cluster.shell.defaults) {
        Ok(parsed) => parsed,
        Err(invalid) => return (SpecFact::Invalid(invalid.to_string()), BTreeMap::new()),
    };
    let rendered = owned::render(cluster, resource, &parsed).await;
    let spec = SpecFact::Valid(parsed.desired);
    match rendered {
        Ok(()) => {
            let facts = owned::facts(cluster).await;
            (spec, facts)
        }
        Err(NotRendered::Refused(invalid)) => (SpecFact::Invalid(invalid.to_string()), BTreeMap::new()),
        Err(NotRendered::Unreadable(error)) => {
            tracing::warn!(error = k8s::chain(&error), "a Secret could not be read");
            (spec, BTreeMap::new())
        }
    }
}

/// Members to look at: who shall exist, who exists, and who is known from before. With their pods.
fn pods(cluster: &Cluster, spec: &SpecFact) -> BTreeMap<MemberId, Option<Arc<Pod>>> {
    let (namespace, name) = &cluster.id.owner;
    let world = &cluster.shell.world;
    let desired = match spec {
        SpecFact::Valid(spec) => Some(spec),
        SpecFact::Invalid(_) => cluster.state.spec.as_ref(),
    };
    let mut ids: BTreeSet<MemberId> = desired.into_iter().flat_map(|d| d.members()).collect();
    let existing = world.pods.of(&cluster.id.owner);
    ids.extend(existing.iter().filter_map(|p| objects::names::member_of_pod(name, &p.name_any())));
    ids.extend(cluster.state.members.keys());
    ids.into_iter().map(|id| (id, world.pods.get(namespace, &objects::names::pod(name, id)))).collect()
}

/// What the servers answered, by member. Only who has an address is asked.
async fn servers(
    cluster: &mut Cluster,
    pods: &BTreeMap<MemberId, Option<Arc<Pod>>>,
    pace: Pace,
) -> Result<BTreeMap<MemberId, Observed<Look>>, Error> {
    let addresses: BTreeMap<MemberId, IpAddr> =
        pods.iter().filter_map(|(id, pod)| Some((*id, address(pod.as_deref()?)?.parse().ok()?))).collect();
    if let Some(password) = cluster.owned.operator_password() {
        cluster.links.log_in_as(objects::USER_OPERATOR, password.expose(), cluster.state.epoch);
    }
    cluster.links.follow(&addresses);
    let looks = cluster.links.look(pace).await;
    if let Some(fenced) = cluster.links.deposed() {
        return Err(Error::Deposed(fenced.to_string()));
    }
    if looks.values().any(|look| *look == Observed::Unknown(Why::Unauthorized)) {
        // Someone may have changed the password: read it again.
        cluster.secrets.forget().await;
    }
    Ok(looks)
}

fn members(
    cluster: &Cluster,
    pods: BTreeMap<MemberId, Option<Arc<Pod>>>,
    mut looks: BTreeMap<MemberId, Observed<Look>>,
) -> (BTreeMap<MemberId, MemberFacts>, Evidence) {
    let by_address: BTreeMap<String, MemberId> =
        pods.iter().filter_map(|(id, pod)| Some((address(pod.as_deref()?)?.to_owned(), *id))).collect();
    let mut facts = BTreeMap::new();
    let mut evidence = Evidence::default();
    for (id, pod) in &pods {
        let server = match pod {
            // A process does not outlive its pod.
            None => Observed::Absent,
            Some(pod) if address(pod).is_none() => without_address(pod),
            Some(_) => match looks.remove(id) {
                Some(look) => {
                    let (server, reading) = server(cluster, look, &by_address);
                    evidence.readings.extend(reading.map(|r| (*id, r)));
                    server
                }
                // Not answered while there was something to act on: not looked at, so what is known of it stays.
                None => continue,
            },
        };
        let pod = pod.as_deref().map_or(Observed::Absent, |p| Observed::Present(pod_facts(cluster, p)));
        facts.insert(*id, MemberFacts { pod, server });
    }
    (facts, evidence)
}

/// The server of a pod without an address: a pod that is still pending has never run one.
fn without_address<T>(pod: &Pod) -> Observed<T> {
    match pod.status.as_ref().and_then(|s| s.phase.as_deref()) {
        None | Some("Pending") => Observed::Absent,
        Some(_) => Observed::Unknown(Why::Silent),
    }
}

fn server(
    cluster: &Cluster,
    look: Observed<Look>,
    by_address: &BTreeMap<String, MemberId>,
) -> (Observed<ServerFacts>, Option<Reading>) {
    match look {
        Observed::Present(look) => {
            let taken_at = cluster.shell.clock.at(look.answered_at);
            let (facts, reading) = look.resolved(by_address, taken_at);
            (Observed::Present(facts), Some(reading))
        }
        Observed::Absent => (Observed::Absent, None),
        Observed::Unknown(why) => (Observed::Unknown(why), None),
    }
}

fn address(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.pod_ip.as_deref().filter(|ip| !ip.is_empty())
}

fn pod_facts(cluster: &Cluster, pod: &Pod) -> PodFacts {
    let node = pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default();
    let known = cluster.shell.world.nodes.get("", &node);
    let is_ready = node.is_empty() || known.is_some_and(|n| node_ready(&n));
    let annotation = pod.annotations().get(objects::ANNOTATION_REVISION);
    let statuses = pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten());
    PodFacts {
        uid: pod.uid().unwrap_or_default(),
        address: address(pod).map(str::to_owned),
        node_health: if is_ready { NodeHealth::Ready } else { NodeHealth::NotReady },
        node,
        deleting: pod.metadata.deletion_timestamp.is_some(),
        revision: Digest(annotation.cloned().unwrap_or_default()),
        container: container(statuses.into_iter().find(|s| s.name == objects::names::CONTAINER)),
        role_label: pod.labels().get(objects::names::ROLE_LABEL).and_then(|text| role(text)),
    }
}

fn role(text: &str) -> Option<RoleLabel> {
    [RoleLabel::Primary, RoleLabel::Replica].into_iter().find(|role| role.as_str() == text)
}

fn container(status: Option<&ContainerStatus>) -> ContainerPhase {
    let state = status.and_then(|s| s.state.as_ref());
    match state.map(|s| (&s.running, &s.terminated, &s.waiting)) {
        Some((Some(_), _, _)) => ContainerPhase::Running,
        Some((None, Some(ended), _)) => ContainerPhase::Terminated(ended.exit_code),
        Some((None, None, Some(waiting))) => {
            ContainerPhase::Waiting(waiting.reason.clone().unwrap_or_default())
        }
        Some((None, None, None)) | None => ContainerPhase::Waiting(String::new()),
    }
}

fn routes(cluster: &Cluster, spec: &SpecFact) -> BTreeMap<ShardId, Observed<RouteFacts>> {
    let (namespace, name) = &cluster.id.owner;
    let desired = match spec {
        SpecFact::Valid(spec) => Some(spec),
        SpecFact::Invalid(_) => cluster.state.spec.as_ref(),
    };
    let slices = &cluster.shell.world.slices;
    let shards = desired.into_iter().flat_map(|d| d.shard_ids());
    shards
        .map(|shard| {
            let live = slices.get(namespace, &objects::names::route(name, shard));
            (shard, live.map_or(Observed::Absent, |slice| Observed::Present(slice::facts(&slice))))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStateWaiting};

    fn status(state: ContainerState) -> ContainerStatus {
        ContainerStatus { state: Some(state), ..ContainerStatus::default() }
    }

    #[test]
    fn a_container_says_why_it_waits_and_how_it_ended() {
        let waiting = ContainerStateWaiting { reason: Some("ImagePullBackOff".into()), message: None };
        let state = ContainerState { waiting: Some(waiting), ..ContainerState::default() };
        assert_eq!(container(Some(&status(state))), ContainerPhase::Waiting("ImagePullBackOff".into()));
        let ended = ContainerStateTerminated { exit_code: 137, ..ContainerStateTerminated::default() };
        let state = ContainerState { terminated: Some(ended), ..ContainerState::default() };
        assert_eq!(container(Some(&status(state))), ContainerPhase::Terminated(137));
        assert_eq!(container(None), ContainerPhase::Waiting(String::new()));
    }

    #[test]
    fn a_label_that_is_no_role_is_none() {
        assert_eq!(role("primary"), Some(RoleLabel::Primary));
        assert_eq!(role("leader"), None);
    }
}

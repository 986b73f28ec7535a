//! One look at a cluster: facts and readings, no conclusions. Everything but the members' servers comes from the caches, so a
//! look costs the API server nothing while every pod is made. What nobody could look at is left out or Unknown, never Absent.

mod trouble;

pub use trouble::Troubles;

use crate::{
    api::{Invalid, Parsed, changed, first, parse_all, v1alpha1::ValkeyCluster},
    cluster::{Cluster, Pace},
    k8s::{
        slice,
        watch::{node_cordoned, node_ready},
    },
    objects,
    owned::{self, NotRendered},
    pods::{self, Pods},
    reconcile::Error,
    valkey::{self, Look, MemberLink},
};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::ResourceExt;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;
use valkeeper_core::{
    ids::{Digest, MemberId, ShardId},
    info::RawRole,
    observation::{
        AgentFacts, ContainerPhase, Evidence, MemberFacts, NodeFacts, NodeHealth, ObjectFacts, ObjectRef,
        Observed, PodFacts, Reading, RoleLabel, RouteFacts, Seen, ServerFacts, SpecFact, Why,
    },
    slots::SlotSet,
    spec::{DesiredCluster, Topology},
    steps::reshard::uncounted,
    weights::SlotWeights,
};

/// Looks at everything; `None` if the resource is gone.
///
/// # Errors
/// [`Error::Deposed`] if an agent knows a later writer.
pub async fn look(cluster: &mut Cluster, pace: Pace) -> Result<Option<Seen>, Error> {
    let (namespace, name) = cluster.id.owner.clone();
    let resource = cluster.shell.world.clusters.get(&namespace, &name);
    let Some(resource) = resource.filter(|r| r.uid().as_deref() == Some(&cluster.id.uid)) else {
        return Ok(None);
    };
    let (spec, objects) = spec_and_objects(cluster, &resource).await;
    let pods = pods::look(cluster, wanted_or_known(cluster, &spec)).await;
    let is_there =
        |uid: &str| pods.values().filter_map(Observed::present).any(|pod| pod.uid().as_deref() == Some(uid));
    cluster.troubles.keep(is_there);
    if pods.values().filter_map(Observed::present).any(|pod| is_mounting(pod)) {
        // Kubelet waits for a Secret that is not there, and nobody else says so.
        cluster.secrets.doubt();
    }
    let addresses = addresses(cluster, &pods);
    // Without any spec nothing is decided from what is seen.
    let topology = in_force(cluster, &spec).map_or(Topology::Replication, |desired| desired.topology);
    let (looks, agents) = servers(cluster, &addresses, topology, pace).await?;
    let weights = weights(cluster, &looks, pace).await;
    let (members, evidence) = members(cluster, pods, looks, agents, &addresses);
    let routes = routes(cluster, &spec);
    let executed = cluster.executed.clone();
    Ok(Some(Seen { spec: Some(spec), members, routes, objects, weights, evidence, executed }))
}

/// The spec, and the objects that it renders to.
async fn spec_and_objects(
    cluster: &mut Cluster,
    resource: &ValkeyCluster,
) -> (SpecFact, BTreeMap<ObjectRef, ObjectFacts>) {
    if resource.metadata.deletion_timestamp.is_some() {
        return (SpecFact::Deleting, BTreeMap::new());
    }
    let state = &cluster.state;
    let understood = parse_all(resource, &cluster.shell.defaults).and_then(|parsed| {
        let allowed = match &state.spec {
            Some(known) => changed(known, &parsed),
            None => first(resource),
        };
        allowed.map(|()| parsed)
    });
    let parsed: Parsed = match understood {
        Ok(parsed) => parsed,
        Err(invalid) => return refused(cluster, resource, &invalid).await,
    };
    let spec = SpecFact::Valid(parsed.desired.clone());
    let desired = kept(cluster, &parsed.desired);
    match owned::render(cluster, resource, &Parsed { desired, ..parsed }).await {
        Ok(()) => {
            let facts = owned::facts(cluster).await;
            (spec, facts)
        }
        Err(NotRendered::Refused(invalid)) => refused(cluster, resource, &invalid).await,
        Err(missing) => {
            missing.warn();
            (spec, BTreeMap::new())
        }
    }
}

/// Without a usable spec there is nothing to compare objects with, but for the certificates of who runs by the last one.
async fn refused(
    cluster: &mut Cluster,
    resource: &ValkeyCluster,
    invalid: &Invalid,
) -> (SpecFact, BTreeMap<ObjectRef, ObjectFacts>) {
    let facts = match owned::render_vital(cluster, resource).await {
        Ok(()) => owned::rendered_facts(cluster).await,
        Err(missing) => {
            missing.warn();
            BTreeMap::new()
        }
    };
    (SpecFact::Invalid(invalid.to_string()), facts)
}

/// The spec to go by: what is refused or about to go leaves the last valid one in force.
fn in_force(cluster: &Cluster, spec: &SpecFact) -> Option<DesiredCluster> {
    match spec {
        SpecFact::Valid(spec) => Some(kept(cluster, spec)),
        SpecFact::Invalid(_) | SpecFact::Deleting => cluster.state.desired(cluster.clock.now()),
    }
}

/// What is wanted, with every shard that has to be there: one that still owns slots stays until it has given them.
fn kept(cluster: &Cluster, wanted: &DesiredCluster) -> DesiredCluster {
    DesiredCluster { shards: cluster.state.shards_kept(wanted.shards, cluster.clock.now()), ..wanted.clone() }
}

/// Members to look at: who shall exist, who exists, and who is known from before.
fn wanted_or_known(cluster: &Cluster, spec: &SpecFact) -> BTreeSet<MemberId> {
    let (_, name) = &cluster.id.owner;
    let mut ids: BTreeSet<MemberId> = in_force(cluster, spec).iter().flat_map(|d| d.members()).collect();
    let existing = cluster.shell.world.pods.of(&cluster.id.owner);
    ids.extend(existing.iter().filter_map(|p| objects::names::member_of_pod(name, &p.name_any())));
    ids.extend(cluster.state.members.keys());
    ids
}

/// Where the members are. Of whose pod nothing can be learned, it is where it was: its server may still say how it is.
fn addresses(cluster: &Cluster, pods: &Pods) -> BTreeMap<MemberId, IpAddr> {
    let of = |(id, pod): (&MemberId, &Observed<Arc<Pod>>)| {
        let address = match pod {
            Observed::Present(pod) => address(pod)?.parse().ok()?,
            Observed::Unknown(_) => cluster.links.get(*id)?.target().address,
            Observed::Absent => return None,
        };
        Some((*id, address))
    };
    pods.iter().filter_map(of).collect()
}

/// Wait for the first word of agents that were not asked before, when nothing is to be acted on: a handshake on a busy node.
/// The first look of a writer waits so long for who is gone, and decides without them.
const FIRST_WORD_WAIT: Duration = Duration::from_millis(600);

/// The same when there is something to act on.
const FIRST_WORD_WAIT_URGENT: Duration = Duration::from_millis(50);

type Looks = BTreeMap<MemberId, Observed<Look>>;
type Agents = BTreeMap<MemberId, Observed<AgentFacts>>;

/// What the servers answered and what their agents have said, by member. Only who has an address is asked.
async fn servers(
    cluster: &mut Cluster,
    addresses: &BTreeMap<MemberId, IpAddr>,
    topology: Topology,
    pace: Pace,
) -> Result<(Looks, Agents), Error> {
    if let Some(password) = cluster.owned.operator_password() {
        cluster.links.log_in_as(objects::USER_OPERATOR, password.expose());
    }
    cluster.links.follow(addresses, topology);
    cluster.agents.follow(addresses);
    let first_word = match pace {
        Pace::Urgent => FIRST_WORD_WAIT_URGENT,
        Pace::Normal => FIRST_WORD_WAIT,
    };
    let (looks, agents) = tokio::join!(cluster.links.look(pace), cluster.agents.look(first_word));
    if let Some(theirs) = cluster.agents.board().deposed() {
        return Err(Error::Deposed { theirs });
    }
    for member in addresses.keys() {
        // What is wrong with a server is often wrong with its agent, too: it is asked now and not when its silence is long.
        if looks.get(member).is_none_or(|look| look.present().is_none())
            && let Some(link) = cluster.agents.get(*member)
        {
            link.check();
        }
    }
    let board = cluster.agents.board();
    let told: Vec<_> = addresses.keys().map(|member| (*member, board.mounted(*member))).collect();
    let said = told.into_iter().filter(|(_, mounted)| !mounted.is_empty());
    let changed = said.filter(|(member, mounted)| cluster.owned.mounts(*member, mounted.clone())).count();
    if changed > 0 || looks.values().any(|look| *look == Observed::Unknown(Why::Unauthorized)) {
        // Someone has changed a Secret, or may have: all are read again.
        cluster.secrets.doubt();
    }
    Ok((looks, agents))
}

/// What is in the slots of those that have to count it before any move. Where there is something to act on it waits for the next look.
async fn weights(
    cluster: &mut Cluster,
    looks: &Looks,
    pace: Pace,
) -> BTreeMap<MemberId, Option<SlotWeights>> {
    match pace {
        Pace::Urgent => BTreeMap::new(),
        Pace::Normal => {
            let slots = slots_to_count(&uncounted(&cluster.state), looks);
            let mut weighed = cluster.links.weigh(&slots).await;
            // Whose connection has ended was not asked: the next look says what became of it.
            weighed.retain(|_, told| *told != Err(valkey::Error::Closed));
            weighed.into_iter().map(|(member, told)| (member, counted(member, told))).collect()
        }
    }
}

/// The slots that their nodes say are their own. A server that loads has not all of its keys yet, and who is not the primary any more, or is at
/// the gate, says nothing of its shard.
fn slots_to_count(uncounted: &BTreeSet<MemberId>, looks: &Looks) -> BTreeMap<MemberId, SlotSet> {
    let of = |member: &MemberId| {
        let look =
            looks.get(member)?.present().filter(|look| !look.loading && look.role == RawRole::Primary)?;
        let node = look.node.as_ref().filter(|node| node.primary.is_none())?;
        Some((*member, node.slots.clone()))
    };
    uncounted.iter().filter_map(of).collect()
}

fn counted(member: MemberId, told: Result<SlotWeights, valkey::Error>) -> Option<SlotWeights> {
    let untold = |why: &valkey::Error| {
        tracing::warn!(%member, %why, "a node does not say how many keys are in its slots: they count like others'");
    };
    told.inspect_err(untold).ok()
}

fn members(
    cluster: &Cluster,
    pods: Pods,
    mut looks: Looks,
    mut agents: Agents,
    addresses: &BTreeMap<MemberId, IpAddr>,
) -> (BTreeMap<MemberId, MemberFacts>, Evidence) {
    let by_address: BTreeMap<String, MemberId> =
        addresses.iter().map(|(id, a)| (a.to_string(), *id)).collect();
    let mut facts = BTreeMap::new();
    let mut evidence = Evidence::default();
    for (id, pod) in pods {
        let mut node = None;
        let server = match &pod {
            // A process does not outlive its pod.
            Observed::Absent => Observed::Absent,
            Observed::Present(pod) if address(pod).is_none() => without_address(pod),
            Observed::Present(_) | Observed::Unknown(_) => match looks.remove(&id) {
                // Its agent saw the process end: no second witness is needed.
                Some(Observed::Unknown(_)) | None if has_exited(cluster, id) => Observed::Absent,
                Some(look) => {
                    let trouble = cluster.links.get(id).and_then(MemberLink::trouble);
                    let look = with_container(look, trouble, pod.present().map(|p| container_of(p)));
                    let (server, reading, said) = server(cluster, look, &by_address);
                    evidence.readings.extend(reading.map(|r| (id, r)));
                    node = said;
                    server
                }
                // Not answered while there was something to act on: not looked at, so what is known of it stays.
                None if pod.present().is_some() || addresses.contains_key(&id) => {
                    let Some(known) = known_server(cluster, id, &pod) else { continue };
                    known
                }
                // No address is known either.
                None => Observed::Unknown(Why::ApiError),
            },
        };
        let pod = match pod {
            Observed::Present(pod) => Observed::Present(pod_facts(cluster, &pod)),
            Observed::Absent => Observed::Absent,
            Observed::Unknown(why) => Observed::Unknown(why),
        };
        let said = agents.remove(&id).unwrap_or(Observed::Unknown(Why::NotLooked));
        let agent = match &pod {
            Observed::Absent => Observed::Absent,
            Observed::Present(facts) if said.is_unknown() && has_no_process(facts) => Observed::Absent,
            Observed::Present(_) | Observed::Unknown(_) => said,
        };
        if server.is_unknown() {
            // Whichever of the two was heard last: the agent may have been confirmed when it spoke.
            let heard = cluster.links.answered_at(id).max(cluster.agents.board().heard_at(id));
            evidence.last_answers.extend(heard.map(|at| (id, cluster.clock.at(at))));
        }
        facts.insert(id, MemberFacts { pod, server, agent, node });
    }
    (facts, evidence)
}

/// True if the kubelet says that nothing runs in the pod, or it was never given an address to run at.
fn has_no_process(pod: &PodFacts) -> bool {
    match pod.container {
        ContainerPhase::Waiting(_) | ContainerPhase::Terminated(_) => true,
        ContainerPhase::Running => false,
    }
}

/// What is known of the server, if it is the same pod's.
fn known_server(cluster: &Cluster, id: MemberId, pod: &Observed<Arc<Pod>>) -> Option<Observed<ServerFacts>> {
    let known = &cluster.state.members.get(&id)?.facts;
    let uid = known.pod.present().map(|pod| pod.uid.as_str());
    (pod.present()?.uid().as_deref() == uid).then(|| known.server.clone())
}

/// True if the agent said that the process which is known here has ended.
fn has_exited(cluster: &Cluster, id: MemberId) -> bool {
    let known = cluster.state.members.get(&id).and_then(|member| member.server());
    known.is_some_and(|server| cluster.agents.board().has_exited(id, &server.run_id))
}

/// A refusal where no connection was ever held may be a firewall's. It is death if the kubelet says, too, that the server does
/// not run: so does a writer that has just begun find a primary that was dead before.
fn with_container(
    look: Observed<Look>,
    trouble: Option<valkey::Error>,
    container: Option<ContainerPhase>,
) -> Observed<Look> {
    let runs = match container {
        Some(ContainerPhase::Waiting(_) | ContainerPhase::Terminated(_)) => false,
        Some(ContainerPhase::Running) | None => true,
    };
    let refused = look == Observed::Unknown(Why::Silent) && trouble == Some(valkey::Error::Refused);
    if refused && !runs { Observed::Absent } else { look }
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
) -> (Observed<ServerFacts>, Option<Reading>, Option<NodeFacts>) {
    match look {
        Observed::Present(Look { answered_at, info, node }) => {
            let (facts, reading) = info.resolved(by_address, cluster.clock.at(answered_at));
            (Observed::Present(facts), Some(reading), node)
        }
        Observed::Absent => (Observed::Absent, None, None),
        Observed::Unknown(why) => (Observed::Unknown(why), None, None),
    }
}

fn address(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.pod_ip.as_deref().filter(|ip| !ip.is_empty())
}

fn pod_facts(cluster: &Cluster, pod: &Pod) -> PodFacts {
    let node = pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default();
    let known = cluster.shell.world.nodes.get("", &node);
    let is_ready = node.is_empty() || known.as_deref().is_some_and(node_ready);
    let annotation = pod.annotations().get(objects::ANNOTATION_REVISION);
    PodFacts {
        uid: pod.uid().unwrap_or_default(),
        address: address(pod).map(str::to_owned),
        node_health: if is_ready { NodeHealth::Ready } else { NodeHealth::NotReady },
        node,
        cordoned: known.as_deref().is_some_and(node_cordoned),
        deleting: pod.metadata.deletion_timestamp.is_some(),
        revision: Digest(annotation.cloned().unwrap_or_default()),
        container: container_of(pod),
        role_label: role_label(pod),
        trouble: cluster.troubles.told(pod, Instant::now()),
    }
}

/// A pod that stays and has no name, as its template is an older one or somebody took the label away, is labelled anew.
fn role_label(pod: &Pod) -> Option<RoleLabel> {
    let label = |key| pod.labels().get(key);
    let is_whole = pod.metadata.deletion_timestamp.is_some() || label(objects::names::NAMED_LABEL).is_some();
    label(objects::names::ROLE_LABEL).filter(|_| is_whole).and_then(|text| role(text))
}

fn role(text: &str) -> Option<RoleLabel> {
    [RoleLabel::Primary, RoleLabel::Replica, RoleLabel::Leaving]
        .into_iter()
        .find(|role| role.as_str() == text)
}

fn container_of(pod: &Pod) -> ContainerPhase {
    let mut statuses = pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten());
    container(statuses.find(|s| s.name == objects::names::CONTAINER))
}

/// True of a pod that has a node and whose first container has not begun: its volumes are being mounted.
fn is_mounting(pod: &Pod) -> bool {
    let reasons = ["ContainerCreating", "PodInitializing"];
    let first = pod.status.as_ref().and_then(|s| s.init_container_statuses.as_ref()?.first());
    matches!(container(first), ContainerPhase::Waiting(reason) if reasons.contains(&reason.as_str()))
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
    let slices = &cluster.shell.world.slices;
    let has_routes = |desired: &DesiredCluster| match desired.topology {
        Topology::Replication => true,
        // Its clients ask any node.
        Topology::Cluster => false,
    };
    let desired = in_force(cluster, spec).filter(has_routes);
    let shards = desired.iter().flat_map(|d| d.shard_ids());
    shards
        .map(|shard| {
            let live = slices.get(namespace, &objects::names::route(name, shard));
            let live = live.filter(|slice| owned::is_own_route(cluster, slice));
            (shard, live.map_or(Observed::Absent, |slice| Observed::Present(slice::facts(&slice))))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStateWaiting};
    use serde_json::json;
    use valkeeper_core::{
        ids::ReplId,
        info::{Info, RawRole},
    };

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
    fn a_refusal_alone_is_death_only_where_no_container_runs() {
        let silent = Observed::Unknown(Why::Silent);
        let of = |trouble, container| with_container(silent.clone(), Some(trouble), container);
        let back_off = || Some(ContainerPhase::Waiting("CrashLoopBackOff".into()));
        assert_eq!(of(valkey::Error::Refused, back_off()), Observed::Absent);
        assert_eq!(of(valkey::Error::Refused, Some(ContainerPhase::Terminated(137))), Observed::Absent);
        assert_eq!(of(valkey::Error::Refused, Some(ContainerPhase::Running)), silent);
        assert_eq!(of(valkey::Error::Refused, None), silent);
        assert_eq!(of(valkey::Error::Silent, back_off()), silent);
    }

    #[test]
    fn only_who_is_asked_and_has_answered_with_all_of_its_keys_counts_what_is_in_its_own_slots() {
        let look = |loading| {
            let info = Info {
                run_id: String::new(),
                version: "9.1.2".into(),
                port: 6379,
                gate: None,
                role: RawRole::Primary,
                loading,
                replid: ReplId(String::new()),
                replid2: None,
                replid2_offset: None,
                offset: 0,
                last_io_ms: None,
                replicas_online: 0,
                keys: None,
            };
            let node = json!({
                "id": "a".repeat(40), "primary": null, "epoch": 1, "slots": "0-9 12", "knows": {}, "covered": 11,
            });
            let node = Some(serde_json::from_value(node).unwrap());
            Observed::Present(Look { answered_at: tokio::time::Instant::now(), info, node })
        };
        let [answers, loads, silent, unasked, gone] = [0, 1, 2, 3, 4].map(|shard| MemberId::new(shard, 0));
        let silence = Observed::Unknown(Why::Silent);
        let (there, loading) = (look(false), look(true));
        let looks =
            Looks::from([(answers, there.clone()), (loads, loading), (silent, silence), (unasked, there)]);
        let asked = slots_to_count(&[answers, loads, silent, gone].into(), &looks);
        assert_eq!(asked, BTreeMap::from([(answers, "0-9 12".parse().unwrap())]));
    }

    #[test]
    fn a_pod_that_stays_without_a_name_is_labelled_anew() {
        let pod = |labels: serde_json::Value, deleted: Option<&str>| -> Pod {
            let metadata = json!({ "name": "a", "labels": labels, "deletionTimestamp": deleted });
            serde_json::from_value(json!({ "metadata": metadata })).unwrap()
        };
        let (role, named) = (objects::names::ROLE_LABEL, objects::names::NAMED_LABEL);
        let whole = json!({ role: "primary", named: "true" });
        assert_eq!(role_label(&pod(whole, None)), Some(RoleLabel::Primary));
        assert_eq!(role_label(&pod(json!({ role: "primary" }), None)), None);
        let gone = Some("2026-01-01T00:00:00Z");
        assert_eq!(role_label(&pod(json!({ role: "leaving" }), gone)), Some(RoleLabel::Leaving));
    }

    #[test]
    fn a_label_that_is_no_role_is_none() {
        assert_eq!(role("primary"), Some(RoleLabel::Primary));
        assert_eq!(role("leaving"), Some(RoleLabel::Leaving));
        assert_eq!(role("leader"), None);
    }
}

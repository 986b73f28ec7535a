//! What differs between topologies: how to find, promote, attach. One exhaustive match each.

pub mod choice;
mod cluster;
pub mod half_moved;
mod replication;
pub mod reshard;

pub use cluster::{is_electable, is_heard, is_shut_out};

use crate::{
    agent::{Brief, isolation::MEMBERS_MIN},
    decide::View,
    decision::{Decision, Discard, Scope},
    effect::{Effect, Server},
    ids::{MemberId, Seq, ShardId},
    observation::{Link, NodeHealth, RoleLabel, ServerRole, Source},
    spec::{DesiredCluster, Topology},
    state::ClusterState,
};

/// A live primary pings its replicas every second (`repl-ping-replica-period 1`) and INFO counts whole seconds: below
/// this, a replica may still hear from it. Milliseconds.
pub const HEARS_BELOW_MS: i64 = 2_000;

/// What is known of the member that holds a shard's grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It answers and is primary.
    Serving,
    /// Nobody has looked in this epoch.
    NotLooked,
    /// It does not answer, and nobody knows why.
    Silent,
    /// Its process is proven gone.
    Gone,
    /// It was restarted and holds at the boot gate.
    Holding,
    /// It follows a member.
    Following,
    /// It follows an address at which no member is, without a link: someone who is gone.
    Stranded,
    /// It follows a server outside the cluster.
    FollowingForeign,
}

/// The member that holds the shard's grant and is seen to be primary.
pub fn serving_primary(view: &View<'_>, shard: ShardId) -> Option<MemberId> {
    let (holder, _) = view.shard(shard).holder()?;
    view.member(holder).filter(|m| m.is_primary()).map(|_| holder)
}

/// Effects that make `chosen` the primary of its shard after an unplanned loss: promote, then route, then the others.
pub fn promote(view: &View<'_>, chosen: MemberId) -> Vec<Effect> {
    match view.spec.topology {
        Topology::Replication => replication::promote(view, chosen),
        Topology::Cluster => cluster::promote(view, chosen),
    }
}

/// Effects of a planned promotion that loses nothing.
pub fn hand_over(view: &View<'_>, from: MemberId, to: MemberId) -> Vec<Effect> {
    match view.spec.topology {
        Topology::Replication => replication::hand_over(view, from, to),
        Topology::Cluster => cluster::hand_over(view, from, to),
    }
}

/// The terms under which the shard's holder has its grant, as every agent shall know them.
pub fn brief(view: &View<'_>, shard: ShardId) -> Option<Brief> {
    let (holder, grant) = view.shard(shard).holder()?;
    let roster: Vec<MemberId> = view.wanted(shard).collect();
    Some(Brief { grant, holder: Some(holder), isolation_ms: isolation_ms(view.spec, roster.len()), roster })
}

/// What the effects of a decision that `state` has folded tell the agents of its shard: the grant it gives, or the one in force.
pub fn terms(state: &ClusterState, decision: &Decision) -> Brief {
    let Scope::Shard(shard) = decision.scope else { return Brief::default() };
    let known = state.shards.get(&shard);
    let given = decision.grant.and_then(|id| Some((id, *known?.grants.get(&id)?)));
    let held = given.or_else(|| known.and_then(|s| s.holder()));
    let (holder, grant) = held.map_or((None, Seq(0)), |(member, grant)| (Some(member), grant));
    let desired = state.desired(state.head_time);
    let roster: Vec<MemberId> =
        desired.iter().flat_map(|spec| spec.members().filter(|m| m.shard == shard)).collect();
    let isolation_ms = desired.as_ref().map_or(0, |spec| isolation_ms(spec, roster.len()));
    Brief { grant, holder, roster, isolation_ms }
}

/// How long a holder among `members` may accept writes unconfirmed, in milliseconds; 0: for ever.
pub fn isolation_ms(spec: &DesiredCluster, members: usize) -> i64 {
    if members < MEMBERS_MIN { 0 } else { spec.failover.isolation_ms() }
}

/// True if `member` follows `primary`, linked or not: by address, or in a Valkey Cluster by node, wherever that is.
pub fn follows(view: &View<'_>, member: MemberId, primary: MemberId) -> bool {
    match view.spec.topology {
        Topology::Replication => {
            replica_link(view, member).is_some_and(|(source, _)| source == Source::Member(primary))
        }
        Topology::Cluster => cluster::follows(view, member, primary),
    }
}

/// The effect that makes `member` follow `primary`; `None` if either has no address or the member does not answer.
pub fn attach(view: &View<'_>, member: MemberId, primary: MemberId) -> Option<Effect> {
    match view.spec.topology {
        Topology::Replication => replication::attach(view, member, primary),
        Topology::Cluster => cluster::attach(view, member, primary),
    }
}

/// True if the member serves its purpose: primary, or linked to the primary and complete.
pub fn is_ready(view: &View<'_>, member: MemberId, primary: MemberId) -> bool {
    match view.spec.topology {
        Topology::Replication => replication::is_ready(view, member, primary),
        Topology::Cluster => {
            replication::is_ready(view, member, primary) && cluster::is_settled(view, member, primary)
        }
    }
}

/// True if clients can find the primary of a shard once there is one: its slice is there, or they ask the nodes.
pub fn can_be_routed(view: &View<'_>, shard: ShardId) -> bool {
    match view.spec.topology {
        Topology::Replication => !view.shard(shard).route.is_absent(),
        Topology::Cluster => true,
    }
}

/// True if clients are sent to `primary`.
pub fn is_routed(view: &View<'_>, primary: MemberId) -> bool {
    match view.spec.topology {
        Topology::Replication => {
            view.shard(primary.shard).route.present().is_some() && route(view, primary).is_none()
        }
        Topology::Cluster => true,
    }
}

/// The effect that moves the write route to `to`, if the slice is known and lists another address. A Valkey Cluster has none.
pub fn route(view: &View<'_>, to: MemberId) -> Option<Effect> {
    let address = view.member(to)?.address()?.to_owned();
    let shard = view.shard(to.shard);
    let route = shard.route.present()?;
    (route.address.as_ref() != Some(&address)).then(|| Effect::Route {
        shard: to.shard,
        to,
        address,
        resource_version: route.resource_version.clone(),
    })
}

/// The label effects that say who is primary now.
pub fn label(view: &View<'_>, member: MemberId, role: RoleLabel) -> Option<Effect> {
    let pod = view.member(member)?.facts.pod.present()?;
    (pod.role_label != Some(role) && !pod.deleting).then(|| Effect::Label {
        member,
        pod_uid: pod.uid.clone(),
        role,
    })
}

/// The process of a member, as an effect names it.
pub fn server(view: &View<'_>, member: MemberId) -> Option<Server> {
    let known = view.member(member)?;
    Some(Server { member, address: known.address()?.to_owned(), run_id: known.server()?.run_id.clone() })
}

/// What a member has that its rightful primary has not, and that its next synchronisation throws away.
pub fn discard(view: &View<'_>, member: MemberId, primary: MemberId) -> Option<Discard> {
    let (facts, reading) = (view.member(member)?.server()?, view.reading(member)?);
    if let ServerRole::Replica { source: Source::Gate { had_history: false }, link: _ } = facts.role {
        return None;
    }
    let rightful = view.member(primary)?.server()?;
    let offset = reading.offset;
    let kept_offset = if facts.replid == rightful.replid {
        view.reading(primary).map(|r| r.offset)
    } else if Some(&facts.replid) == rightful.replid2.as_ref() {
        // second_repl_offset is the first offset that is no longer shared.
        rightful.replid2_offset.map(|o| o - 1)
    } else {
        None
    };
    let loses = offset > 0 && kept_offset.is_none_or(|kept| kept < offset);
    loses.then(|| Discard { member, replid: facts.replid.clone(), offset, kept_offset })
}

/// The condition of a member that holds a grant.
pub fn condition(view: &View<'_>, holder: MemberId) -> Condition {
    use crate::observation::{Observed, Why};
    let Some(member) = view.member(holder) else {
        return Condition::NotLooked;
    };
    match &member.facts.server {
        Observed::Unknown(Why::NotLooked) => Condition::NotLooked,
        Observed::Unknown(Why::Silent | Why::Unauthorized | Why::Garbled | Why::ApiError) => {
            Condition::Silent
        }
        Observed::Absent => Condition::Gone,
        Observed::Present(facts) => match &facts.role {
            ServerRole::Primary => Condition::Serving,
            ServerRole::Replica { source: Source::Gate { .. }, link: _ } => Condition::Holding,
            ServerRole::Replica { source: Source::Member(_), link: _ } => Condition::Following,
            ServerRole::Replica { source: Source::Foreign(_), link: Link::Down } => Condition::Stranded,
            ServerRole::Replica { source: Source::Foreign(_), link: Link::Up | Link::Syncing } => {
                Condition::FollowingForeign
            }
        },
    }
}

/// True if the member's pod is there, is not being deleted and runs on a node whose kubelet reports: it can be deleted
/// and will be seen gone.
pub fn can_be_fenced(view: &View<'_>, member: MemberId) -> bool {
    let pod = view.member(member).and_then(|m| m.facts.pod.present());
    pod.is_some_and(|p| p.node_health == NodeHealth::Ready)
}

/// True if the member's pod is on a node that takes no new pods.
pub fn is_cordoned(view: &View<'_>, member: MemberId) -> bool {
    view.member(member).and_then(|m| m.facts.pod.present()).is_some_and(|p| p.cordoned)
}

/// The source and link of a member that answers as replica.
pub fn replica_link(view: &View<'_>, member: MemberId) -> Option<(Source, Link)> {
    match &view.member(member)?.server()?.role {
        ServerRole::Primary => None,
        ServerRole::Replica { source, link } => Some((source.clone(), *link)),
    }
}

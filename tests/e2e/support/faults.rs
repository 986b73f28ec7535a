//! What happens to a ValkeyCluster while clients use it, from a killed server to a new image, whatever its topology.

use super::{
    MANAGER,
    clients::{Topology, now_ms},
    nodes::Nodes,
    operator::LOCAL_VALKEY_IMAGE,
    process::kill_server,
    resp::Role,
    subject::{Member, PATIENCE, Subject},
    wait::until,
};
use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api, Client,
    api::{EvictParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use std::{collections::HashSet, time::Duration};

/// How long a drain tries: a budget may refuse until others are back, and on a cordoned node they are not.
const DRAIN_MAX: Duration = Duration::from_secs(20);

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A primary's server ends without a word.
    Kill,
    /// A primary's pod is deleted.
    Deleted,
    /// A primary's node is cordoned, and its pods are evicted.
    Drained,
    /// Another member is asked to be primary.
    Switchover,
    /// Every pod is asked to be another.
    Restart,
    /// Every pod is to have another image.
    Image,
    /// Every pod is deleted at once.
    AllDeleted,
}

impl Fault {
    /// All of them.
    pub const ALL: [Fault; 7] = [
        Fault::Kill,
        Fault::Deleted,
        Fault::Drained,
        Fault::Switchover,
        Fault::Restart,
        Fault::Image,
        Fault::AllDeleted,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Fault::Kill => "kill",
            Fault::Deleted => "deleted",
            Fault::Drained => "drained",
            Fault::Switchover => "switchover",
            Fault::Restart => "restart",
            Fault::Image => "image",
            Fault::AllDeleted => "all-deleted",
        }
    }

    /// True if nobody was told before, so that what is on its way to replicas may be lost.
    pub fn is_sudden(self) -> bool {
        match self {
            Fault::Kill => true,
            Fault::Deleted
            | Fault::Drained
            | Fault::Switchover
            | Fault::Restart
            | Fault::Image
            | Fault::AllDeleted => false,
        }
    }
}

/// When it happened, in milliseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub struct Met {
    /// It began.
    pub begun_ms: u64,
    /// All was well again by everyone's word.
    pub well_ms: u64,
}

/// Where it happens.
pub struct Ground<'a> {
    /// The ValkeyCluster.
    pub subject: &'a Subject,
    /// Its topology.
    pub topology: Topology,
    /// Its spec.
    pub spec: Value,
    /// Replicas of each shard.
    pub replicas: usize,
}

impl Ground<'_> {
    /// Waits until all is as the spec wants it, and a primary can be lost.
    pub async fn settled(&self) -> anyhow::Result<Member> {
        self.subject.ready().await?;
        match self.topology {
            Topology::Replication => self.subject.protected(PATIENCE).await,
            Topology::Cluster => {
                Nodes::of(self.subject).await?.settled(self.replicas, PATIENCE).await?;
                self.of_shard(|role| *role == Role::Primary).await
            }
        }
    }

    /// The first member of the shard that faults hit whose role is as wanted.
    async fn of_shard(&self, wanted: impl Fn(&Role) -> bool) -> anyhow::Result<Member> {
        let prefix = match self.topology {
            Topology::Replication => format!("{}-0-", self.subject.name),
            Topology::Cluster => format!("{}-1-", self.subject.name),
        };
        let roles = self.subject.roles().await?;
        let found = roles.into_iter().find(|(member, role)| member.name.starts_with(&prefix) && wanted(role));
        found.map(|(member, _)| member).context("no member has that role")
    }

    /// Makes it happen, and waits until all is well again by everyone's word.
    pub async fn meet(&self, fault: Fault) -> anyhow::Result<Met> {
        let subject = self.subject;
        let primary = self.settled().await?;
        let all: HashSet<String> = subject.members().await?.into_iter().map(|member| member.uid).collect();
        let mut gone = HashSet::new();
        let begun = now_ms()?;
        match fault {
            Fault::Kill => drop(kill_server(subject.place, &subject.namespace, &primary)?),
            Fault::Deleted => {
                subject.delete_pod(&primary.name).await?;
                gone.insert(primary.uid);
            }
            Fault::Drained => {
                self.drain(&primary.name).await?;
                gone.insert(primary.uid);
            }
            Fault::Switchover => self.switch_over().await?,
            Fault::Restart => {
                subject.annotate("valkeeper.io/restart", &format!("{begun}")).await?;
                gone = all;
            }
            Fault::Image => {
                let mut other = self.spec.clone();
                other["image"] = json!(self.other_image(&primary).await?);
                subject.apply(&other).await?;
                gone = all;
            }
            Fault::AllDeleted => {
                for member in subject.members().await? {
                    subject.delete_pod(&member.name).await?;
                }
                gone = all;
            }
        }
        until("pods to be replaced", PATIENCE, || async {
            let members = subject.members().await?;
            match members.iter().filter(|member| gone.contains(&member.uid)).count() {
                0 => Ok(()),
                left => bail!("{left} are there still"),
            }
        })
        .await?;
        self.settled().await?;
        Ok(Met { begun_ms: begun, well_ms: now_ms()? })
    }

    /// The same server under another name: pods are replaced for it, and nothing else changes.
    async fn other_image(&self, primary: &Member) -> anyhow::Result<String> {
        let mut connection = self.subject.connect(primary, Duration::from_secs(2)).await?;
        let ask = move || connection.info("server", "valkey_version");
        let version = tokio::task::spawn_blocking(ask).await??.context("no version")?;
        let (repository, _) = LOCAL_VALKEY_IMAGE.rsplit_once(':').context("an image without a tag")?;
        Ok(format!("{repository}:{version}"))
    }

    async fn switch_over(&self) -> anyhow::Result<()> {
        let is_replica = |role: &Role| match role {
            Role::Replica { of: _, link } => link == "connected",
            Role::Primary => false,
        };
        let to = self.of_shard(is_replica).await?;
        let place = to.name.strip_prefix(&format!("{}-", self.subject.name)).context("no such member")?;
        // The wish stays with the resource, but comes true once: another one must have another text.
        let token = std::time::UNIX_EPOCH.elapsed()?.as_nanos();
        self.subject.annotate("valkeeper.io/switchover", &format!("{place}@{token:x}")).await?;
        until(&format!("{} to be primary", to.name), PATIENCE, || async {
            match self.subject.roles().await?.iter().find(|(member, _)| member.name == to.name) {
                Some((_, Role::Primary)) => Ok(()),
                other => bail!("it is {other:?}"),
            }
        })
        .await
        .map(|_| ())
    }

    async fn drain(&self, primary: &str) -> anyhow::Result<()> {
        let nodes = self.subject.nodes().await?;
        let node = nodes.get(primary).context("the primary has no node")?;
        let names: Vec<String> =
            nodes.iter().filter(|(_, n)| *n == node).map(|(name, _)| name.clone()).collect();
        cordon(&self.subject.client, node, true).await?;
        let evicted = self.evict(primary, &names).await;
        // Volumes are on this node: their pods can start nowhere else.
        cordon(&self.subject.client, node, false).await?;
        evicted
    }

    /// Evicts pods as a drain does, which asks again where the budget refuses. Only the primary must go.
    async fn evict(&self, primary: &str, names: &[String]) -> anyhow::Result<()> {
        let api: Api<Pod> = Api::namespaced(self.subject.client.clone(), &self.subject.namespace);
        let evict = async |name: &str| {
            let asked = || async { Ok(api.evict(name, &EvictParams::default()).await.map(drop)?) };
            let evicted = until("an eviction", DRAIN_MAX, asked);
            // The client itself asks again when the budget refuses, for much longer.
            tokio::time::timeout(DRAIN_MAX, evicted)
                .await
                .with_context(|| format!("{name} may not be evicted"))?
        };
        evict(primary).await?;
        for name in names.iter().filter(|name| *name != primary) {
            // Refused for good if the primary's successor may not start before the node is free again.
            let _ = evict(name).await;
        }
        Ok(())
    }
}

/// Keeps new pods away from a node, or lets them come again.
pub async fn cordon(client: &Client, node: &str, unschedulable: bool) -> anyhow::Result<()> {
    let api: Api<Node> = Api::all(client.clone());
    let body = json!({ "spec": { "unschedulable": unschedulable } });
    let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    api.patch(node, &params, &Patch::Merge(&body)).await?;
    Ok(())
}

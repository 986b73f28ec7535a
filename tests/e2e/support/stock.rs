//! What people run without an operator: a StatefulSet of the stock image, plain valkey-server in it, and every pod but the
//! first told to follow the first, or all of them nodes of a Valkey Cluster. The same shape as a ValkeyCluster's, so that the two can be
//! compared.

use super::{
    MANAGER,
    nodes::Nodes,
    operator::LOCAL_VALKEY_IMAGE,
    process::touch,
    resp::{Connection, PORT, Reach, Role},
    subject::{Member, member},
    wait::until,
};
use anyhow::{Context, bail};
use k8s_openapi::api::{
    apps::v1::StatefulSet,
    core::v1::{ConfigMap, Pod, Service},
};
use kube::{
    Api, Client, Resource,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::{collections::BTreeSet, ops::RangeInclusive, time::Duration};

/// Members that are no nodes of a Valkey Cluster.
const MEMBERS: usize = 3;
/// Milliseconds without a word until a node is suspected: what ValkeyClusters have unless told otherwise.
pub const NODE_TIMEOUT_MS: u32 = 2_000;
/// The file for which a node's server that has ended waits before it is started again.
const START_AGAIN: &str = "start-again";
/// Password of throw-away servers in a network without a way out: the client that measures logs in.
const PASSWORD: &str = "bench";
/// Bound on each wait of a connection that only asks.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
/// Bound on the start of its pods.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a server writes to its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistence {
    /// Nothing.
    Off,
    /// Snapshots.
    Rdb,
    /// The append-only file, synced every second.
    Aof,
}

impl Persistence {
    /// Its name on the command line and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Persistence::Off => "off",
            Persistence::Rdb => "rdb",
            Persistence::Aof => "aof",
        }
    }

    /// Lines of valkey.conf.
    fn directives(self) -> &'static str {
        match self {
            Persistence::Off => "save \"\"\nappendonly no\n",
            // A snapshot a minute, if anything changed: many are content with less.
            Persistence::Rdb => "save 60 1\nappendonly no\n",
            Persistence::Aof => "save 60 1\nappendonly yes\nappendfsync everysec\n",
        }
    }
}

/// What its servers are to each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The first is primary, the others follow it.
    Followers,
    /// Nodes of a Valkey Cluster: for each shard the slots with which it begins, and how many replicas it has.
    Nodes(Vec<Option<RangeInclusive<u16>>>, usize),
}

/// The StatefulSet.
pub struct Stock {
    /// API server.
    pub client: Client,
    /// Its namespace.
    pub namespace: String,
    /// Its name, and that of its headless Service.
    pub name: String,
    /// What its servers write.
    pub persistence: Persistence,
    /// What they are to each other.
    pub shape: Shape,
}

impl Stock {
    fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    async fn apply_one<K>(&self, body: &Value) -> anyhow::Result<()>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let params = PatchParams::apply(MANAGER).force();
        self.api::<K>().patch(&self.name, &params, &Patch::Apply(body)).await?;
        Ok(())
    }

    /// Creates it.
    pub async fn apply(&self) -> anyhow::Result<()> {
        self.apply_one::<ConfigMap>(&self.config()).await?;
        self.apply_one::<Service>(&self.service()).await?;
        self.apply_one::<StatefulSet>(&self.set()).await
    }

    /// Removes it, without waiting.
    pub async fn delete(&self) -> anyhow::Result<()> {
        self.api::<StatefulSet>().delete(&self.name, &DeleteParams::background()).await?;
        self.api::<Service>().delete(&self.name, &DeleteParams::default()).await?;
        self.api::<ConfigMap>().delete(&self.name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Replaces every pod, and waits until all follow the first: no data, and no back-off of kubelet's, which restarts a
    /// container at once only the first time.
    pub async fn renew(&self) -> anyhow::Result<Vec<Member>> {
        let before: BTreeSet<String> = self.members().await?.into_iter().map(|m| m.uid).collect();
        let sudden = DeleteParams::default().grace_period(0);
        self.api::<Pod>().delete_collection(&sudden, &self.selector()).await?;
        let found = until("three new members in sync", PATIENCE, || async {
            let members = self.members().await?;
            if let Some(old) = members.iter().find(|m| before.contains(&m.uid)) {
                bail!("{} is the old one still", old.name);
            }
            tokio::task::spawn_blocking(move || in_sync(members)).await?
        });
        Ok(found.await?.0)
    }

    /// Makes one Valkey Cluster of its new pods, in the order in which `valkey-cli --cluster create` does: slots, introductions, replicas.
    pub async fn form(&self) -> anyhow::Result<Nodes> {
        let Shape::Nodes(slots, replicas) = self.shape.clone() else { bail!("{} has no nodes", self.name) };
        let count = self.count();
        let (nodes, _) = until("all nodes to answer", PATIENCE, || async {
            let addresses = self.members().await?.iter().filter_map(|member| member.address).collect();
            let nodes = Nodes { reach: Reach::Direct, password: PASSWORD.to_owned(), addresses };
            if nodes.addresses.len() != count {
                bail!("{} of {count} have an address", nodes.addresses.len());
            }
            let answer =
                |nodes: &Nodes| Ok(nodes.addresses.iter().try_for_each(|at| nodes.open(*at).map(drop))?);
            nodes.ask(answer).await?;
            Ok(nodes)
        })
        .await?;
        make_one(&nodes, slots, replicas).await?;
        Ok(nodes)
    }

    /// Lets a node's server that has ended be started again.
    pub fn start_again(&self, member: &Member) -> anyhow::Result<()> {
        touch(member, "sh", START_AGAIN)
    }

    fn count(&self) -> usize {
        match &self.shape {
            Shape::Followers => MEMBERS,
            Shape::Nodes(slots, replicas) => slots.len() * (replicas + 1),
        }
    }

    fn selector(&self) -> ListParams {
        ListParams::default().labels(&format!("app={}", self.name))
    }

    /// Its pods, the first one first.
    pub async fn members(&self) -> anyhow::Result<Vec<Member>> {
        let pods = self.api::<Pod>().list(&self.selector()).await?;
        let mut members: Vec<Member> = pods.items.iter().map(|pod| member(pod, PASSWORD)).collect();
        members.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(members)
    }

    fn config(&self) -> Value {
        let name = &self.name;
        let conf = format!(
            // Without the delay of five seconds before a first synchronisation, which only makes a round longer.
            "dir /data\nrequirepass {PASSWORD}\nprimaryauth {PASSWORD}\nrepl-diskless-sync-delay 0\n{}",
            self.persistence.directives()
        );
        let (conf, start) = match &self.shape {
            // As the common charts have it: the first pod is the primary, the others follow its stable name.
            Shape::Followers => (
                conf,
                format!(
                    "#!/bin/sh\nset -- /etc/valkey/valkey.conf\n\
                     if [ \"$HOSTNAME\" != {name}-0 ]; then set -- \"$@\" --replicaof {name}-0.{name} 6379; fi\n\
                     exec valkey-server \"$@\"\n"
                ),
            ),
            // One shard that is lost does not stop the others, as in a ValkeyCluster. The shell stands for kubelet, without its back-off, and
            // starts the server again when it is told to.
            Shape::Nodes(..) => (
                format!(
                    "{conf}cluster-enabled yes\ncluster-node-timeout {NODE_TIMEOUT_MS}\ncluster-require-full-coverage no\n"
                ),
                format!(
                    "#!/bin/sh\ntrap 'exit 0' TERM\nwhile :; do\n\
                     valkey-server /etc/valkey/valkey.conf --cluster-announce-ip \"$POD_IP\" & wait $!\n\
                     until [ -e /data/{START_AGAIN} ]; do sleep 0.1; done; rm /data/{START_AGAIN}\ndone\n"
                ),
            ),
        };
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": name },
            "data": { "valkey.conf": conf, "start.sh": start },
        })
    }

    fn service(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": self.name },
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": true,
                "selector": { "app": self.name },
                "ports": [{ "name": "valkey", "port": 6379 }],
            },
        })
    }

    fn set(&self) -> Value {
        let labels = json!({ "app": self.name });
        let probe = json!({ "tcpSocket": { "port": 6379 }, "periodSeconds": 5 });
        json!({
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": { "name": self.name },
            "spec": {
                "replicas": self.count(),
                "serviceName": self.name,
                "podManagementPolicy": "Parallel",
                "selector": { "matchLabels": labels },
                "template": {
                    "metadata": { "labels": labels },
                    "spec": {
                        "automountServiceAccountToken": false,
                        "securityContext": {
                            "runAsNonRoot": true, "runAsUser": 999, "runAsGroup": 999, "fsGroup": 999,
                            "seccompProfile": { "type": "RuntimeDefault" },
                        },
                        "topologySpreadConstraints": [{
                            "maxSkew": 1, "topologyKey": "kubernetes.io/hostname",
                            "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": { "matchLabels": labels },
                        }],
                        "containers": [{
                            "name": "valkey",
                            "image": LOCAL_VALKEY_IMAGE,
                            "command": ["sh", "/etc/valkey/start.sh"],
                            "env": [{ "name": "POD_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } }],
                            "ports": [{ "name": "valkey", "containerPort": 6379 }],
                            "securityContext": {
                                "allowPrivilegeEscalation": false,
                                "capabilities": { "drop": ["ALL"] },
                                "readOnlyRootFilesystem": true,
                            },
                            "livenessProbe": probe,
                            "readinessProbe": probe,
                            "volumeMounts": [
                                { "name": "data", "mountPath": "/data" },
                                { "name": "tmp", "mountPath": "/tmp" },
                                { "name": "conf", "mountPath": "/etc/valkey", "readOnly": true },
                            ],
                        }],
                        "volumes": [
                            // Outlives the container as a claim would, and goes with the pod: each round begins empty.
                            { "name": "data", "emptyDir": {} },
                            { "name": "tmp", "emptyDir": {} },
                            { "name": "conf", "configMap": { "name": self.name } },
                        ],
                    },
                },
            },
        })
    }
}

/// All members, if the first is primary and the others follow it.
fn in_sync(members: Vec<Member>) -> anyhow::Result<Vec<Member>> {
    if members.len() != MEMBERS {
        bail!("{} pods", members.len());
    }
    for (index, member) in members.iter().enumerate() {
        let address = member.address.with_context(|| format!("{} has no address", member.name))?;
        let role = Connection::open(&Reach::Direct, address, PASSWORD, ASK_TIMEOUT)?.role()?;
        match role {
            Role::Primary if index == 0 => {}
            Role::Replica { of: _, link } if index > 0 && link == "connected" => {}
            other @ (Role::Primary | Role::Replica { .. }) => bail!("{} is {other:?}", member.name),
        }
    }
    Ok(members)
}

async fn make_one(
    nodes: &Nodes,
    slots: Vec<Option<RangeInclusive<u16>>>,
    replicas: usize,
) -> anyhow::Result<()> {
    let shards = slots.len();
    let own = move |nodes: &Nodes| {
        for (i, address) in nodes.addresses.iter().enumerate() {
            nodes.tell(*address, &["CLUSTER", "SET-CONFIG-EPOCH", &(i + 1).to_string()])?;
            if let Some(range) = slots.get(i).and_then(Option::as_ref) {
                let (first, last) = (range.start().to_string(), range.end().to_string());
                nodes.tell(*address, &["CLUSTER", "ADDSLOTSRANGE", &first, &last])?;
            }
        }
        let (first, others) = nodes.addresses.split_first().context("no nodes")?;
        let port = PORT.to_string();
        others
            .iter()
            .try_for_each(|other| nodes.tell(*first, &["CLUSTER", "MEET", &other.to_string(), &port]))
    };
    nodes.ask(own).await?;
    // Refused until the replica has heard of its primary.
    let follow = move |nodes: &Nodes| {
        for (i, replica) in nodes.addresses.iter().enumerate().skip(shards) {
            let primary = nodes.addresses.get(i % shards).context("no primary")?;
            nodes.tell(*replica, &["CLUSTER", "REPLICATE", &nodes.id(*primary)?])?;
        }
        Ok(())
    };
    until("replicas to follow", PATIENCE, || nodes.ask(follow)).await?;
    nodes.settled(replicas, PATIENCE).await
}

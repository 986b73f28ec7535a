//! What people run without an operator: a StatefulSet of the stock image, plain valkey-server in it, and every pod but the
//! first told to follow the first. The same shape as a ValkeyCluster's, so that the two can be compared.

use super::{
    MANAGER,
    operator::LOCAL_VALKEY_IMAGE,
    resp::{Connection, Reach, Role},
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
use std::{collections::BTreeSet, time::Duration};

/// Members.
const MEMBERS: usize = 3;
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
        // As the common charts have it: the first pod is the primary, the others follow its stable name.
        let start = format!(
            "#!/bin/sh\nset -- /etc/valkey/valkey.conf\n\
             if [ \"$HOSTNAME\" != {name}-0 ]; then set -- \"$@\" --replicaof {name}-0.{name} 6379; fi\n\
             exec valkey-server \"$@\"\n"
        );
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
                "replicas": MEMBERS,
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

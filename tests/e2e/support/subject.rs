//! A ValkeyCluster under test: its resource, its pods, its servers.

use super::{
    MANAGER, Place,
    resp::{Connection, Reach, Reply, Role},
    wait::until,
};
use anyhow::{Context, anyhow, bail};
use k8s_openapi::{
    api::{
        apps::v1::StatefulSet,
        core::v1::{PersistentVolumeClaim, Pod, Secret, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::Condition,
};
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    time::{Duration, Instant},
};
use valkeeper::api::v1alpha1::ValkeyCluster;

/// Name of a member's container.
const CONTAINER: &str = "valkey";
/// Longest wait for a member's own server at its port: its agent has that for 10 s at most.
const OWN_PORT_MAX: Duration = Duration::from_secs(15);
/// Between two tries.
const OWN_PORT_PAUSE: Duration = Duration::from_millis(50);
/// Bound on each wait of a connection that only asks.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Bound on everything the operator does while pods start: machines differ, figures are printed.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Bound on the end of a resource and its pods.
const GONE_MAX: Duration = Duration::from_secs(120);

/// The resource, and how to reach what belongs to it.
#[derive(Clone)]
pub struct Subject {
    /// API server.
    pub client: Client,
    /// Namespace of the resource.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// How its addresses are reached.
    pub reach: Reach,
    /// Where it runs.
    pub place: Place,
}

/// A pod of the cluster.
#[derive(Clone, Debug)]
pub struct Member {
    /// Pod name.
    pub name: String,
    /// Pod UID.
    pub uid: String,
    /// Address, once it has one.
    pub address: Option<IpAddr>,
    /// The role label.
    pub label: Option<String>,
    /// Password of the application's user.
    pub password: String,
    /// True if it is being deleted.
    pub leaving: bool,
}

impl Subject {
    fn api(&self) -> Api<ValkeyCluster> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Applies a spec as it is written, valid or not.
    pub async fn apply(&self, spec: &Value) -> anyhow::Result<()> {
        let resource = ApiResource::erase::<ValkeyCluster>(&());
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &self.namespace, &resource);
        let body = json!({
            "apiVersion": "valkeeper.io/v1alpha1",
            "kind": "ValkeyCluster",
            "metadata": { "name": self.name, "namespace": self.namespace },
            "spec": spec,
        });
        api.patch(&self.name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&body)).await?;
        Ok(())
    }

    /// Sets an annotation of the resource.
    pub async fn annotate(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let body = json!({ "metadata": { "annotations": { key: value } } });
        self.api().patch(&self.name, &PatchParams::default(), &Patch::Merge(&body)).await?;
        Ok(())
    }

    /// Takes an annotation of the resource away.
    pub async fn annotate_no_more(&self, key: &str) -> anyhow::Result<()> {
        let body = json!({ "metadata": { "annotations": { key: null } } });
        self.api().patch(&self.name, &PatchParams::default(), &Patch::Merge(&body)).await?;
        Ok(())
    }

    /// The resource.
    pub async fn get(&self) -> anyhow::Result<ValkeyCluster> {
        Ok(self.api().get(&self.name).await?)
    }

    /// Asks for its deletion.
    pub async fn delete(&self) -> anyhow::Result<()> {
        self.api().delete(&self.name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// True if the resource is there.
    pub async fn exists(&self) -> anyhow::Result<bool> {
        Ok(self.api().get_opt(&self.name).await?.is_some())
    }

    /// Waits until the present spec has been observed and a condition has a status.
    pub async fn condition(
        &self,
        kind: &str,
        status: &str,
        patience: Duration,
    ) -> anyhow::Result<(Condition, Duration)> {
        until(&format!("{kind}={status} of {}", self.name), patience, || async {
            let cluster = self.get().await?;
            let known = cluster.status.clone().unwrap_or_default();
            if known.observed_generation != cluster.metadata.generation {
                bail!("generation {:?} is not observed yet", cluster.metadata.generation);
            }
            let found = known.conditions.iter().find(|c| c.type_ == kind).cloned();
            match found {
                Some(condition) if condition.status == status => Ok(condition),
                Some(condition) => Err(anyhow!("{}: {}", condition.reason, condition.message)),
                None => Err(anyhow!("there is no such condition")),
            }
        })
        .await
    }

    /// What a condition says of the spec that is there now, whatever its status.
    pub async fn said(&self, kind: &str) -> anyhow::Result<Condition> {
        let cluster = self.get().await?;
        let known = cluster.status.unwrap_or_default();
        if known.observed_generation != cluster.metadata.generation {
            bail!("generation {:?} is not observed yet", cluster.metadata.generation);
        }
        let found = known.conditions.into_iter().find(|c| c.type_ == kind);
        found.ok_or_else(|| anyhow!("there is no condition {kind}"))
    }

    /// Waits until everything is as the spec wants it; how long that took.
    pub async fn ready(&self) -> anyhow::Result<Duration> {
        Ok(self.condition("Ready", "True", PATIENCE).await?.1)
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn selector(&self) -> ListParams {
        ListParams::default().labels(&format!("valkeeper.io/cluster={}", self.name))
    }

    /// Every pod of the cluster.
    pub async fn members(&self) -> anyhow::Result<Vec<Member>> {
        let pods = self.pods().list(&self.selector()).await?;
        let password = self.password().await.unwrap_or_default();
        Ok(pods.items.iter().map(|pod| member(pod, &password)).collect())
    }

    /// Deletes a pod as `kubectl delete pod` does.
    pub async fn delete_pod(&self, name: &str) -> anyhow::Result<()> {
        self.pods().delete(name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// How often a member's container was restarted.
    pub async fn restarts(&self, name: &str) -> anyhow::Result<i32> {
        let statuses = self.pods().get(name).await?.status.and_then(|status| status.container_statuses);
        let found = statuses.unwrap_or_default().into_iter().find(|status| status.name == CONTAINER);
        Ok(found.with_context(|| format!("{name} has no container {CONTAINER}"))?.restart_count)
    }

    /// How many of its members' containers run.
    pub async fn running(&self) -> anyhow::Result<usize> {
        let pods = self.pods().list(&self.selector()).await?.items;
        let runs = |pod: &Pod| {
            let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
            let found = statuses.into_iter().flatten().find(|status| status.name == CONTAINER);
            found.and_then(|status| status.state.as_ref()).is_some_and(|state| state.running.is_some())
        };
        Ok(pods.iter().filter(|pod| runs(pod)).count())
    }

    /// Waits until so many run; how long that took.
    pub async fn all_running(&self, count: usize) -> anyhow::Result<Duration> {
        let running = until("all pods to run", PATIENCE, || async {
            match self.running().await? {
                running if running == count => Ok(()),
                running => bail!("{running} of {count}"),
            }
        });
        Ok(running.await?.1)
    }

    /// Waits until the resource and its pods are gone.
    pub async fn gone(&self) -> anyhow::Result<()> {
        let what = format!("{} and its pods to be gone", self.name);
        until(&what, GONE_MAX, || async {
            if self.exists().await? {
                bail!("the resource is still there");
            }
            match self.members().await?.len() {
                0 => Ok(()),
                count => bail!("{count} pods are left"),
            }
        })
        .await
        .map(|_| ())
    }

    /// Removes the resource, its pods and their volumes' claims, if there are any.
    pub async fn remove(&self) -> anyhow::Result<()> {
        if self.exists().await? {
            self.delete().await?;
        }
        self.gone().await?;
        self.delete_claims().await
    }

    /// Nodes of its pods, by pod name.
    pub async fn nodes(&self) -> anyhow::Result<BTreeMap<String, String>> {
        let pods = self.pods().list(&self.selector()).await?.items;
        let node = |pod: Pod| Some((pod.name_any(), pod.spec?.node_name?));
        Ok(pods.into_iter().filter_map(node).collect())
    }

    /// Names of its volumes' claims.
    pub async fn claims(&self) -> anyhow::Result<Vec<String>> {
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), &self.namespace);
        Ok(api.list(&self.selector()).await?.items.iter().map(|claim| claim.name_any()).collect())
    }

    /// Deletes its volumes' claims.
    pub async fn delete_claims(&self) -> anyhow::Result<()> {
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), &self.namespace);
        api.delete_collection(&DeleteParams::default(), &self.selector()).await?;
        Ok(())
    }

    /// Deletes the claim of a member's volume; it goes with the pod that uses it.
    pub async fn delete_claim_of(&self, pod: &str) -> anyhow::Result<()> {
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), &self.namespace);
        let claims = self.claims().await?;
        let suffix = format!("-{pod}");
        let claim = claims.iter().find(|claim| claim.ends_with(&suffix));
        api.delete(claim.with_context(|| format!("{pod} has no claim"))?, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Names of its workloads and Services.
    pub async fn objects(&self) -> anyhow::Result<Vec<String>> {
        let sets: Api<StatefulSet> = Api::namespaced(self.client.clone(), &self.namespace);
        let services: Api<Service> = Api::namespaced(self.client.clone(), &self.namespace);
        let mut names: Vec<String> =
            sets.list(&self.selector()).await?.items.iter().map(|o| o.name_any()).collect();
        names.extend(services.list(&self.selector()).await?.items.iter().map(|o| o.name_any()));
        Ok(names)
    }

    /// The password of the application's user.
    pub async fn password(&self) -> anyhow::Result<String> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let secret = api.get(&format!("{}-auth", self.name)).await?;
        let bytes =
            secret.data.and_then(|mut data| data.remove("password")).context("no password in the Secret")?;
        Ok(String::from_utf8(bytes.0)?)
    }

    /// Address of a Service: `primary` or `replicas`.
    pub async fn service_address(&self, which: &str) -> anyhow::Result<IpAddr> {
        let api: Api<Service> = Api::namespaced(self.client.clone(), &self.namespace);
        let service = api.get(&format!("{}-{which}", self.name)).await?;
        let address = service.spec.and_then(|spec| spec.cluster_ip).context("the Service has no address")?;
        Ok(address.parse()?)
    }

    /// Address that the write Service leads to.
    pub async fn route(&self) -> anyhow::Result<Vec<String>> {
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &self.namespace);
        let slice = api.get(&format!("{}-primary", self.name)).await?;
        Ok(slice.endpoints.unwrap_or_default().into_iter().flat_map(|e| e.addresses).collect())
    }

    /// A connection to a member's own server as an application has it. Where the port is closed, or its agent passes clients on, it is
    /// waited for.
    pub async fn connect(&self, member: &Member, timeout: Duration) -> anyhow::Result<Connection> {
        let begun = Instant::now();
        loop {
            match self.connect_now(member, timeout).await {
                Err(error) if begun.elapsed() >= OWN_PORT_MAX => return Err(error),
                Err(_) => tokio::time::sleep(OWN_PORT_PAUSE).await,
                Ok(connection) => return Ok(connection),
            }
        }
    }

    async fn connect_now(&self, member: &Member, timeout: Duration) -> anyhow::Result<Connection> {
        let address = member.address.with_context(|| format!("{} has no address", member.name))?;
        let (reach, password) = (self.reach.clone(), member.password.clone());
        let open = move || -> anyhow::Result<Connection> {
            let mut connection = Connection::open(&reach, address, &password, timeout)?;
            match connection.served_at()? {
                Some(at) if at != address => bail!("{address} passes its clients on to {at}"),
                Some(_) | None => Ok(connection),
            }
        };
        tokio::task::spawn_blocking(open).await?
    }

    /// Runs a command on a member.
    pub async fn call(&self, member: &Member, words: &[&str]) -> anyhow::Result<Reply> {
        let mut connection = self.connect(member, ASK_TIMEOUT).await?;
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let call = move || connection.call(&words.iter().map(String::as_str).collect::<Vec<_>>());
        Ok(tokio::task::spawn_blocking(call).await??)
    }

    /// Members with what their servers say they are; those that do not answer are left out.
    pub async fn roles(&self) -> anyhow::Result<Vec<(Member, Role)>> {
        let mut roles = Vec::new();
        for member in self.members().await? {
            if let Ok(mut connection) = self.connect_now(&member, ASK_TIMEOUT).await
                && let Ok(Ok(role)) = tokio::task::spawn_blocking(move || connection.role()).await
            {
                roles.push((member, role));
            }
        }
        Ok(roles)
    }

    /// The one server that accepts writes.
    pub async fn primary(&self) -> anyhow::Result<Member> {
        let mut primaries: Vec<Member> = self
            .roles()
            .await?
            .into_iter()
            .filter(|(_, role)| *role == Role::Primary)
            .map(|(m, _)| m)
            .collect();
        match primaries.len() {
            1 => primaries.pop().context("no primary"),
            count => bail!("{count} servers are primary"),
        }
    }

    /// Waits until there is a primary with a replica that gets its writes: from then on a primary can be lost. A replica says that it is
    /// connected as soon as it has loaded a data set that came without a file; its primary feeds it from its next sign of life on,
    /// which comes once a second, and calls it online only then.
    pub async fn protected(&self, patience: Duration) -> anyhow::Result<Member> {
        let found = until("a primary with a replica in sync", patience, || async {
            let primary = self.primary().await?;
            let address = primary.address.map(|a| a.to_string()).unwrap_or_default();
            let follows =
                |role: &Role| *role == Role::Replica { of: address.clone(), link: "connected".to_owned() };
            let roles = self.roles().await?;
            let route = self.route().await?;
            if !roles.iter().any(|(_, role)| follows(role)) {
                bail!("no replica follows {}", primary.name);
            }
            if route != [address.clone()] {
                bail!("the write Service leads to {route:?}");
            }
            let told = self.call(&primary, &["INFO", "replication"]).await?;
            if !told.text().is_some_and(|told| told.contains("state=online")) {
                bail!("{} feeds no replica yet", primary.name);
            }
            Ok(primary)
        });
        Ok(found.await?.0)
    }

    /// The members of a set of numbers, read from the primary.
    pub async fn set(&self, key: &str, timeout: Duration) -> anyhow::Result<HashSet<u64>> {
        let primary = self.primary().await?;
        let connection = self.connect(&primary, timeout).await?;
        let key = key.to_owned();
        Ok(tokio::task::spawn_blocking(move || numbers(connection, &key)).await??)
    }
}

/// The members of a set of numbers.
pub fn numbers(mut connection: Connection, key: &str) -> std::io::Result<HashSet<u64>> {
    let reply = connection.call(&["SMEMBERS", key])?;
    Ok(reply.list().iter().filter_map(Reply::text).filter_map(|text| text.parse().ok()).collect())
}

/// What a pod is to the tests.
pub fn member(pod: &Pod, password: &str) -> Member {
    let address =
        pod.status.as_ref().and_then(|status| status.pod_ip.as_deref()).and_then(|ip| ip.parse().ok());
    Member {
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        address,
        label: pod.labels().get("valkeeper.io/role").cloned(),
        password: password.to_owned(),
        leaving: pod.metadata.deletion_timestamp.is_some(),
    }
}

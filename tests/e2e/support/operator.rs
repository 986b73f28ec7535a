//! The operator in the cluster: installed by its chart, scaled and killed.

use super::{Place, checkout, process, wait::until};
use anyhow::{Context, bail};
use k8s_openapi::api::{
    apps::v1::{Deployment, DeploymentSpec},
    coordination::v1::Lease,
    core::v1::{Pod, Service},
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, LogParams, Patch, PatchParams, PostParams},
};
use serde_json::json;
use std::{
    io::{Read, Write},
    net::{IpAddr, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

/// Namespace of the operator.
pub const NAMESPACE: &str = "valkeeper-system";
/// Release of its chart.
pub const RELEASE: &str = "valkeeper";
/// Image that `tests/cluster/cluster image-operator` makes.
pub const LOCAL_IMAGE: &str = "valkeeper.local/valkeeper:dev";
/// Image of Valkey in the local cluster.
pub const LOCAL_VALKEY_IMAGE: &str = "valkeeper.local/valkey:9.1";
/// Labels of its Deployment and its pod.
const SELECTOR: &str = "app.kubernetes.io/name=valkeeper,app.kubernetes.io/component=operator";
/// Its Lease.
pub const LEASE: &str = "valkeeper";
/// Port of its metrics.
const METRICS_PORT: u16 = 8080;
/// Volume of its journals, if they are not in ConfigMaps.
pub const SLED_VOLUME: &str = "/var/lib/valkeeper";
/// The store in it. Its lock and its anchor are files beside it.
pub const SLED_STORE: &str = "journal";
/// Bound on each wait of a connection that only asks.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Bound on its start and end.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where journals are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// In ConfigMaps, as by default.
    ConfigMaps,
    /// In a sled store on a volume of the operator's pod.
    Sled,
}

impl Store {
    /// From VALKEEPER_JOURNAL.
    pub fn of_environment() -> anyhow::Result<Store> {
        match std::env::var("VALKEEPER_JOURNAL").as_deref() {
            Ok("" | "configmap") | Err(_) => Ok(Store::ConfigMaps),
            Ok("sled") => Ok(Store::Sled),
            Ok(other) => bail!("VALKEEPER_JOURNAL={other:?}: expected configmap or sled"),
        }
    }

    /// Arguments of helm that choose it.
    fn values(self) -> Vec<String> {
        match self {
            Store::ConfigMaps => Vec::new(),
            Store::Sled => vec![
                "--set-string".to_owned(),
                format!("journal=sled:{SLED_VOLUME}/{SLED_STORE}"),
                "--set-json".to_owned(),
                r#"extraVolumes=[{"name":"journal","emptyDir":{}}]"#.to_owned(),
                "--set-json".to_owned(),
                format!(r#"extraVolumeMounts=[{{"name":"journal","mountPath":"{SLED_VOLUME}"}}]"#),
            ],
        }
    }
}

/// One pod of the operator.
#[derive(Clone, Debug)]
pub struct Instance {
    /// Name of the pod.
    pub name: String,
    uid: String,
    /// Its process on this machine.
    pub pid: u32,
}

impl Instance {
    /// True if it goes by this name in Lease and journal.
    pub fn has(&self, holder: &str) -> bool {
        holder.starts_with(&format!("{}.{}_", self.name, self.uid))
    }
}

/// How the operator's Deployment was.
pub struct Single(Option<DeploymentSpec>);

/// The operator.
#[derive(Clone)]
pub struct Operator {
    client: Client,
    place: Place,
}

impl Operator {
    /// Installs the chart, or brings an installation up to date, and waits until it leads.
    pub async fn install(client: &Client, place: Place) -> anyhow::Result<Operator> {
        set_up(client, place, &[]).await?;
        let operator = Operator { client: client.clone(), place };
        operator.scale(1).await?;
        Ok(operator)
    }

    /// The same with other values of the chart, as a user sets them: arguments of helm.
    pub async fn set(&self, values: &[&str]) -> anyhow::Result<()> {
        set_up(&self.client, self.place, values).await?;
        self.scale(1).await.map(|_| ())
    }

    /// The same with another level of its log.
    pub async fn log_level(&self, level: &str) -> anyhow::Result<()> {
        self.set(&["--set-string", &format!("logLevel={level}")]).await
    }

    /// Removes the release; definitions and journals stay.
    pub fn uninstall() -> anyhow::Result<()> {
        let output = Command::new("helm")
            .args(["uninstall", RELEASE, "-n", NAMESPACE, "--ignore-not-found"])
            .output()?;
        if output.status.success() {
            Ok(())
        } else {
            bail!("helm: {}", String::from_utf8_lossy(&output.stderr))
        }
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    async fn list(&self) -> anyhow::Result<Vec<Pod>> {
        Ok(self.pods().list(&ListParams::default().labels(SELECTOR)).await?.items)
    }

    /// Scales it and waits until that is so: no pod left, or one ready.
    pub async fn scale(&self, replicas: i32) -> anyhow::Result<Duration> {
        let name = self.deployment().await?.name_any();
        let patch = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
        self.deployments().patch_scale(&name, &PatchParams::default(), &patch).await?;
        let wanted = usize::try_from(replicas)?;
        let what = format!("{replicas} pods of the operator");
        let scaled = until(&what, PATIENCE, || async {
            let pods = self.list().await?;
            let ready = pods.iter().filter(|pod| is_ready(pod)).count();
            if pods.len() == wanted && ready == wanted {
                Ok(())
            } else {
                bail!("{} pods, {ready} ready", pods.len())
            }
        });
        Ok(scaled.await?.1)
    }

    /// Kills its process, as a node out of memory would; kubelet starts it again. The time just before.
    pub async fn kill(&self) -> anyhow::Result<Instant> {
        match self.place {
            Place::Local => process::signal(self.pid().await?, "KILL"),
            Place::Existing => {
                let pods = self.list().await?;
                let pod = pods.first().context("the operator has no pod")?;
                let at = Instant::now();
                self.pods().delete(&pod.name_any(), &DeleteParams::default().grace_period(0)).await?;
                Ok(at)
            }
        }
    }

    /// Deletes its pod as `kubectl delete pod` does.
    pub async fn delete_pod(&self) -> anyhow::Result<()> {
        let pods = self.list().await?;
        let pod = pods.first().context("the operator has no pod")?;
        self.pods().delete(&pod.name_any(), &DeleteParams::default()).await?;
        Ok(())
    }

    /// Pid of its process on this machine, so that a kill need not look for it first. Waits out kubelet's pause after an earlier kill.
    pub async fn pid(&self) -> anyhow::Result<u32> {
        let found = until("a process of the operator", PATIENCE, || async {
            let pods = self.list().await?;
            let pod = pods.first().context("the operator has no pod")?;
            process::pid_in_pod(&pod.uid().unwrap_or_default(), "valkeeper")
        });
        Ok(found.await?.0)
    }

    /// Its pods.
    pub async fn instances(&self) -> anyhow::Result<Vec<Instance>> {
        let instance = |pod: Pod| -> anyhow::Result<Instance> {
            let (name, uid) = (pod.name_any(), pod.uid().unwrap_or_default());
            let pid = process::pid_in_pod(&uid, "valkeeper")?;
            Ok(Instance { name, uid, pid })
        };
        self.list().await?.into_iter().map(instance).collect()
    }

    /// Name of who holds the Lease.
    pub async fn holder(&self) -> anyhow::Result<String> {
        let lease = self.leases().get(LEASE).await?;
        Ok(lease.spec.and_then(|spec| spec.holder_identity).unwrap_or_default())
    }

    /// The Lease.
    pub fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// The pod that holds the Lease, once one does.
    pub async fn leader(&self) -> anyhow::Result<Instance> {
        let found = until("an operator to hold the Lease", PATIENCE, || async {
            let (holder, instances) = (self.holder().await?, self.instances().await?);
            let found = instances.into_iter().find(|one| one.has(&holder));
            found.with_context(|| format!("it is held by {holder:?}"))
        });
        Ok(found.await?.0)
    }

    /// Two of it, of which none is restarted for standing still. Gives back how it was, for [`Operator::alone`].
    pub async fn pair(&self) -> anyhow::Result<Single> {
        let single = Single(self.deployment().await?.spec);
        self.change(|deployment| {
            let pods = deployment.spec.iter_mut().flat_map(|spec| spec.template.spec.iter_mut());
            pods.flat_map(|pod| &mut pod.containers).for_each(|container| container.liveness_probe = None);
        })
        .await?;
        self.scale(2).await?;
        Ok(single)
    }

    /// One of it, as it was before.
    pub async fn alone(&self, Single(spec): Single) -> anyhow::Result<()> {
        self.scale(0).await?;
        self.change(|deployment| deployment.spec.clone_from(&spec)).await?;
        self.scale(1).await.map(|_| ())
    }

    fn deployments(&self) -> Api<Deployment> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    async fn deployment(&self) -> anyhow::Result<Deployment> {
        let found = self.deployments().list(&ListParams::default().labels(SELECTOR)).await?;
        found.items.into_iter().next().context("the chart has no Deployment")
    }

    /// Changes the Deployment, whose controller writes to it, too.
    async fn change(&self, change: impl Fn(&mut Deployment)) -> anyhow::Result<()> {
        until("the Deployment to be changed", PATIENCE, || async {
            let mut deployment = self.deployment().await?;
            change(&mut deployment);
            self.deployments().replace(&deployment.name_any(), &PostParams::default(), &deployment).await?;
            Ok(())
        })
        .await
        .map(|_| ())
    }

    /// The log of one of its pods.
    pub async fn log_of(&self, pod: &str) -> anyhow::Result<String> {
        Ok(self.pods().logs(pod, &LogParams::default()).await?)
    }

    /// Its addresses: of its pods, and of the Services in front of them.
    pub async fn addresses(&self) -> anyhow::Result<Vec<IpAddr>> {
        let services: Api<Service> = Api::namespaced(self.client.clone(), NAMESPACE);
        let services = services.list(&ListParams::default()).await?.items;
        let of_services = services.into_iter().filter_map(|s| s.spec?.cluster_ip?.parse().ok());
        let of_pods = self.list().await?.into_iter().filter_map(|p| p.status?.pod_ip?.parse().ok());
        Ok(of_pods.chain(of_services).collect())
    }

    /// What it measures, as Prometheus would read it.
    pub async fn metrics(&self) -> anyhow::Result<String> {
        let pods = self.list().await?;
        let address = pods.first().and_then(|pod| pod.status.as_ref()?.pod_ip.clone());
        let address: IpAddr = address.context("the operator has no address")?.parse()?;
        page(address, METRICS_PORT, "/metrics").await
    }

    /// The end of its log, for a failure's report.
    pub async fn log_tail(&self, lines: i64) -> String {
        let Ok(pods) = self.list().await else { return "no pods".to_owned() };
        let mut text = String::new();
        for pod in pods {
            let params = LogParams { tail_lines: Some(lines), ..LogParams::default() };
            text.push_str(
                &self.pods().logs(&pod.name_any(), &params).await.unwrap_or_else(|error| error.to_string()),
            );
        }
        text
    }
}

async fn set_up(client: &Client, place: Place, more: &[&str]) -> anyhow::Result<()> {
    let variable = |name: &str| std::env::var(name).ok();
    let (image, valkey) = match place {
        Place::Local => (LOCAL_IMAGE.to_owned(), Some(LOCAL_VALKEY_IMAGE.to_owned())),
        Place::Existing => {
            (variable("VALKEEPER_IMAGE").context("VALKEEPER_IMAGE")?, variable("VALKEEPER_VALKEY_IMAGE"))
        }
    };
    let (repository, tag) = split_image(&image)?;
    let mut values = format!("image.repository={repository},image.tag={tag}");
    if let Some(valkey) = valkey {
        values.push_str(&format!(",defaultImage={valkey}"));
    }
    super::restricted_namespace(client, NAMESPACE).await?;
    let output = Command::new("helm")
        .args(["upgrade", "--install", RELEASE])
        .arg(checkout().join("charts/valkeeper"))
        .args(["--namespace", NAMESPACE, "--wait", "--timeout", "120s"])
        .args(["--set-string", &values])
        .args(Store::of_environment()?.values())
        .args(more)
        .output()
        .context("helm")?;
    if !output.status.success() {
        bail!("helm: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    pod.metadata.deletion_timestamp.is_none()
        && conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// What is at this path, with the head of the answer.
pub async fn page(address: IpAddr, port: u16, path: &'static str) -> anyhow::Result<String> {
    let ask = move || -> anyhow::Result<String> {
        let mut stream = TcpStream::connect((address, port))?;
        stream.set_read_timeout(Some(ASK_TIMEOUT))?;
        stream.write_all(
            format!("GET {path} HTTP/1.1\r\nHost: page\r\nConnection: close\r\n\r\n").as_bytes(),
        )?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    tokio::task::spawn_blocking(ask).await?
}

fn split_image(image: &str) -> anyhow::Result<(&str, &str)> {
    let (repository, tag) = image.rsplit_once(':').with_context(|| format!("{image} has no tag"))?;
    if tag.contains('/') { bail!("{image} has no tag") } else { Ok((repository, tag)) }
}

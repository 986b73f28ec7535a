//! The process: watches, leadership, and one task per cluster. A task that ends, by an error or a panic, begins anew after
//! a pause; the others do not notice. When leadership ends, all tasks end with it.

use crate::{
    agents::news,
    api::{Defaults, v1alpha1::ValkeyCluster},
    archive,
    args::{JournalStore, KEEP_DELETED_ARCHIVED, KeepArgs, KeepDeleted, RunArgs},
    claim::{self, Before},
    clock::Clock,
    cluster::{ClusterId, Shell},
    health::{self, Metrics},
    k8s::{
        self,
        client::Clients,
        events::Publisher,
        keys::KeyStore,
        lease::LeaseStore,
        objects::ConfigMaps,
        watch::{self, Wakers, World},
    },
    keeping::{ArchivePlace, Keeping},
    lease::{Campaign, Leadership},
    left, mirror, owned, publish,
    reconcile::{self, Class, Ended},
    vault::Vault,
};
use futures::FutureExt;
use kube::ResourceExt;
use std::{
    collections::HashMap, future::Future, net::SocketAddr, panic::AssertUnwindSafe, path::Path, sync::Arc,
    time::Duration,
};
use tokio::task::{AbortHandle, JoinSet};
use tracing::Instrument;
use valkeeper_journal::{Backend, BackendError, Memory, Segments, Sled, Tiered, archive::Archive, segments};

/// Name of the Lease.
const LEASE: &str = "valkeeper";

/// Pause before the vault is tried again: one read, and nothing goes on without it.
const VAULT_AGAIN_PAUSE: Duration = Duration::from_secs(1);

/// How often the operator looks whether its own identity is due: a comparison of two numbers, a few times within the shortest
/// life.
const IDENTITY_PERIOD: Duration = Duration::from_secs(10);

/// Why the process cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server's settings.
    #[error("the API server cannot be used")]
    Kubernetes(#[from] k8s::Error),
    /// The journal's directory.
    #[error("the journal's directory cannot be used")]
    Sled(#[from] BackendError),
    /// It could not be opened at all.
    #[error("the journal's directory was not opened")]
    NotOpened(#[from] tokio::task::JoinError),
    /// The archive's address or credentials.
    #[error("the archive cannot be used")]
    Archive(#[from] archive::Error),
    /// More is to be kept of a journal than fits into its store.
    #[error("--journal-keep is {keep_kib}Ki: at most {max_kib}Ki of a journal can be kept there")]
    KeepsTooMuch {
        /// What was asked for, in KiB.
        keep_kib: usize,
        /// The most, in KiB.
        max_kib: usize,
    },
    /// A watch panicked: without it the process is blind, and better begun anew.
    #[error("a watch came to an end")]
    WatchesEnded,
    /// Probes and metrics.
    #[error("cannot listen on {0}")]
    Listen(std::net::SocketAddr, #[source] std::io::Error),
}

/// Runs until `stop` resolves. `pod_uid` is the pod's, if this runs in one that says so.
///
/// # Errors
/// What the process cannot run without. Everything that happens to it later is waited out.
pub async fn run(
    args: RunArgs,
    instance: String,
    pod_uid: Option<String>,
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    let RunArgs {
        namespace,
        watch_namespace,
        journal,
        keep,
        default_image,
        agent_image,
        listen,
        listen_news,
        pod_ip,
        certificate_lifetime,
        log_format: _,
    } = args;
    let clients = Clients::infer().await?;
    let namespace = namespace.unwrap_or_else(|| clients.default_namespace.clone());
    let pod = pod_uid.map(|uid| format!("{instance}.{uid}_"));
    let place = pod.clone().unwrap_or_else(|| format!("{instance}_"));
    let holder = format!("{place}{}", uuid::Uuid::from_bytes(rand::random()));
    let store = LeaseStore::new(clients.requests.clone(), &namespace, LEASE);
    let (mut campaign, leadership) = Campaign::new(store, &namespace, holder.clone(), pod);
    let clock = Clock::start();
    let keys = KeyStore::new(clients.requests.clone(), &namespace);
    let newsroom = news::listen(listen_news).await.map_err(|e| Error::Listen(listen_news, e))?;
    let shell = Arc::new(Shell {
        vault: Arc::new(Vault::new(keys, &namespace, &instance, certificate_lifetime)),
        registry: Arc::default(),
        news_address: pod_ip
            .map(|ip| SocketAddr::new(ip, listen_news.port()).to_string())
            .unwrap_or_default(),
        backend: backend(&journal, &clients, &namespace, &leadership).await?,
        publisher: Publisher::new(clients.requests.clone(), instance.clone()),
        world: World::default(),
        wakers: Wakers::default(),
        metrics: Arc::new(Metrics::default()),
        keeping: keeping(&journal, keep)?,
        defaults: Defaults { image: default_image, agent_image },
        // Its own name in every life: two claims must never be the same bytes.
        writer: holder,
        clock,
        leadership,
        clients,
    });
    // Tasks of their own: a long list to take in must not delay a renewal of the Lease.
    let mut watches = JoinSet::new();
    let watched = Arc::clone(&shell);
    watches.spawn(async move {
        watch::run(&watched.clients, watch_namespace.as_deref(), &watched.world, &watched.wakers).await;
    });
    let vault = Arc::clone(&shell.vault);
    let leadership = shell.leadership.clone();
    let leads = Arc::new(move || leadership.check().is_ok());
    let desk = news::Desk { registry: Arc::clone(&shell.registry), leads };
    let newsroom = news::serve(newsroom, Arc::new(move || vault.live()), desk);
    let probes = health::serve(listen, Arc::clone(&shell.metrics));
    let mut tasks = Tasks::default();
    tokio::select! {
        served = probes => served.map_err(|e| Error::Listen(listen, e))?,
        served = newsroom => served.map_err(|e| Error::Listen(listen_news, e))?,
        () = campaign.run() => {}
        () = supervise(&shell, &mut tasks) => {}
        _ended = watches.join_next() => return Err(Error::WatchesEnded),
        () = stop => tracing::info!("stopping"),
    }
    // Only when every task has stopped need whoever comes next not wait.
    tasks.running.shutdown().await;
    campaign.release().await;
    Ok(())
}

async fn backend(
    store: &JournalStore,
    clients: &Clients,
    namespace: &str,
    leadership: &Leadership,
) -> Result<Arc<dyn Backend>, Error> {
    let config_maps = || {
        let maps = ConfigMaps::new(clients.requests.clone(), namespace, leadership.clone());
        Arc::new(Segments::new(Arc::new(maps)))
    };
    Ok(match store {
        JournalStore::ConfigMap => config_maps(),
        JournalStore::Memory => Arc::new(Memory::new()),
        JournalStore::Sled(directory) => Arc::new(opened(directory, Sled::open).await?),
        JournalStore::Tiered(directory) => match mirror(directory).await {
            Some(mirror) => Arc::new(Tiered::new(config_maps(), Arc::new(mirror))),
            None => config_maps(),
        },
    })
}

async fn opened(directory: &Path, open: fn(&Path) -> Result<Sled, BackendError>) -> Result<Sled, Error> {
    let directory = directory.to_owned();
    Ok(tokio::task::spawn_blocking(move || open(&directory)).await??)
}

/// The mirror; `None` if it cannot be used, which is no reason to do without a journal.
async fn mirror(directory: &Path) -> Option<Sled> {
    let mirror = opened(directory, mirror::open).await;
    mirror
        .inspect_err(|e| tracing::warn!(error = k8s::chain(e), "the mirror of the journals cannot be used"))
        .ok()
}

fn keeping(journal: &JournalStore, keep: KeepArgs) -> Result<Keeping, Error> {
    let KeepArgs {
        journal_keep,
        journal_keep_age,
        journal_keep_deleted,
        archive,
        archive_credentials,
        finalize,
    } = keep;
    let archive = archive.map(|url| place(url, archive_credentials.as_deref())).transpose()?;
    let keep_bytes = journal_keep.unwrap_or_else(|| keep_default(journal, archive.is_some()));
    let max = keep_max(journal);
    if keep_bytes > max {
        return Err(Error::KeepsTooMuch { keep_kib: keep_bytes / 1024, max_kib: max / 1024 });
    }
    let mut keeping = Keeping::new(keep_bytes, journal_keep_age, archive);
    keeping.finalize = finalize;
    // Without an archive that would be the end of its history: somebody has to say so.
    let keep_deleted = if keeping.archive().is_some() { KEEP_DELETED_ARCHIVED } else { KeepDeleted::Forever };
    keeping.keep_deleted = journal_keep_deleted.unwrap_or(keep_deleted).time();
    keeping.survives = *journal != JournalStore::Memory;
    Ok(keeping)
}

fn place(url: String, credentials: Option<&Path>) -> Result<ArchivePlace, Error> {
    Ok(ArchivePlace { archive: Archive::new(archive::open(&url, credentials)?), place: url })
}

/// Most that may be kept of a journal: what one may have, less a quarter, so that what goes is carried to the archive before it is full.
fn keep_max(store: &JournalStore) -> usize {
    let bytes_max = match store {
        JournalStore::ConfigMap | JournalStore::Tiered(_) => segments::STREAM_BYTES_MAX,
        JournalStore::Sled(_) | JournalStore::Memory => valkeeper_journal::sled::STREAM_BYTES_MAX,
    };
    bytes_max / 4 * 3
}

/// How much of a journal is kept if nobody says: see [`RunArgs::journal_keep`].
fn keep_default(store: &JournalStore, has_archive: bool) -> usize {
    match (store, has_archive) {
        // A thousand clusters are 64 MiB of etcd's 2 GiB.
        (JournalStore::ConfigMap | JournalStore::Tiered(_), true) => 64 * 1024,
        // Some 5,000 records, compressed. The budget of the installation makes it less for many clusters.
        (JournalStore::ConfigMap | JournalStore::Tiered(_), false) => 512 * 1024,
        (JournalStore::Sled(_) | JournalStore::Memory, _) => 48 * 1024 * 1024,
    }
}

/// Leads whenever it may: tasks run between gaining and losing leadership, and at no other time.
async fn supervise(shell: &Arc<Shell>, tasks: &mut Tasks) {
    shell.world.wait_until_ready().await;
    shell.metrics.ready();
    let mut leadership = shell.leadership.clone();
    loop {
        leadership.gained().await;
        shell.metrics.leads();
        tokio::select! {
            () = leadership.lost() => tracing::warn!("leadership ended: all tasks stop"),
            () = lead(shell, tasks) => {}
        }
        tasks.running.shutdown().await;
        tasks.by_uid.clear();
        shell.metrics.stands_by();
    }
}

/// What a leader does: opens the vault, then runs the tasks and keeps its own identity fresh.
async fn lead(shell: &Arc<Shell>, tasks: &mut Tasks) {
    while let Err(error) = shell.vault.open().await {
        tracing::warn!(error = k8s::chain(&error), "the certificate authority cannot be opened");
        tokio::time::sleep(VAULT_AGAIN_PAUSE).await;
    }
    let refresh = async {
        loop {
            tokio::time::sleep(IDENTITY_PERIOD).await;
            if let Err(error) = shell.vault.open().await {
                tracing::warn!(
                    error = k8s::chain(&error),
                    "the operator's own identity could not be renewed"
                );
            }
        }
    };
    tokio::select! {
        () = refresh => {}
        () = left::look_after(shell) => {}
        () = tasks.keep(shell) => {}
    }
}

/// The tasks, by the UID of their resource.
#[derive(Default)]
struct Tasks {
    running: JoinSet<()>,
    by_uid: HashMap<String, (ClusterId, AbortHandle)>,
}

impl Tasks {
    /// Keeps one task per resource, for ever. Level-triggered: looks at what is there, not at what changed.
    async fn keep(&mut self, shell: &Arc<Shell>) {
        loop {
            self.match_resources(shell, &shell.world.clusters.all());
            shell.metrics.clusters(self.by_uid.len());
            tokio::select! {
                () = shell.wakers.clusters.notified() => {}
                Some(_ended) = self.running.join_next() => {}
            }
        }
    }

    /// A task whose resource is gone ends by itself, when it has recorded what it did last.
    fn match_resources(&mut self, shell: &Arc<Shell>, resources: &[Arc<ValkeyCluster>]) {
        let (ended, running): (Vec<_>, Vec<_>) =
            self.by_uid.drain().partition(|(_, (_, task))| task.is_finished());
        self.by_uid.extend(running);
        for (_, (id, _)) in ended {
            // A new resource of the same name may have taken its place, and its waker with it.
            if !self.by_uid.values().any(|(other, _)| other.owner == id.owner) {
                shell.wakers.forget(&id.owner);
            }
        }
        for (uid, id) in resources.iter().filter_map(id_of) {
            self.by_uid.entry(uid).or_insert_with(|| {
                let task = tend(Arc::clone(shell), id.clone()).instrument(span(&id));
                let handle = self.running.spawn(task);
                (id, handle)
            });
        }
    }
}

fn id_of(resource: &Arc<ValkeyCluster>) -> Option<(String, ClusterId)> {
    let uid = resource.uid()?;
    let owner = (resource.namespace()?, resource.name_any());
    Some((uid.clone(), ClusterId { owner, uid }))
}

fn span(id: &ClusterId) -> tracing::Span {
    let (namespace, name) = &id.owner;
    tracing::info_span!("cluster", namespace, name)
}

/// One cluster's task: runs it again after each end, with a pause, until its resource is gone.
async fn tend(shell: Arc<Shell>, id: ClusterId) {
    let (mut failures, mut before) = (0_u32, Before::Nothing);
    while shell.resource(&id).is_some() {
        let began = tokio::time::Instant::now();
        let ended = AssertUnwindSafe(reconcile::run(&shell, &id, before)).catch_unwind().await;
        let class = match ended {
            Ok(Ok(Ended::Gone)) => {
                tracing::info!("let go");
                return;
            }
            Ok(Err(error)) => {
                tracing::warn!(class = ?error.class(), reason = error.reason().code(), error = k8s::chain(&error), "stopped");
                // Who is fenced says nothing: the later writer speaks for the cluster now.
                if !matches!(error.class(), Class::Fenced | Class::Deposed) {
                    publish::trouble(&shell, &id, &error).await;
                    renew_certificates(&shell, &id).await;
                }
                // What can still be carried to the archive is, before the resource goes.
                let is_final = error.before() != Some(Before::Full) || before == Before::Full;
                before = match (error.before(), before) {
                    (Some(known), _) => known,
                    (None, Before::Full) => Before::Nothing,
                    (None, Before::Nothing | Before::DeposedBy(_)) => before,
                };
                if is_final && error.concerns_journal() && error.class() == Class::Permanent {
                    let_go(&shell, &id).await;
                }
                error.class()
            }
            Err(_panic) => {
                // The panic hook has printed where.
                tracing::error!("the task panicked; the others go on");
                Class::Bug
            }
        };
        shell.metrics.restarted();
        let pause_max = class.requeue(u32::MAX);
        failures = if began.elapsed() > pause_max { 1 } else { failures.saturating_add(1) };
        tokio::time::sleep(class.requeue(failures)).await;
    }
}

/// Renews what is due of a cluster's certificates while its task cannot, if this process may act.
async fn renew_certificates(shell: &Shell, id: &ClusterId) {
    if shell.leadership.check().is_ok()
        && let Err(why) = owned::renew(shell, id).await
    {
        why.warn();
    }
}

/// Releases a resource that is being deleted and whose journal cannot be written until someone repairs it: a history that
/// is broken anyway must not keep a resource, and with it a namespace, for ever.
async fn let_go(shell: &Shell, id: &ClusterId) {
    let deleting = shell.resource(id).is_some_and(|r| r.metadata.deletion_timestamp.is_some());
    if !deleting || shell.leadership.check().is_err() {
        return;
    }
    match claim::release(shell, id).await {
        Ok(()) => {
            tracing::warn!("the resource is released; its journal cannot be written and does not say so")
        }
        Err(error) => tracing::warn!(error = k8s::chain(&error), "the resource could not be released"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chart_lets_as_much_be_kept_as_the_store_takes() {
        let chart = include_str!("../charts/valkeeper/templates/_journal.tpl");
        let config_maps = keep_max(&JournalStore::ConfigMap) / 1024;
        let directory = keep_max(&JournalStore::Sled("/journal".into())) / 1024 / 1024;
        let most = format!(r#"$most := ternary "{config_maps}Ki" "{directory}Mi" $inConfigMaps"#);
        assert!(chart.contains(&most), "_journal.tpl lacks {most}");
    }
}

//! The scenarios, in order, and what they share.

mod agent;
mod bad_input;
mod balance;
mod by_key;
mod cluster;
mod cluster_by_hand;
mod cluster_life;
mod cluster_lost;
mod fencing;
mod handover;
mod isolation;
mod keeping;
mod kills;
mod large;
mod leadership;
mod life;
mod logins;
mod names;
mod namespace;
mod neighbours;
mod operator_away;
mod real_clients;
mod reshard;
mod secrets;
mod silence;
mod spec_change;
mod stuck;
mod tampered;

use crate::support::{
    Place, audit_log::AuditLog, delete_namespace, operator::Operator, resp::Reach, restricted_namespace,
    subject::Subject, tunnel, wait::until,
};
use anyhow::bail;
use kube::Client;
use serde_json::{Value, json};
use std::{future::Future, pin::Pin, time::Duration};

/// Namespace of everything that the scenarios make.
const NAMESPACE: &str = "valkeeper-e2e";
/// Name of the ValkeyCluster.
const NAME: &str = "orders";
/// Namespace of the one of topology Cluster.
const LEDGER_NAMESPACE: &str = "valkeeper-e2e-ledger";
/// Its name.
const LEDGER_NAME: &str = "ledger";
/// Until volumes that nobody uses any more are gone.
const CLAIMS_MAX: Duration = Duration::from_secs(60);

/// What must be there before a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begins {
    /// No ValkeyCluster.
    WithNothing,
    /// One that is Ready, with two replicas.
    WithAReadyCluster,
    /// None of topology Cluster, and no volumes of one.
    WithoutALedger,
    /// One of topology Cluster that is Ready, of three shards with a replica each.
    WithAReadyLedger,
}

type Story<'a> = Pin<Box<dyn Future<Output = anyhow::Result<String>> + 'a>>;

/// One scenario.
pub struct Scenario {
    /// Its name on the command line and in the report.
    pub name: &'static str,
    /// What must be there before.
    pub begins: Begins,
    /// True if it needs pids of pods.
    pub needs_nodes: bool,
    /// Runs it; gives its figures in one line.
    pub run: for<'a> fn(&'a World) -> Story<'a>,
}

macro_rules! scenario {
    ($name:literal, $begins:ident, $needs_nodes:literal, $run:path) => {
        Scenario {
            name: $name,
            begins: Begins::$begins,
            needs_nodes: $needs_nodes,
            run: |world| Box::pin($run(world)),
        }
    };
}

/// Every scenario, in the order in which they run.
pub const SCENARIOS: &[Scenario] = &[
    scenario!("create", WithNothing, false, life::create),
    scenario!("ten-kills", WithAReadyCluster, false, kills::ten),
    scenario!("server-killed", WithAReadyCluster, true, agent::server_killed),
    scenario!("agent-killed", WithAReadyCluster, true, agent::agent_killed),
    scenario!("restarted-empty", WithAReadyCluster, true, agent::restarted_empty),
    scenario!("restarted-empty-alone", WithAReadyCluster, true, agent::restarted_empty_alone),
    scenario!("flushed", WithAReadyCluster, false, agent::flushed),
    scenario!("primary-pod-deleted", WithAReadyCluster, false, handover::pod_deleted),
    scenario!("node-drained", WithAReadyCluster, false, handover::node_drained),
    scenario!("node-drained-with-operator", WithAReadyCluster, false, handover::node_drained_with_operator),
    scenario!("node-cordoned", WithAReadyCluster, false, handover::node_cordoned),
    scenario!("real-clients", WithAReadyCluster, true, real_clients::through_the_service),
    scenario!("operator-away", WithAReadyCluster, false, handover::operator_away),
    scenario!("primary-isolated", WithAReadyCluster, true, isolation::primary_isolated),
    scenario!("primary-half-cut", WithAReadyCluster, true, isolation::one_side_cut),
    scenario!("pod-frozen", WithAReadyCluster, true, isolation::pod_frozen),
    scenario!("primary-frozen", WithAReadyCluster, true, silence::frozen),
    scenario!("operator-killed", WithAReadyCluster, true, operator_away::killed_in_a_failover),
    scenario!("two-operators", WithAReadyCluster, true, fencing::two_operators),
    scenario!("two-operators-late-append", WithAReadyCluster, true, fencing::late_append),
    scenario!("lease-edited", WithAReadyCluster, true, leadership::lease_edited),
    scenario!("clocks-an-hour-apart", WithAReadyCluster, true, leadership::clocks_an_hour_apart),
    scenario!("journal-by-a-user", WithAReadyCluster, true, tampered::by_a_user),
    scenario!("journal-kept", WithAReadyCluster, true, keeping::kept),
    scenario!("secrets-nowhere", WithNothing, true, secrets::nowhere),
    scenario!("secrets-lost", WithAReadyCluster, true, logins::lost),
    scenario!("changed-by-hand", WithAReadyCluster, false, operator_away::changed_by_hand),
    scenario!("scale-2-4-1", WithAReadyCluster, false, spec_change::scale),
    scenario!("rolling-config", WithAReadyCluster, false, spec_change::config),
    scenario!("bad-input", WithAReadyCluster, false, bad_input::refused_and_healed),
    scenario!("names-collide", WithAReadyCluster, false, names::collide),
    scenario!("namespace-deleted", WithAReadyCluster, false, namespace::deleted),
    scenario!("rough-neighbours", WithAReadyCluster, true, neighbours::rough),
    scenario!("stuck-says-why", WithAReadyCluster, false, stuck::says_why),
    scenario!("kept-volumes", WithAReadyCluster, false, life::kept_volumes),
    scenario!("delete", WithAReadyCluster, false, life::delete),
    scenario!("cluster-create-alone", WithoutALedger, false, cluster::create_alone),
    scenario!("cluster-create", WithoutALedger, false, cluster::create),
    scenario!("cluster-kill", WithAReadyLedger, false, cluster::kill),
    scenario!("cluster-two-killed", WithAReadyLedger, false, cluster::two_killed),
    scenario!("cluster-kill-alone", WithAReadyLedger, false, cluster::kill_alone),
    scenario!("cluster-all-deleted", WithAReadyLedger, false, cluster::all_deleted),
    scenario!("cluster-frozen", WithAReadyLedger, true, silence::frozen_in_cluster),
    scenario!("cluster-divided", WithAReadyLedger, true, cluster_lost::divided),
    scenario!("cluster-bus-cut", WithAReadyLedger, true, cluster_lost::bus_cut),
    scenario!("cluster-volumes-lost", WithAReadyLedger, true, cluster_lost::volumes_lost),
    scenario!("cluster-told-otherwise", WithAReadyLedger, false, cluster_by_hand::told_otherwise),
    scenario!("cluster-pod-deleted", WithAReadyLedger, false, cluster_life::pod_deleted),
    scenario!("cluster-real-clients", WithAReadyLedger, true, real_clients::of_a_cluster),
    scenario!("cluster-rollout", WithAReadyLedger, false, cluster_life::rollout),
    scenario!("cluster-five-two", WithAReadyLedger, false, cluster_life::five_two),
    scenario!("reshard-out-in", WithAReadyLedger, false, reshard::out_in),
    scenario!("reshard-faults", WithAReadyLedger, true, reshard::faults),
    scenario!("reshard-never-starts", WithAReadyLedger, true, reshard::never_starts),
    scenario!("slots-half-moved", WithAReadyLedger, false, by_key::half_moved),
];

/// Those that take too long for every run: only when they are asked for by their whole name.
pub const BY_HAND: &[Scenario] = &[
    scenario!("secrets-changed", WithAReadyCluster, true, logins::changed),
    scenario!("cluster-cache", WithoutALedger, true, cluster_lost::cache),
    scenario!("cluster-switchover", WithAReadyLedger, false, cluster_life::switchover),
    scenario!("cluster-replicas", WithAReadyLedger, false, cluster_life::replicas),
    scenario!("reshard-operator", WithAReadyLedger, true, reshard::operator_killed),
    scenario!("cluster-balance", WithoutALedger, false, balance::by_keys),
    scenario!("reshard-by-key", WithoutALedger, true, by_key::source_killed),
    scenario!("cluster-upgrade", WithoutALedger, false, by_key::upgrade),
    scenario!("reshard-rounds", WithAReadyLedger, false, reshard::rounds),
    scenario!("cluster-large", WithoutALedger, false, large::formed_and_taken_over),
];

/// Everything a scenario works with.
pub struct World {
    /// API server.
    pub client: Client,
    /// The operator.
    pub operator: Operator,
    /// The audit log, where it is within reach.
    pub audit: Option<AuditLog>,
    /// The ValkeyCluster.
    pub subject: Subject,
    /// The one of topology Cluster.
    pub ledger: Subject,
    /// Where all this is.
    pub place: Place,
}

impl World {
    /// Prepares the namespace, and removes what an earlier run left.
    pub async fn new(
        client: Client,
        operator: Operator,
        audit: Option<AuditLog>,
        place: Place,
    ) -> anyhow::Result<World> {
        restricted_namespace(&client, NAMESPACE).await?;
        let reach = match place {
            Place::Local => Reach::Direct,
            Place::Existing => tunnel::open(&client, NAMESPACE).await?,
        };
        restricted_namespace(&client, LEDGER_NAMESPACE).await?;
        let subject = |namespace: &str, name: &str| Subject {
            client: client.clone(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            reach: reach.clone(),
            place,
        };
        let (orders, ledger) = (subject(NAMESPACE, NAME), subject(LEDGER_NAMESPACE, LEDGER_NAME));
        let world = World { client, operator, audit, subject: orders, ledger, place };
        world.remove().await?;
        world.subject.delete_claims().await?;
        remove(&world.ledger).await?;
        world.ledger.delete_claims().await?;
        Ok(world)
    }

    /// Brings about what a scenario needs.
    pub async fn begin(&self, begins: Begins) -> anyhow::Result<()> {
        match begins {
            Begins::WithNothing => self.remove().await,
            Begins::WithAReadyCluster => {
                self.subject.apply(&spec()).await?;
                self.subject.ready().await?;
                Ok(())
            }
            Begins::WithoutALedger => {
                // One at a time: the machine has memory for nine members, and no time for them.
                self.remove().await?;
                remove_with_claims(&self.ledger).await
            }
            Begins::WithAReadyLedger => {
                self.remove().await?;
                self.ledger.apply(&cluster::ledger()).await?;
                self.ledger.ready().await?;
                Ok(())
            }
        }
    }

    /// The ValkeyCluster that a scenario is about.
    pub fn subject_of(&self, scenario: &Scenario) -> &Subject {
        match scenario.begins {
            Begins::WithNothing | Begins::WithAReadyCluster => &self.subject,
            Begins::WithoutALedger | Begins::WithAReadyLedger => &self.ledger,
        }
    }

    /// Removes the ValkeyCluster and waits until its pods are gone, too.
    pub async fn remove(&self) -> anyhow::Result<()> {
        remove(&self.subject).await
    }

    /// After a failure: the operator runs, and the next scenario begins with a new ValkeyCluster.
    pub async fn start_over(&self) -> anyhow::Result<()> {
        self.operator.scale(1).await?;
        self.remove().await?;
        self.subject.delete_claims().await?;
        remove(&self.ledger).await?;
        self.ledger.delete_claims().await
    }

    /// After the last scenario: nothing that cannot be made again is left, except journals.
    pub async fn clean_up(&self) -> anyhow::Result<()> {
        self.start_over().await?;
        delete_namespace(&self.client, NAMESPACE).await?;
        delete_namespace(&self.client, LEDGER_NAMESPACE).await?;
        Operator::uninstall()
    }
}

async fn remove(subject: &Subject) -> anyhow::Result<()> {
    if subject.exists().await? {
        subject.delete().await?;
    }
    gone(subject).await
}

/// Removes a ValkeyCluster, and its volumes, so that another of that name begins with nothing.
async fn remove_with_claims(subject: &Subject) -> anyhow::Result<()> {
    remove(subject).await?;
    subject.delete_claims().await?;
    until("its volumes to be gone", CLAIMS_MAX, || async {
        match subject.claims().await?.as_slice() {
            [] => Ok(()),
            left => bail!("{left:?} are left"),
        }
    })
    .await
    .map(|_| ())
}

/// Waits until the resource and its pods are gone.
pub async fn gone(subject: &Subject) -> anyhow::Result<()> {
    subject.gone().await
}

/// Two replicas on volumes.
pub fn spec() -> Value {
    json!({
        "topology": "Replication",
        "replicas": 2,
        "profile": "Durable",
        "persistence": { "size": "1Gi" },
        "resources": { "requests": { "cpu": "50m", "memory": "128Mi" }, "limits": { "memory": "256Mi" } },
    })
}

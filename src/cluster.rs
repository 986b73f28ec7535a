//! What one cluster's task owns: its journal, its state, its connections. And what all tasks share.

use crate::{
    agents::{AgentLinks, Registry, Seat},
    api::{Defaults, v1alpha1::ValkeyCluster},
    clock::Clock,
    health::Metrics,
    k8s::{
        cache::Owner,
        client::Clients,
        events::{News, Publisher},
        secrets::SecretCache,
        watch::{Wakers, World},
    },
    keeping::{Keeping, Tending},
    lease::Leadership,
    links::Links,
    observe::Troubles,
    owned::OwnedObjects,
    pods::Vanished,
    publish::{self, Press},
    vault::Vault,
};
use kube::ResourceExt;
use std::{sync::Arc, time::Duration};
use tokio::{sync::Notify, time::Instant};
use valkeeper_core::{
    decision::Scope,
    event::{Event, Record},
    ids::{MemberId, Seq, Timestamp},
    observation::Executed,
    state::ClusterState,
};
use valkeeper_journal::{Backend, Journal};

/// Longest pause between two turns: the net under lost wake-ups. One INFO per member and second costs a server about
/// 0.1 % of a core, and a silent server is noticed by it.
pub const PROBE_PERIOD: Duration = Duration::from_secs(1);

/// Shortest pause between two turns of which the first changed nothing: a rule that asks to be woken in the past must not spin.
const PAUSE_MIN: Duration = Duration::from_millis(5);

/// What all tasks share.
pub struct Shell {
    /// Connections to the API server.
    pub clients: Clients,
    /// What the watches bring.
    pub world: World,
    /// Whom they wake.
    pub wakers: Wakers,
    /// What is measured.
    pub metrics: Arc<Metrics>,
    /// Whether this process may act.
    pub leadership: Leadership,
    /// Where journals are kept.
    pub backend: Arc<dyn Backend>,
    /// Kubernetes Events.
    pub publisher: Publisher,
    /// How journals are kept.
    pub keeping: Keeping,
    /// What the flags decide where a spec says nothing.
    pub defaults: Defaults,
    /// Name of this writer in journals: the pod.
    pub writer: String,
    /// Certificate authorities, and the operator's own identity.
    pub vault: Arc<Vault>,
    /// What the agents of each cluster say.
    pub registry: Arc<Registry>,
    /// host:port at which agents bring their news; empty if nobody knows this process's address.
    pub news_address: String,
    /// The clock.
    pub clock: Clock,
}

impl Shell {
    /// The resource with this name and UID, if it is there.
    pub fn resource(&self, id: &ClusterId) -> Option<Arc<ValkeyCluster>> {
        let live = self.world.clusters.get(&id.owner.0, &id.owner.1)?;
        (live.uid().as_deref() == Some(&id.uid)).then_some(live)
    }
}

/// A user's resource: its UID is the journal's name, and a resource of the same name with another UID is another cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClusterId {
    /// Namespace and name.
    pub owner: Owner,
    /// `metadata.uid`.
    pub uid: String,
}

/// Why a turn begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// A connection to a member ended, or effects did: act on who answers, do not wait for who is silent.
    Urgent,
    /// Anything else.
    Normal,
}

/// One cluster.
pub struct Cluster {
    /// What all tasks share.
    pub shell: Arc<Shell>,
    /// Whose task this is.
    pub id: ClusterId,
    /// The clock of its records: never behind what an earlier writer has recorded.
    pub clock: Clock,
    /// The writer of its journal, which has claimed the head.
    pub journal: Journal,
    /// The fold over everything recorded.
    pub state: ClusterState,
    /// Connections to its members.
    pub links: Links,
    /// Connections to their agents.
    pub agents: AgentLinks,
    /// By which agents' news find this task.
    pub seat: Seat,
    /// What its spec renders to.
    pub owned: OwnedObjects,
    /// What the API server said of pods that the watch shows no more.
    pub vanished: Vanished,
    /// Why pods do not run.
    pub troubles: Troubles,
    /// Its Secrets.
    pub secrets: SecretCache,
    /// Outcomes that are not recorded yet.
    pub executed: Vec<Executed>,
    /// Publishes beside the turns.
    pub press: Press,
    /// Woken by the watches.
    pub wake: Arc<Notify>,
    /// What is done for its journal in quiet moments.
    pub tending: Tending,
}

impl Cluster {
    /// Folds new records into the state; returns what is to be told of them.
    pub fn fold(&mut self, records: &[Record]) -> Vec<News> {
        let mut news = Vec::new();
        for record in records {
            news.extend(publish::news(&self.state, record));
            if let Event::Decided { decision, evidence: _ } = &record.event {
                self.shell.metrics.decided(decision);
                tracing::info!(j = record.seq.0, reason = decision.reason.code(), scope = %decision.scope, "decided");
            }
            self.state.apply(record);
        }
        self.tending.wrote(records.len());
        news
    }

    /// Confirms to holders who ask what is in force now, and nothing else.
    pub fn publish_grants(&self) {
        let board = self.agents.board();
        board.publish(self.state.confirmed());
        board.granted_up_to(self.state.highest_grant());
    }

    /// A promotion is about to be recorded: from now on its shard's holder is not confirmed any more, however long the append
    /// takes. What was confirmed before is known to the board by its time.
    pub fn withdraw_grants<'a>(&self, events: impl Iterator<Item = &'a Event>) {
        let promoting = events.filter_map(Event::decided).filter(|d| d.promotes()).map(|d| d.scope);
        let scopes: Vec<Scope> = promoting.collect();
        if !scopes.is_empty() {
            let stays = |(id, _): &(MemberId, Seq)| !scopes.contains(&Scope::Shard(id.shard));
            self.agents.board().publish(self.state.confirmed().filter(stays));
        }
    }

    /// Waits for the next reason to look. When the time has come that a rule asked for, it is acted on without waiting for who
    /// is silent; but not twice in a row (`last` is the pace of the look before), or a slow server would never be heard. `again`: the
    /// longest pause.
    pub async fn wait(&self, wake_at: Option<Timestamp>, again: Duration, last: Pace) -> Pace {
        let now = Instant::now();
        let due = wake_at.map_or(now + PROBE_PERIOD, |at| self.clock.moment(at));
        let until = due.clamp(now + PAUSE_MIN, now + again);
        tokio::select! {
            biased;
            () = self.links.lost.notified() => Pace::Urgent,
            () = self.wake.notified() => Pace::Normal,
            () = tokio::time::sleep_until(until) => match last {
                Pace::Normal if due <= until && wake_at.is_some() => Pace::Urgent,
                Pace::Normal | Pace::Urgent => Pace::Normal,
            },
        }
    }
}

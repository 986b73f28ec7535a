//! How a task begins: read the history, become its only writer, and make everything that an earlier writer may still have
//! in its hands worthless. Only then is anything decided.

use crate::{
    agents::{AgentLinks, Board, Dial, EPOCH_MAX, Tunnel},
    api::v1alpha1::{FINALIZER, ValkeyCluster},
    cluster::{Cluster, ClusterId, Shell},
    k8s::{self, apply, secrets::SecretCache, slice},
    keeping::Tending,
    links::Links,
    objects::AGENT_PORT,
    observe::Troubles,
    owned::{self, OwnedObjects},
    pods::Vanished,
    publish,
    reconcile::Error,
    witness::Witness,
};
use kube::ResourceExt;
use std::sync::Arc;
use valkeeper_core::{
    event::{BaselineOrigin, Event},
    ids::{Seq, WriterEpoch},
    state::ClusterState,
};
use valkeeper_journal::{Claim, Journal, StreamId};

/// How often a route is read and touched when others write to it at the same time. The earlier writer's last move is one;
/// more than a few is a fight that someone must end.
const TOUCH_ATTEMPTS_MAX: u32 = 4;

/// How the run before this one ended, as far as the next one must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// In no way that matters.
    Nothing,
    /// Agents refused it by this epoch.
    DeposedBy(WriterEpoch),
    /// Its journal was full, and nothing might go.
    Full,
}

/// Opens the journal, folds it, claims its head, and fences the world against earlier writers. (The members' agents are
/// told the epoch by the first look, which greets them: from then on they refuse lower ones.)
///
/// The journal is the authority: if even its newest epoch is below that by which agents refused this writer, it is
/// not the one that those agents were told, and is claimed with one above.
///
/// # Errors
/// As the journal and the API server have it.
pub async fn claim(shell: &Arc<Shell>, id: &ClusterId, before: Before) -> Result<Cluster, Error> {
    shell.leadership.check()?;
    let stream = StreamId(id.uid.clone());
    let live = shell.resource(id).filter(|_| shell.keeping.survives);
    let witness = live.as_deref().map(Witness::of).unwrap_or_default();
    let (mut journal, mut state, lost_through) = open(shell, &stream, witness).await?;
    let retention = match before {
        Before::Full => shell.keeping.carry_now(shell, &stream, shell.clock.now()).await?,
        Before::Nothing | Before::DeposedBy(_) => shell.keeping.retention(),
    };
    journal.retain(retention);
    let claimed = claim_head(shell, id, &mut journal, above(before), lost_through).await?;
    claimed.records.iter().for_each(|record| state.apply(record));
    let mut cluster = assemble(shell, id, journal, state)?;
    let epoch = cluster.state.epoch;
    tracing::info!(j = cluster.state.head.0, epoch = epoch.0, "claimed the journal");
    if let Some(level) = shell.keeping.finalize {
        let now = cluster.clock.now();
        let finalized = cluster.journal.finalize(level, env!("CARGO_PKG_VERSION"), now).await?;
        cluster.fold(&finalized.records);
    }
    touch_routes(&cluster, epoch).await?;
    hold(&cluster).await?;
    cluster.publish_grants();
    Ok(cluster)
}

/// Opens the journal, if it holds what is remembered of it. A damaged one is repaired first, or given up, if a person said so. Also gives
/// the record up to which a loss was accepted.
async fn open(
    shell: &Shell,
    stream: &StreamId,
    witness: Witness,
) -> Result<(Journal, ClusterState, Option<Seq>), valkeeper_journal::Error> {
    let open = |anchor| Journal::open_anchored(Arc::clone(&shell.backend), stream.clone(), anchor);
    let traced = if witness.may_lose { traced(shell, stream).await } else { None };
    if witness.may_repair {
        // Of both copies: a start would only read the one that is well.
        let checked = Journal::open_thoroughly(Arc::clone(&shell.backend), stream.clone(), witness.anchor);
        if let Err(error) = checked.await
            && error.is_damage()
        {
            tracing::warn!(
                error = k8s::chain(&error),
                "the journal is written anew from its second copy, as asked"
            );
            match shell.backend.repair(stream, witness.needed()).await {
                // Not a blink, after which the second copy would be given up as well.
                Err(error) if !(witness.may_lose && error.is_damage()) => return Err(error.into()),
                Ok(()) | Err(_) => {}
            }
        }
    }
    let damage = match open(witness.anchor).await {
        Err(error) if error.is_damage() && witness.may_lose => error,
        opened => return opened.map(|(journal, state)| (journal, state, None)),
    };
    tracing::warn!(error = k8s::chain(&damage), "a person accepted that records of the journal are gone");
    shell.backend.accept_loss(stream).await?;
    let opened = match open(None).await {
        Err(error) if error.is_damage() => {
            shell.backend.forget(stream).await?;
            open(None).await
        }
        opened => opened,
    };
    let lost_through = traced.max(witness.anchor.map(|anchor| anchor.seq));
    opened.map(|(journal, state)| (journal, state, lost_through))
}

/// The last record that there was any trace of, before what is left of it is given up. A store that cannot say is no reason to stop.
async fn traced(shell: &Shell, stream: &StreamId) -> Option<Seq> {
    shell.backend.claimed_end(stream).await.ok().flatten()
}

fn assemble(
    shell: &Arc<Shell>,
    id: &ClusterId,
    journal: Journal,
    state: ClusterState,
) -> Result<Cluster, Error> {
    let live = shell.vault.live().ok_or(Error::NoIdentity)?;
    let clock = shell.clock.not_before(state.head_time);
    let (namespace, name) = &id.owner;
    let tunnel =
        Tunnel { port: AGENT_PORT, live: live.clone(), namespace: namespace.clone(), cluster: name.clone() };
    let (links, wake) = (Links::new(Arc::new(tunnel)), shell.wakers.of(&id.owner));
    let board = Arc::new(Board::new(state.epoch, clock, Arc::clone(&links.lost), Arc::clone(&wake)));
    let seat = shell.registry.open(&id.owner, Arc::clone(&board));
    let dial = Dial { live, news_address: shell.news_address.clone(), board };
    Ok(Cluster {
        shell: Arc::clone(shell),
        id: id.clone(),
        secrets: SecretCache::new(shell.clients.requests.clone(), namespace),
        press: publish::Press::start(shell, id),
        agents: AgentLinks::new(namespace, name, AGENT_PORT, dial),
        seat,
        wake,
        clock,
        journal,
        state,
        links,
        owned: OwnedObjects::default(),
        vanished: Vanished::default(),
        troubles: Troubles::default(),
        executed: Vec::new(),
        tending: Tending::default(),
    })
}

/// The epoch to claim above: that by which agents refused the run before.
fn above(before: Before) -> WriterEpoch {
    match before {
        Before::DeposedBy(theirs) if theirs <= EPOCH_MAX => theirs,
        Before::DeposedBy(_) | Before::Nothing | Before::Full => WriterEpoch(0),
    }
}

async fn claim_head(
    shell: &Shell,
    id: &ClusterId,
    journal: &mut Journal,
    above: WriterEpoch,
    lost_through: Option<Seq>,
) -> Result<valkeeper_journal::Appended, Error> {
    let genesis = journal.head().is_none().then(|| Event::Baseline {
        cluster_uid: id.uid.clone(),
        namespace: id.owner.0.clone(),
        name: id.owner.1.clone(),
        origin: origin(shell, id),
    });
    let version = env!("CARGO_PKG_VERSION");
    let claim = Claim { genesis, writer: &shell.writer, version, above, lost_through };
    Ok(journal.claim_as(claim, shell.clock.now()).await?)
}

/// History begins with nothing, unless members are there already.
fn origin(shell: &Shell, id: &ClusterId) -> BaselineOrigin {
    let nothing =
        shell.world.pods.of(&id.owner).is_empty() && shell.world.stateful_sets.of(&id.owner).is_empty();
    if nothing { BaselineOrigin::Empty } else { BaselineOrigin::Observed }
}

/// Writes the epoch into every write route, so that a move which an earlier writer still has under way is refused.
async fn touch_routes(cluster: &Cluster, epoch: WriterEpoch) -> Result<(), Error> {
    let client = &cluster.shell.clients.requests;
    let (namespace, _) = &cluster.id.owner;
    let slices = cluster.shell.world.slices.of(&cluster.id.owner);
    for known in slices.iter().filter(|slice| owned::is_own_route(cluster, slice)) {
        let name = known.name_any();
        for attempt in 1..=TOUCH_ATTEMPTS_MAX {
            let Some(live) = slice::get(client, namespace, &name).await? else { break };
            match slice::touch(client, &live, epoch).await {
                Ok(touched) => {
                    cluster.shell.world.slices.written(&touched);
                    break;
                }
                Err(k8s::Error::Conflict { .. }) if attempt < TOUCH_ATTEMPTS_MAX => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// Puts the finalizer on the resource: from now on its deletion waits until it is recorded.
async fn hold(cluster: &Cluster) -> Result<(), Error> {
    let Some(live) = cluster.shell.resource(&cluster.id) else { return Ok(()) };
    if live.metadata.deletion_timestamp.is_some() || held(&live) {
        return Ok(());
    }
    let finalizers = live.finalizers().iter().cloned().chain([FINALIZER.to_owned()]).collect();
    let held = apply::set_finalizers(&cluster.shell.clients.requests, &*live, finalizers).await?;
    cluster.shell.world.clusters.written(&held);
    Ok(())
}

/// Takes the finalizer off the resource, if it is there and has it. The keys of its certificates go first: afterwards nobody
/// would know of them.
///
/// # Errors
/// The API server's.
pub async fn release(shell: &Shell, id: &ClusterId) -> Result<(), k8s::Error> {
    let Some(live) = shell.resource(id).filter(|live| held(live)) else { return Ok(()) };
    shell.vault.forget(id).await?;
    let others = live.finalizers().iter().filter(|f| *f != FINALIZER).cloned().collect();
    match apply::set_finalizers(&shell.clients.requests, &*live, others).await {
        Ok(released) => shell.world.clusters.written(&released),
        // Released by an attempt whose answer was lost.
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

/// True if the finalizer is on the resource.
fn held(resource: &ValkeyCluster) -> bool {
    resource.finalizers().iter().any(|f| f == FINALIZER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_journal_is_claimed_above_what_agents_know_unless_that_is_nonsense() {
        assert_eq!(above(Before::Nothing), WriterEpoch(0));
        assert_eq!(above(Before::DeposedBy(WriterEpoch(200))), WriterEpoch(200));
        assert_eq!(above(Before::DeposedBy(WriterEpoch(u64::MAX))), WriterEpoch(0));
    }
}

//! Effects on members. Looking is the operator's own; whatever changes a server is told to its agent, with the grant it is
//! done under. Each command is sent once; what is not certain is a failure, and the next look says how things are.

use crate::{
    agents::{AgentLink, CallError, Endpoint, Paused},
    api::parse_all,
    cluster::Cluster,
    valkey::{Look, MemberLink},
};
use std::time::Duration;
use tokio::time::Instant;
use valkeeper_agent::proto;
use valkeeper_core::{
    agent::{Brief, ledger::PROMISE_MARGIN_MS},
    effect::{Means, Outcome, Promotion, Server},
    ids::{Digest, MemberId, NodeId},
    info::{RawRole, RawSource},
    observation::{Link, Observed},
    slots::SlotSet,
};

/// How long writes stay paused beyond the bound of a handover: the demotion must have been answered by then, or the old
/// primary would accept what nobody waits for. Milliseconds.
const PAUSE_MARGIN_MS: u32 = 3_000;

/// Between two looks at a replica that is catching up: it takes a few milliseconds, and each of these is one of outage. The
/// timer rounds it up to its own millisecond.
const CATCH_UP_PAUSE: Duration = Duration::from_micros(100);

/// What a command came to; an `Err` is the outcome of one that was not done.
type Told = Result<(), Outcome>;

/// The agent takes the grant and makes its server primary.
pub async fn promote(
    cluster: &Cluster,
    server: &Server,
    brief: &Brief,
    at: &Paused,
    consents: u64,
    by: Promotion,
) -> Told {
    let by = match by {
        Promotion::Detach => proto::Promotion::Unspecified,
        Promotion::Open => proto::Promotion::Open,
        Promotion::Force => proto::Promotion::Force,
        Promotion::Takeover => proto::Promotion::Takeover,
    };
    Ok(agent_of(cluster, server)?.promote_by(by, server, brief, at, consents).await?)
}

/// The agent learns who holds the grant.
pub async fn tell(cluster: &Cluster, member: MemberId, address: &str, brief: &Brief) -> Told {
    Ok(agent(cluster, member, address)?.tell(brief).await?)
}

/// The agent ends a server that does not answer.
pub async fn fence(cluster: &Cluster, server: &Server) -> Told {
    Ok(agent_of(cluster, server)?.fence(server).await?)
}

/// The server follows the one at an address, or in a Valkey Cluster the one that is this node.
pub async fn attach(
    cluster: &Cluster,
    server: &Server,
    brief: &Brief,
    to_address: &str,
    node: Option<&NodeId>,
) -> Told {
    Ok(agent_of(cluster, server)?.attach(server, brief, &Endpoint::of_member(to_address, node)).await?)
}

/// The server's node is told where a member is. Two clusters that meet are one for good, and addresses change hands: so the
/// member's agent must answer there now, with its certificate.
pub async fn meet(cluster: &Cluster, server: &Server, member: MemberId, address: &str) -> Told {
    let teller = agent_of(cluster, server)?;
    let proven = agent(cluster, member, address)?.prove().await;
    proven.map_err(|error| Outcome::Superseded(format!("{member} does not prove itself: {error}")))?;
    Ok(teller.meet(server, &Endpoint::of_member(address, None)).await?)
}

/// Slots that nobody owns become the server's.
pub async fn add_slots(
    cluster: &Cluster,
    server: &Server,
    node: &NodeId,
    slots: &SlotSet,
    config_epoch: Option<u64>,
) -> Told {
    Ok(agent_of(cluster, server)?.add_slots(server, node, slots, config_epoch).await?)
}

/// The server's node hands slots over to another.
pub async fn migrate_slots(
    cluster: &Cluster,
    server: &Server,
    slots: &SlotSet,
    to: &NodeId,
    by: Means,
) -> Told {
    Ok(agent_of(cluster, server)?.migrate_slots(server, slots, to, by).await?)
}

/// The server's node forgets one that is nobody's any more.
pub async fn forget(cluster: &Cluster, server: &Server, node: &NodeId) -> Told {
    Ok(agent_of(cluster, server)?.forget(server, node).await?)
}

/// The server takes the settings of the spec, if those are still the ones that were decided on.
pub async fn configure(cluster: &Cluster, server: &Server, digest: &Digest) -> Told {
    let superseded = |why: &str| Outcome::Superseded(why.to_owned());
    let resource = cluster.shell.resource(&cluster.id).ok_or_else(|| superseded("the resource is gone"))?;
    let parsed = parse_all(&resource, &cluster.shell.defaults)
        .map_err(|invalid| Outcome::Superseded(invalid.to_string()))?;
    let config = parsed.workload.config;
    if config.live_digest() != *digest {
        return Err(superseded("the spec has other settings now"));
    }
    Ok(agent_of(cluster, server)?.configure(server, digest, config.live()).await?)
}

/// The server's clients look for the primary again.
pub async fn disconnect(cluster: &Cluster, server: &Server) -> Told {
    Ok(agent_of(cluster, server)?.disconnect(server).await?)
}

/// [`handover`] between two members of the cluster, or [`swap_nodes`] if `node` says that the one is a node of a Valkey Cluster.
pub async fn hand_over(
    cluster: &Cluster,
    (from, to): (&Server, &Server),
    brief: &Brief,
    consents: u64,
    timeout_ms: u32,
    node: Option<&NodeId>,
) -> Outcome {
    match (side(cluster, from), side(cluster, to), node) {
        (Ok(from), Ok(to), None) => handover(&from, &to, brief, consents, timeout_ms).await,
        (Ok(from), Ok(to), Some(node)) => {
            swap_nodes(&from, &to, node, brief, consents).await.err().unwrap_or(Outcome::Verified)
        }
        (Err(superseded), _, _) | (_, Err(superseded), _) => superseded,
    }
}

/// Peers promise nothing while the present holder may still be accepting writes because this operator confirmed it, with the
/// margin that peers keep, too; each peer looks after its own confirmations.
pub async fn promise(cluster: &Cluster, member: MemberId, address: &str, brief: &Brief) -> Told {
    let window = brief.isolation_ms.saturating_add(PROMISE_MARGIN_MS);
    let window = Duration::from_millis(u64::try_from(window).unwrap_or(0));
    let candidate = brief.holder;
    let holders = brief.roster.iter().filter(|id| Some(**id) != candidate);
    let lately =
        holders.filter_map(|id| cluster.agents.board().confirmed_at(*id)).map(|at| at.elapsed()).min();
    if let Some(ago) = lately.filter(|ago| *ago < window) {
        let words = format!("the operator confirmed the holder {} ms ago", ago.as_millis());
        return Err(Outcome::Superseded(words));
    }
    Ok(agent(cluster, member, address)?.promise(brief).await?)
}

/// The link to a member's agent, if it leads to the address that the effect names.
fn agent<'a>(cluster: &'a Cluster, member: MemberId, address: &str) -> Result<&'a AgentLink, Outcome> {
    match cluster.agents.get(member) {
        Some(link) if link.place().address.ip().to_string() == address => Ok(link),
        Some(link) => Err(Outcome::Superseded(format!("{member} is at {} now", link.place().address.ip()))),
        None => Err(Outcome::Superseded(format!("{member} has no address now"))),
    }
}

fn agent_of<'a>(cluster: &'a Cluster, server: &Server) -> Result<&'a AgentLink, Outcome> {
    agent(cluster, server.member, &server.address)
}

fn side<'a>(cluster: &'a Cluster, server: &'a Server) -> Result<Side<'a>, Outcome> {
    let agent = agent_of(cluster, server)?;
    let link = cluster.links.get(server.member);
    let link = link.ok_or_else(|| Outcome::Superseded(format!("{} has no address now", server.member)))?;
    Ok(Side { agent, link, server })
}

/// One of the two servers of a handover.
pub struct Side<'a> {
    /// Its agent, who is told.
    pub agent: &'a AgentLink,
    /// The server, which is looked at.
    pub link: &'a MemberLink,
    /// Which process it must be.
    pub server: &'a Server,
}

impl Side<'_> {
    async fn look(&self) -> Result<Look, Outcome> {
        let Server { member, run_id, address: _ } = self.server;
        match self.link.look().await {
            Observed::Present(look) if look.run_id == *run_id => Ok(look),
            Observed::Present(look) => Err(Outcome::Superseded(format!(
                "{member} is another process: {}, not {run_id}",
                look.run_id
            ))),
            Observed::Absent | Observed::Unknown(_) => {
                Err(Outcome::Superseded(format!("{member} does not answer")))
            }
        }
    }
}

/// Hands the grant of `brief` over from a primary to its replica: writes pause, the replica catches up, the old primary is
/// demoted, and only then the other is promoted. Before the demotion every failure leaves the primary as it was; after it
/// there is none until the next turn, and never two.
pub async fn handover(
    from: &Side<'_>,
    to: &Side<'_>,
    brief: &Brief,
    consents: u64,
    timeout_ms: u32,
) -> Outcome {
    let until = Instant::now() + Duration::from_millis(timeout_ms.into());
    match prepared(from, to, timeout_ms, until).await {
        Ok(paused) => swap(from, to, brief, &paused, consents).await,
        Err(outcome) => outcome,
    }
}

/// Two nodes of a Valkey Cluster hand over between themselves: the one pauses and waits for the other, which is then elected. Until
/// that has happened the primary is as it was, and what it paused goes on by itself.
pub async fn swap_nodes(from: &Side<'_>, to: &Side<'_>, node: &NodeId, brief: &Brief, consents: u64) -> Told {
    let (old, new) = checked(from, to).await?;
    let is_pair = old.node.is_some_and(|old| old.id == *node)
        && new.node.as_ref().is_some_and(|new| new.primary.as_ref() == Some(node));
    if !is_pair {
        return Err(Outcome::Superseded("the other's node does not replicate its node".to_owned()));
    }
    let at = Paused { replid: new.info.replid, offset: new.info.offset };
    // What is wrong with that, the promotion says itself.
    let _told = to.agent.tell(brief).await;
    to.agent.promote_by(proto::Promotion::Handover, to.server, brief, &at, consents).await?;
    // Not before: it would stop the writes that go on until its node makes way. If it does not hear this, a later turn tells it.
    let _told = from.agent.tell(brief).await;
    Ok(())
}

/// A primary that answers, and its linked replica.
async fn checked(from: &Side<'_>, to: &Side<'_>) -> Result<(Look, Look), Outcome> {
    let (old, new) = tokio::join!(from.look(), to.look());
    let (old, new) = (old?, new?);
    if old.role != RawRole::Primary {
        return Err(Outcome::Superseded("it is not a primary any more".to_owned()));
    }
    let target = from.link.target();
    let source = RawSource { host: target.address.to_string(), port: target.port };
    if new.role != (RawRole::Replica { source, link: Link::Up }) {
        return Err(Outcome::Superseded("the other is not a linked replica of it".to_owned()));
    }
    Ok((old, new))
}

/// Checks the pair, pauses writes and waits until the replica has them all.
async fn prepared(
    from: &Side<'_>,
    to: &Side<'_>,
    timeout_ms: u32,
    until: Instant,
) -> Result<Paused, Outcome> {
    checked(from, to).await?;
    let paused = from.agent.pause(from.server, timeout_ms.saturating_add(PAUSE_MARGIN_MS)).await;
    let paused = match paused {
        Ok(paused) => paused,
        Err(error) => return Err(given_up(from, error.into()).await),
    };
    while Instant::now() < until {
        match to.look().await {
            Ok(look) if look.replid == paused.replid && look.offset >= paused.offset => return Ok(paused),
            Ok(_) => tokio::time::sleep(CATCH_UP_PAUSE).await,
            Err(lost) => return Err(given_up(from, Outcome::Failed(lost.to_string())).await),
        }
    }
    let late = Outcome::Failed("the replica did not catch up; the primary goes on".to_owned());
    Err(given_up(from, late).await)
}

async fn swap(from: &Side<'_>, to: &Side<'_>, brief: &Brief, paused: &Paused, consents: u64) -> Outcome {
    let target = to.link.target();
    let endpoint = Endpoint { host: target.address.to_string(), port: target.port, node: None };
    // The successor's agent writes the grant down while the old primary is demoted: the promotion finds it there. What is
    // wrong with that, it says itself.
    let (_told, demoted) =
        tokio::join!(to.agent.tell(brief), from.agent.attach(from.server, brief, &endpoint));
    if let Err(error) = demoted {
        let words = format!("the old primary was not demoted: {error}");
        return given_up(from, Outcome::Failed(words)).await;
    }
    match to.agent.promote(to.server, brief, paused, consents).await {
        Ok(()) => Outcome::Verified,
        Err(
            CallError::Deposed { words, .. }
            | CallError::Refused(words)
            | CallError::Declined(words)
            | CallError::Failed(words),
        ) => Outcome::Failed(format!("the old primary is demoted, and the other was not promoted: {words}")),
    }
}

/// Lets writes go on. If that fails, the pause ends by itself.
async fn given_up(from: &Side<'_>, outcome: Outcome) -> Outcome {
    if let Err(error) = from.agent.resume(from.server).await {
        tracing::warn!(member = %from.server.member, %error, "writes stay paused until the pause ends by itself");
    }
    outcome
}

//! The server at the gate while the operator is away: asks every peer, has the core judge, and does what it says. And a
//! replica whose primary came back at another address: it follows it there.

use crate::{
    election, local,
    peers::Place,
    shared::{Agent, Known},
};
use futures::future::join_all;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::Instant;
use valkeeper_agent::proto::Promotion;
use valkeeper_core::{
    agent::{
        Answer, Data, Ledger, PeerAnswer, Verdict,
        gate::{judge, live_holder},
    },
    decision::HoldReason,
    ids::{MemberId, Seq},
    info::{Info, RawRole, RawSource},
    nodes::Nodes,
    observation::{Gate, Link},
    spec::Topology,
};

/// Between two judgements: as often as peers are asked to confirm.
const JUDGE_PERIOD: Duration = Duration::from_millis(500);

/// Judges for ever.
pub async fn run(agent: &Arc<Agent>) {
    loop {
        if agent.read(|known| (waiting(known).is_some() || lost(known)) && known.operator_in_doubt()) {
            agent.news_now.notify_one();
        }
        if let Some(data) = agent.read(waiting) {
            judge_once(agent, data).await;
        } else if agent.read(|known| lost(known) && known.operator_away()) {
            find_holder(agent).await;
        } else if agent.read(election::asks) {
            let ledger = agent.read(|known| known.ledger.clone());
            let (answers, places) = ask(agent, &ledger).await;
            agent.update(|known| election::note_primary(known, &answers, &places));
        }
        let _ = tokio::time::timeout(JUDGE_PERIOD, agent.judge_now.notified()).await;
    }
}

/// The data of a server that holds at the gate and has loaded, unless it is about to end.
fn waiting(known: &Known) -> Option<Data> {
    if known.is_at_gate() && !known.leaving { known.data() } else { None }
}

/// True of a replica whose link is down.
fn lost(known: &Known) -> bool {
    let down = |info: &Info| matches!(info.role, RawRole::Replica { source: _, link: Link::Down });
    !known.leaving && !known.is_at_gate() && known.info.as_ref().is_some_and(|i| !i.loading && down(i))
}

/// What the peers say now, and where they say it. Only answers of this round: what one said before may not be so any more.
pub async fn ask(
    agent: &Arc<Agent>,
    ledger: &Ledger,
) -> (BTreeMap<MemberId, PeerAnswer>, BTreeMap<MemberId, Place>) {
    let (mut answers, mut places) = (BTreeMap::new(), BTreeMap::new());
    let asked = ledger.peers(agent.me()).map(|id| async move { (id, agent.peers.ask(id).await) });
    for (id, answer) in join_all(asked).await {
        match answer {
            Ok((answer, place)) => {
                answers.insert(id, answer);
                places.insert(id, place);
            }
            Err(error) => tracing::debug!(peer = %id, error = %error, "a peer has not answered"),
        }
    }
    (answers, places)
}

async fn find_holder(agent: &Arc<Agent>) {
    let (ledger, run_id) = agent.read(|known| (known.ledger.clone(), known.run_id.clone()));
    let (answers, places) = ask(agent, &ledger).await;
    agent.update(|known| election::note_primary(known, &answers, &places));
    let holder = live_holder(&ledger, &answers);
    let found = holder.and_then(|to| Some((to, answers.get(&to)?.grant, places.get(&to)?)));
    if let Some((to, grant, place)) = found {
        attach(agent, &run_id, (to, Some(grant)), place, lost).await;
    }
}

async fn judge_once(agent: &Arc<Agent>, data: Data) {
    let (ledger, away, run_id) =
        agent.read(|known| (known.ledger.clone(), known.operator_away(), known.run_id.clone()));
    let me = agent.me();
    let (answers, places) = if away { ask(agent, &ledger).await } else { Default::default() };
    let holds = |known: &Known| waiting(known).is_some();
    match judge(me, &ledger, &data, away, &answers) {
        Verdict::Hold(reason, about) => {
            hold(agent, reason, about);
            if let Some((to, place)) = agent.read(|known| election::elected(known, &answers, &places)) {
                attach(agent, &run_id, (to, None), &place, holds).await;
            } else if agent.read(|known| election::is_blocked(known, reason, &answers)) {
                yield_to_others(agent, &run_id).await;
            }
        }
        Verdict::Attach(to) => {
            let grant = answers.get(&to).map(|answer| answer.grant);
            if let Some(place) = places.get(&to) {
                attach(agent, &run_id, (to, grant), place, holds).await;
            }
        }
        Verdict::Resume => resume(agent, &run_id, ledger.brief.grant).await,
    }
}

fn hold(agent: &Arc<Agent>, reason: HoldReason, about: Option<MemberId>) {
    let gate = Gate::Holding(reason);
    let before = agent.update(|known| {
        // Whoever has moved it since knows better.
        if waiting(known).is_some() { std::mem::replace(&mut known.gate, gate) } else { gate }
    });
    if before != gate {
        let about = about.map(|id| id.to_string());
        tracing::info!(reason = reason.code(), about, "the server holds at the gate");
    }
}

/// True if everything is as it was judged. To be asked while holding `acting`.
fn still(agent: &Arc<Agent>, run_id: &str, holds: impl Fn(&Known) -> bool) -> bool {
    agent.read(|known| holds(known) && known.operator_away() && known.run_id == run_id)
}

/// True if the server follows whoever is at that place already.
fn follows(known: &Known, source: &RawSource, place: &Place) -> bool {
    match &known.nodes {
        Some(Nodes { myself, others: _ }) => {
            !known.is_at_gate() && myself.primary.is_some() && myself.primary == place.node
        }
        None => known.info.as_ref().is_some_and(
            |info| matches!(&info.role, RawRole::Replica { source: of, link: _ } if of == source),
        ),
    }
}

/// Follows a member: the holder of that grant, or one that gossip has elected without.
async fn attach(
    agent: &Arc<Agent>,
    run_id: &str,
    (to, grant): (MemberId, Option<Seq>),
    place: &Place,
    holds: impl Fn(&Known) -> bool,
) {
    let _acting = agent.acting.lock().await;
    let source = RawSource { host: place.ip.to_string(), port: agent.config.args.server_port };
    if !still(agent, run_id, holds) || agent.read(|known| follows(known, &source, place)) {
        return;
    }
    let learned = agent.write(|ledger| {
        if let Some(grant) = grant {
            ledger.support(to, grant)?;
        }
        ledger.left = None;
        Ok(())
    });
    if let Err(error) = learned.await {
        tracing::warn!(error = %error, to = %to, "the holder is not followed");
        return;
    }
    let attached = match (agent.config.topology, &place.node) {
        (Topology::Replication, _) => {
            let was_primary = agent.read(Known::is_primary);
            agent.follow(run_id, was_primary, &source).await
        }
        (Topology::Cluster, Some(node)) => agent.local.replicate(run_id, node).await,
        (Topology::Cluster, None) => Err(local::Error::Unverified("nobody knows its node")),
    };
    match attached {
        Ok(look) => {
            agent.seen(look);
            agent.update(|known| known.gate = Gate::Attached(to));
            agent.settle_port().await;
            tracing::info!(to = %to, "the operator is away: the server follows whoever serves");
        }
        Err(error) => tracing::warn!(error = %error, to = %to, "the server does not follow the holder"),
    }
}

/// Ends the server, which has taken no write since its start: what it holds is on its disk.
async fn yield_to_others(agent: &Arc<Agent>, run_id: &str) {
    let _acting = agent.acting.lock().await;
    if !still(agent, run_id, |known| waiting(known).is_some()) {
        return;
    }
    let process = agent.update(|known| {
        known.yielded = known.process.is_some();
        known.process
    });
    if let Some(process) = process {
        tracing::warn!("as long as it is on the bus nobody is elected in its place: the server is ended");
        process.kill();
    }
}

async fn resume(agent: &Arc<Agent>, run_id: &str, grant: Seq) {
    let asked_at = Instant::now();
    let me = agent.me();
    let peers: Vec<MemberId> = agent.read(|known| known.ledger.peers(me).collect());
    let asked = peers.iter().map(|id| async move { (*id, agent.peers.consent(*id, grant).await) });
    for (id, answer) in join_all(asked).await {
        match answer {
            Ok(Answer::Confirmed) => {}
            Ok(answer @ (Answer::Refused | Answer::Deposed { .. })) => {
                tracing::info!(peer = %id, answer = ?answer, "a peer refuses its consent");
                return hold(agent, HoldReason::ConsentRefused, Some(id));
            }
            Err(error) => {
                tracing::info!(peer = %id, error = %error, "a peer has not consented");
                return hold(agent, HoldReason::PeerUnanswered, Some(id));
            }
        }
    }
    let _acting = agent.acting.lock().await;
    if !still(agent, run_id, |known| waiting(known).is_some())
        || agent.read(|known| known.ledger.brief.grant) != grant
    {
        return;
    }
    let left = agent.read(|known| known.ledger.left.clone());
    if let Err(error) = agent.remember_left(None).await {
        tracing::warn!(error = %error, "the server does not resume");
        return;
    }
    // Writing took its time; whoever came back meanwhile decides.
    if !still(agent, run_id, |known| waiting(known).is_some())
        || agent.read(|known| known.ledger.brief.grant) != grant
    {
        if let Err(error) = agent.remember_left(left).await {
            tracing::warn!(error = %error, "how far the data is cannot be remembered");
        }
        return;
    }
    let by = agent.read(|known| match &known.nodes {
        None => Promotion::Unspecified,
        Some(nodes) if nodes.myself.primary.is_none() => Promotion::Open,
        Some(_) => Promotion::Force,
    });
    match agent.promote(asked_at, run_id, by).await {
        Ok(()) => {
            agent.update(|known| known.gate = Gate::Resumed);
            tracing::info!(
                grant = grant.0,
                "the operator is away and everyone consents: the server resumes as primary"
            );
        }
        Err(error) => tracing::warn!(error = %error, "the server does not resume"),
    }
}

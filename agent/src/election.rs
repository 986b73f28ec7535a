//! Cluster mode with the operator away: gossip elects a replica in place of a primary that is gone, but never while that is on the bus,
//! and at the gate it is. One that holds for want of data makes place, and then follows whoever was elected.

use crate::{
    gate,
    peers::Place,
    shared::{Agent, Known},
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::Instant;
use valkeeper_core::{
    agent::{Data, PeerAnswer, PeerServer},
    decision::HoldReason,
    ids::MemberId,
    info::RawRole,
    nodes::{Life, Node, Nodes},
    observation::Link,
};

/// How long no server is started: an election takes up to 4 s with a node timeout of 2 s, and one that failed is repeated after 8 s.
/// Shorter than the 30 s after which a member without a server is taken for dead.
const ABSENCE_MAX: Duration = Duration::from_secs(25);
/// Between two looks for who was elected.
const LOOK_PAUSE: Duration = Duration::from_millis(500);

/// How long a replica's link may be down, and the operator away, while its primary's node is on the bus and
/// nobody says what its server does: a killed one is back there at the gate within a moment, and leaves some
/// 5 s after its agent counts the operator as away, to be held for dead 2 s later. One that lives on has
/// writes that the replica lacks.
const DETACHED_AFTER: Duration = Duration::from_secs(10);
/// How long the link may be down while the primary's own agent says that it serves: what is written meanwhile
/// is lacked. A link that broke for a moment is back by then.
const LACKS_AFTER: Duration = Duration::from_secs(2);
/// What its agent said before that says nothing of now: four rounds of questions.
const TOLD_AGE_MAX: Duration = Duration::from_secs(2);
/// Without a byte for this long a link leads nowhere: a primary pings its replicas every second. Milliseconds.
const SILENT_LINK_MS: i64 = 3_000;

/// Whether a node stands for election when its primary is held for dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Stands,
    Refrains,
}

/// What is known of a replica's link to its primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Allegiance {
    /// It has not been there yet.
    #[default]
    None,
    /// It is there.
    Linked,
    /// It was there until then.
    Lost(Instant),
    /// It is down, and the primary lives: this replica has not what was written since.
    Detached,
}

/// What the agent of its primary says of that, while the link is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// Its server is primary, and no gate keeps clients from it.
    pub serves: bool,
    /// When it said so.
    pub at: Instant,
}

/// True of a replica whose link was there and is lost: what its primary does is to be asked, whether the
/// operator is there or not. One that counts as there may be unable to act, and say nothing of it when it
/// goes.
pub fn asks(known: &Known) -> bool {
    matches!(known.allegiance, Allegiance::Lost(_))
}

/// Notes what the agent of its primary's node has said, if it has.
pub fn note_primary(
    known: &mut Known,
    answers: &BTreeMap<MemberId, PeerAnswer>,
    places: &BTreeMap<MemberId, Place>,
) {
    let of = known.nodes.as_ref().and_then(|nodes| nodes.myself.primary.clone());
    let is_its = |place: &Place| of.is_some() && place.node == of;
    let its = places.iter().find(|(_, place)| is_its(place)).and_then(|(id, _)| answers.get(id));
    if let Some(answer) = its {
        known.told = Some(Told { serves: answer.server == PeerServer::Primary, at: Instant::now() });
    }
}

/// True if the primary of this replica has written on without it: its agent says that it serves, or nobody
/// says anything, and neither the operator nor gossip has taken it for dead in all that time.
fn is_left_behind(known: &Known, since: Instant) -> bool {
    match known.told.filter(|told| told.at >= since && told.at.elapsed() < TOLD_AGE_MAX) {
        Some(Told { serves: true, at: _ }) => since.elapsed() >= LACKS_AFTER,
        // It is at its gate, or starts: as long as it does, nothing is written.
        Some(Told { serves: false, at: _ }) => false,
        None => {
            let away = known.operator_away_for().unwrap_or_default();
            since.elapsed().min(away) >= DETACHED_AFTER
        }
    }
}

/// Only with the operator away, which decides faster and knows more, and only a replica that had everything when its primary was lost. After
/// a restart of many, nodes are held for dead for seconds that are not.
pub fn standing(known: &mut Known) -> Standing {
    let (Some(info), Some(nodes)) = (&known.info, &known.nodes) else { return Standing::Refrains };
    let primary = nodes.myself.primary.as_ref().and_then(|id| nodes.get(id));
    let linked = |role: &RawRole| matches!(role, RawRole::Replica { source: _, link: Link::Up });
    let heard = info.last_io_ms.is_some_and(|ms| ms < SILENT_LINK_MS);
    known.allegiance = match (known.allegiance, primary) {
        (_, None) => Allegiance::None,
        (_, Some(_)) if linked(&info.role) && heard => Allegiance::Linked,
        (Allegiance::Linked, Some(_)) => Allegiance::Lost(Instant::now()),
        (Allegiance::Lost(since), Some(primary))
            if primary.life == Life::Alive && is_left_behind(known, since) =>
        {
            Allegiance::Detached
        }
        (before @ (Allegiance::None | Allegiance::Lost(_) | Allegiance::Detached), Some(_)) => before,
    };
    match known.allegiance {
        Allegiance::Lost(_) if known.operator_away() => Standing::Stands,
        Allegiance::None | Allegiance::Linked | Allegiance::Lost(_) | Allegiance::Detached => {
            Standing::Refrains
        }
    }
}

/// The peer that serves and that this member's node replicates by gossip, and where it is: a majority of the primaries has elected it.
pub fn elected(
    known: &Known,
    answers: &BTreeMap<MemberId, PeerAnswer>,
    places: &BTreeMap<MemberId, Place>,
) -> Option<(MemberId, Place)> {
    let of = known.nodes.as_ref()?.myself.primary.as_ref()?;
    let serves = |id: &MemberId| answers.get(id).is_some_and(|answer| answer.server == PeerServer::Primary);
    let mut found = places.iter().filter(|(id, place)| serves(id) && place.node.as_ref() == Some(of));
    found.next().map(|(id, place)| (*id, place.clone()))
}

/// True if the others would elect a replica that has data, if only this member's node were gone.
pub fn is_blocked(known: &Known, reason: HoldReason, answers: &BTreeMap<MemberId, PeerAnswer>) -> bool {
    let lacks_data =
        [HoldReason::BlankData, HoldReason::PeerAhead, HoldReason::ReplicaKeptRunning].contains(&reason);
    let has_data = |answer: &PeerAnswer| match &answer.server {
        PeerServer::Running(data) => *data != Data::Blank,
        PeerServer::Primary | PeerServer::AtGate(_) | PeerServer::Starting => false,
    };
    lacks_data
        && answers.values().all(|answer| answer.server != PeerServer::Primary)
        && answers.values().any(has_data)
        && known.nodes.as_ref().is_some_and(can_elect_without)
}

/// True if this node is a primary with slots, and those that vote are a majority without it.
fn can_elect_without(nodes: &Nodes) -> bool {
    let Nodes { myself, others } = nodes;
    let votes = |node: &&Node| node.primary.is_none() && !node.slots.is_empty();
    let voters = others.iter().filter(votes);
    let alive = voters.clone().filter(|node| node.life == Life::Alive).count();
    let all = voters.count() + 1;
    votes(&myself) && alive > all / 2
}

/// Waits, after a server was ended for that, until another is primary; not while the operator is there, who decides.
pub async fn make_place(agent: &Arc<Agent>) {
    if !agent.update(|known| std::mem::take(&mut known.yielded)) {
        return;
    }
    let begun = Instant::now();
    while begun.elapsed() < ABSENCE_MAX && agent.read(Known::operator_away) {
        let ledger = agent.read(|known| known.ledger.clone());
        let (answers, _) = gate::ask(agent, &ledger).await;
        if let Some((id, _)) = answers.iter().find(|(_, answer)| answer.server == PeerServer::Primary) {
            tracing::info!(primary = %id, "another was elected");
            return;
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
    tracing::info!("nobody was elected, or the operator is back");
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_core::{
        agent::Ledger,
        ids::ReplId,
        info::{Info, RawSource},
    };

    fn nodes(mine: &str, others: &[(&str, &str)]) -> Nodes {
        let line = |n: usize, flags: &str, slots: &str| {
            format!("{n:040x} 127.0.0.{n}:6379@16379 {flags} - 0 0 {n} connected {slots}\n")
        };
        let mut text = line(1, "myself,master", mine);
        for (at, (flags, slots)) in others.iter().enumerate() {
            text.push_str(&line(at + 2, flags, slots));
        }
        text.parse().unwrap()
    }

    /// A replica's view of a primary with these flags.
    fn replica_of(flags: &str) -> Nodes {
        let id = |n: usize| format!("{n:040x}");
        let (mine, its) = (id(1), id(2));
        format!(
            "{mine} 127.0.0.1:6379@16379 myself,slave {its} 0 0 2 connected\n\
             {its} 127.0.0.2:6379@16379 {flags} - 0 0 2 connected 0-16383\n"
        )
        .parse()
        .unwrap()
    }

    fn info(link: Link, last_io_ms: Option<i64>) -> Info {
        let source = RawSource { host: "127.0.0.2".to_owned(), port: 6379 };
        let id = || ReplId("a".repeat(40));
        Info {
            run_id: "b".repeat(40),
            version: "9.1.2".to_owned(),
            port: 6379,
            gate: None,
            role: RawRole::Replica { source, link },
            loading: false,
            replid: id(),
            replid2: None,
            replid2_offset: None,
            offset: 1,
            last_io_ms,
            replicas_online: 0,
            keys: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_replica_stands_only_without_the_operator_and_only_if_it_had_everything() {
        let mut known = Known::new(Ledger::default());
        let sees = |known: &mut Known, link, last_io_ms, flags: &str| {
            (known.info, known.nodes) = (Some(info(link, last_io_ms)), Some(replica_of(flags)));
            standing(known)
        };
        // Held for dead by gossip, but never linked since its start: it may lack anything.
        assert_eq!(sees(&mut known, Link::Down, None, "master,fail"), Standing::Refrains);
        assert_eq!(sees(&mut known, Link::Up, Some(0), "master"), Standing::Refrains);
        assert_eq!(
            sees(&mut known, Link::Down, None, "master,fail"),
            Standing::Refrains,
            "the operator is there"
        );
        tokio::time::advance(Duration::from_secs(4)).await;
        assert!(known.operator_away());
        assert_eq!(sees(&mut known, Link::Down, None, "master,fail"), Standing::Stands);
        // Held for dead although it feeds this replica.
        assert_eq!(sees(&mut known, Link::Up, Some(0), "master,fail"), Standing::Refrains);
        // A link that nothing comes through is none.
        assert_eq!(sees(&mut known, Link::Up, Some(SILENT_LINK_MS), "master,fail?"), Standing::Stands);
        // The primary lives on, and this one has lost it.
        tokio::time::advance(DETACHED_AFTER).await;
        assert_eq!(sees(&mut known, Link::Down, None, "master"), Standing::Refrains);
        assert_eq!(
            sees(&mut known, Link::Down, None, "master,fail"),
            Standing::Refrains,
            "it lacks what came since"
        );
    }

    fn sees(known: &mut Known, link: Link, flags: &str) -> Standing {
        let last_io_ms = (link == Link::Up).then_some(0);
        (known.info, known.nodes) = (Some(info(link, last_io_ms)), Some(replica_of(flags)));
        standing(known)
    }

    /// The agent of its primary says this now.
    fn hears(known: &mut Known, server: PeerServer) {
        let (id, grant) = (MemberId::new(0, 0), valkeeper_core::ids::Seq(5));
        let answer = PeerAnswer { grant, holder: Some(id), server };
        let node = replica_of("master").others.first().map(|other| other.id.clone());
        let place = Place { ip: std::net::IpAddr::from([127, 0, 0, 2]), node };
        note_primary(known, &[(id, answer)].into(), &[(id, place)].into());
    }

    /// A replica that has lost its link while the operator counts as there, and `seconds` later does not any
    /// more.
    async fn lost_before_the_operator(seconds: u64, mut each: impl FnMut(&mut Known)) -> Known {
        let mut known = Known::new(Ledger::default());
        assert_eq!(sees(&mut known, Link::Up, "master"), Standing::Refrains);
        for _ in 0..seconds {
            known.operator_heard = Instant::now();
            assert_eq!(sees(&mut known, Link::Down, "master"), Standing::Refrains);
            each(&mut known);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        tokio::time::advance(Duration::from_secs(3)).await;
        assert!(known.operator_away());
        known
    }

    #[tokio::test(start_paused = true)]
    async fn how_long_a_link_was_lost_counts_from_when_nobody_decides_any_more() {
        let mut known = lost_before_the_operator(20, |_| {}).await;
        assert_eq!(sees(&mut known, Link::Down, "master"), Standing::Stands, "back at its gate, so far");
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!(sees(&mut known, Link::Down, "master"), Standing::Stands);
        assert_eq!(sees(&mut known, Link::Down, "master,fail"), Standing::Stands);
        tokio::time::advance(DETACHED_AFTER).await;
        assert_eq!(sees(&mut known, Link::Down, "master"), Standing::Refrains, "nobody says what it does");
    }

    #[tokio::test(start_paused = true)]
    async fn a_primary_that_says_it_is_at_its_gate_is_waited_for_as_long_as_it_says_so() {
        let at_gate = || PeerServer::AtGate(Data::Blank);
        let mut known = lost_before_the_operator(20, |known| hears(known, at_gate())).await;
        for _ in 0..40 {
            hears(&mut known, at_gate());
            assert_eq!(sees(&mut known, Link::Down, "master"), Standing::Stands);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_primary_that_says_it_serves_has_what_its_replica_lacks_whoever_is_away() {
        let mut known = lost_before_the_operator(4, |known| hears(known, PeerServer::Primary)).await;
        assert_eq!(sees(&mut known, Link::Down, "master,fail"), Standing::Refrains, "it wrote on");
        // A moment, in which it serves: the link is back.
        let mut known = lost_before_the_operator(1, |known| hears(known, PeerServer::Primary)).await;
        assert_eq!(sees(&mut known, Link::Down, "master,fail"), Standing::Stands);
        // Held for dead meanwhile: what its agent says of it is old.
        let mut known = lost_before_the_operator(4, |_| {}).await;
        hears(&mut known, PeerServer::Primary);
        assert_eq!(sees(&mut known, Link::Down, "master,fail?"), Standing::Stands);
    }

    #[test]
    fn the_others_elect_if_those_that_vote_are_a_majority_without_this_one() {
        let alive = |slots| ("master", slots);
        for (mine, others, can) in [
            ("0-99", &[alive("100"), alive("101")][..], true),
            ("0-99", &[alive("100")], false),
            ("0-99", &[], false),
            ("0-99", &[alive("100"), ("master,fail", "101")], false),
            ("0-99", &[alive("100"), alive("")], false),
            ("0-99", &[alive("100"), alive("101"), ("master,fail", "102")], false),
            ("0-99", &[alive("100"), alive("101"), alive("102"), ("master,fail", "103")], true),
            ("", &[alive("100"), alive("101")], false),
        ] {
            assert_eq!(can_elect_without(&nodes(mine, others)), can, "{mine:?} {others:?}");
        }
    }
}

//! Agents' news, as they bring them to the operator's endpoint.

use crate::{
    agent::{Member, OWNER, Operator, Pki, at, brief},
    server::{eventually, signal, woken},
};
use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::{net::TcpListener, task::JoinSet};
use valkeeper::agents::{Registry, Seat, news};
use valkeeper_core::{agent::Brief, ids::MemberId, ids::Seq};

/// An operator that takes news.
struct Newsroom {
    operator: Operator,
    leads: Arc<AtomicBool>,
    _seat: Seat,
    _server: JoinSet<()>,
}

impl Newsroom {
    async fn open(pki: &Pki) -> Newsroom {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let operator = Operator::with_news(pki, 1, listener.local_addr().unwrap().to_string());
        let registry = Arc::new(Registry::default());
        let owner = (OWNER.0.to_owned(), OWNER.1.to_owned());
        let seat = registry.open(&owner, operator.board().clone());
        let (leads, live) = (Arc::new(AtomicBool::new(true)), pki.operator());
        let asked = leads.clone();
        let desk = news::Desk { registry, leads: Arc::new(move || asked.load(Ordering::SeqCst)) };
        let mut server = JoinSet::new();
        server.spawn(async move {
            news::serve(listener, Arc::new(move || Some(live.clone())), desk).await.unwrap()
        });
        Newsroom { operator, leads, _seat: seat, _server: server }
    }
}

#[tokio::test]
async fn the_end_of_a_server_is_told_at_once_and_unasked() {
    let pki = Pki::new();
    let room = Newsroom::open(&pki).await;
    let member = Member::start(&pki, 0).await;
    let _link = room.operator.reach(&member).await;
    let (_server, look) = member.linked().await;
    eventually("the server's name in the agent's words", || async {
        room.operator.facts(&member).filter(|facts| facts.run_id == look.run_id)
    })
    .await;
    let killed = std::time::Instant::now();
    signal(member.server_pid().await, "KILL");
    woken(&room.operator.urgent).await;
    println!("SIGKILL to the agent's word: {:?}", killed.elapsed());
    assert!(room.operator.board().has_exited(member.id, &look.run_id));
}

#[tokio::test]
async fn a_lone_holder_goes_on_while_it_is_confirmed_and_stops_when_it_is_not() {
    let pki = Pki::new();
    let room = Newsroom::open(&pki).await;
    let member = Member::start(&pki, 0).await;
    let agent = room.operator.reach(&member).await;
    let (_link, look) = member.linked().await;
    // Two of the three are nowhere: there is no majority to confirm it.
    let roster = (0..3).map(|ordinal| MemberId::new(0, ordinal)).collect();
    let terms = Brief { roster, isolation_ms: 2_000, ..brief(5, &member) };
    room.operator.board().publish([(member.id, Seq(5))].into_iter());
    agent.promote(&member.process(&look), &terms, &at(&look), 0).await.unwrap();
    let begun = std::time::Instant::now();
    while begun.elapsed() < std::time::Duration::from_secs(4) {
        let written = member.run::<String>("SET key value").await;
        assert_eq!(written.as_deref(), Ok("OK"), "after {:?}: {}", begun.elapsed(), member.log());
        tokio::task::yield_now().await;
    }
    room.operator.board().publish(std::iter::empty());
    eventually("writes that are refused", || async { member.run::<String>("SET key value").await.err() })
        .await;
    eventually("its word that they are", || async {
        room.operator.facts(&member).filter(|facts| facts.writes_stopped)
    })
    .await;
    room.operator.board().publish([(member.id, Seq(5))].into_iter());
    eventually("writes again", || async { member.run::<String>("SET key value").await.ok() }).await;
    room.leads.store(false, Ordering::SeqCst);
    eventually("writes that are refused", || async { member.run::<String>("SET key value").await.err() })
        .await;
}

//! What a look at a node of a Valkey Cluster brings back.

use crate::server::{OPERATOR_PASSWORD, Server, eventually, free_port, link_by, link_to, present, target_at};
use async_trait::async_trait;
use std::{collections::BTreeMap, net::Ipv4Addr, path::Path, sync::Arc};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixStream},
};
use valkeeper::valkey::{Error, Look, MemberLink, Opened, Target, Way};
use valkeeper_core::{
    config::{GATE_SOCKET_BLANK, GATE_SOCKET_HISTORY},
    ids::Timestamp,
    info::RawRole,
    observation::{Export, ExportState, Link, NodeFacts, Observed, ServerRole, Source, Why},
    spec::Topology,
};

/// Further lines of a node's configuration.
fn conf(bus_port: u16) -> String {
    format!("cluster-enabled yes\ncluster-require-full-coverage no\ncluster-port {bus_port}")
}

/// A server that is a node, and whom the operator may ask what nodes are asked.
pub async fn node(bus_port: u16) -> Server {
    let server = Server::start(&conf(bus_port)).await;
    may_ask(&server).await;
    server
}

async fn may_ask(server: &Server) {
    server.run::<String>("ACL SETUSER valkeeper +cluster|nodes").await.unwrap();
}

pub fn link(server: &Server) -> MemberLink {
    link_to(as_node(server.target()), OPERATOR_PASSWORD).0
}

pub fn as_node(target: Target) -> Target {
    Target { topology: Topology::Cluster, ..target }
}

async fn says(link: &MemberLink) -> NodeFacts {
    present(link).await.node.unwrap()
}

#[tokio::test]
async fn a_node_says_in_one_look_who_it_is_what_it_owns_and_whom_it_knows() {
    let bus_port = free_port();
    let (one, other) = (node(free_port()).await, node(bus_port).await);
    let (link, to_other) = (link(&one), link(&other));
    let alone = says(&link).await;
    assert_eq!(alone.id.to_string(), one.run::<String>("CLUSTER MYID").await.unwrap());
    assert_eq!((alone.primary, alone.covered, alone.knows), (None, 0, BTreeMap::new()));
    one.run::<String>("CLUSTER ADDSLOTSRANGE 0 5460 6000 6000").await.unwrap();
    one.run::<String>(&format!("CLUSTER MEET 127.0.0.1 {} {bus_port}", other.port)).await.unwrap();
    let of_other = says(&to_other).await.id;
    let (met, is_met) = eventually("two nodes that know each other", || async {
        let (met, is_met) = (says(&link).await, says(&to_other).await);
        (met.knows.len() == 1 && is_met.covered > 0).then_some((met, is_met))
    })
    .await;
    assert_eq!(met.knows, BTreeMap::from([(of_other.clone(), Some("127.0.0.1".to_owned()))]));
    assert_eq!((met.slots.to_string().as_str(), met.covered), ("0-5460 6000", 5_462));
    assert_eq!((is_met.slots.len(), is_met.covered), (0, 5_462));
    other.run::<String>(&format!("CLUSTER REPLICATE {}", met.id)).await.unwrap();
    let replica = eventually("a replica", || async { says(&to_other).await.primary }).await;
    assert_eq!(replica, met.id);
}

#[tokio::test]
async fn a_node_says_what_it_hands_over_and_with_valkeys_words_why_that_came_to_nothing() {
    let bus_port = free_port();
    let (one, other) = (node(free_port()).await, node(bus_port).await);
    one.run::<String>("CLUSTER ADDSLOTSRANGE 0 99").await.unwrap();
    other.run::<String>("CLUSTER ADDSLOTSRANGE 100 16383").await.unwrap();
    one.run::<String>(&format!("CLUSTER MEET 127.0.0.1 {} {bus_port}", other.port)).await.unwrap();
    let (link, to_other) = (link(&one), link(&other));
    assert!(says(&link).await.exports_unread, "who may not ask for jobs says that he does not know of any");
    one.run::<String>("ACL SETUSER valkeeper +cluster|getslotmigrations").await.unwrap();
    assert!(!says(&link).await.exports_unread);
    let target = says(&to_other).await.id;
    // Its slot is 0.
    eventually("a key", || async { one.run::<String>("SET 06S value").await.ok() }).await;
    assert_eq!((present(&link).await.keys, present(&to_other).await.keys), (Some(1), Some(0)));
    let words = format!("CLUSTER MIGRATESLOTS SLOTSRANGE 5 6 9 9 NODE {target}");
    let hand_over = || one.run::<String>(&words);
    eventually("a job that is accepted", || async { hand_over().await.ok() }).await;
    let failed = eventually("a job that failed", || async {
        let exports = says(&link).await.exports;
        let [Export { slots, to, state: ExportState::Failed(words) }] = exports.as_slice() else {
            return None;
        };
        Some((slots.to_string(), to.clone(), words.clone()))
    })
    .await;
    // The user of replication may not give slots to another.
    assert_eq!((failed.0.as_str(), &failed.1), ("5-6 9", &target));
    assert!(failed.2.contains("NOPERM"), "{}", failed.2);
    other.run::<String>("ACL SETUSER replication +cluster|syncslots").await.unwrap();
    other.signal("STOP");
    let accepted = hand_over().await;
    let exports = says(&link).await.exports;
    other.signal("CONT");
    accepted.unwrap();
    assert_eq!(
        exports,
        [Export { slots: "5-6 9".parse().unwrap(), to: target, state: ExportState::Running }]
    );
    let done = eventually("slots that were handed over", || async {
        let said = says(&link).await;
        (said.slots.len() == 97).then_some(said)
    })
    .await;
    assert_eq!((done.exports, done.slots.contains(5)), (Vec::new(), false));
}

#[tokio::test]
async fn a_node_says_whether_it_refuses_clients_to_whoever_may_ask() {
    let server = node(free_port()).await;
    let link = link(&server);
    assert!(server.run::<String>("CLUSTER INFO").await.unwrap().contains("cluster_state:fail"));
    assert!(!says(&link).await.down, "who may not ask knows of nothing");
    server.run::<String>("ACL SETUSER valkeeper +cluster|info").await.unwrap();
    assert!(says(&link).await.down, "nobody owns a slot");
    server.run::<String>("CLUSTER ADDSLOTSRANGE 0 16383").await.unwrap();
    eventually("a node that serves", || async { server.run::<String>("SET key value").await.ok() }).await;
    assert!(!says(&link).await.down);
}

/// The way to a server without a port.
struct Socket(&'static Path);

#[async_trait]
impl Way for Socket {
    async fn open(&self, _: Target) -> Result<Opened, Error> {
        let stream = Box::new(UnixStream::connect(self.0).await.unwrap());
        Ok(Opened { stream, logged_in: false })
    }
}

#[tokio::test]
async fn a_port_that_was_never_open_is_a_closed_gate_whatever_the_node_is() {
    for (name, had_history) in
        [(GATE_SOCKET_BLANK, false), (GATE_SOCKET_HISTORY, true), ("valkeeper.sock", false)]
    {
        let server = Server::at_socket(name, &conf(free_port())).await;
        may_ask(&server).await;
        let way = Arc::new(Socket(server.socket.unwrap()));
        let (link, _) = link_by(way, as_node(server.target()), OPERATOR_PASSWORD);
        let role = |look: Look| {
            let (facts, _) = look.info.resolved(&BTreeMap::new(), Timestamp(0));
            (facts.role, look.node.unwrap().primary)
        };
        let gated = ServerRole::Replica { source: Source::Gate { had_history }, link: Link::Down };
        assert_eq!(role(present(&link).await), (gated, None), "{name}");
        // Once it has been open, whoever closes it does not bring it back there.
        for port in [server.port, 0] {
            server.run::<String>(&format!("CONFIG SET port {port}")).await.unwrap();
            let look = present(&link).await;
            assert_eq!((look.port, look.role.clone()), (port, RawRole::Primary), "{name}");
        }
    }
}

#[tokio::test]
async fn a_node_that_loads_answers_and_says_so() {
    let mut server = node(free_port()).await;
    server.run::<String>("CLUSTER ADDSLOTSRANGE 0 16383").await.unwrap();
    server.run::<String>("DEBUG POPULATE 20000").await.unwrap();
    server.run::<String>("SAVE").await.unwrap();
    let id = says(&link(&server)).await.id;
    // A millisecond for each key, so that it is still loading whenever the look comes.
    let slow = "key-load-delay 1000\nloading-process-events-interval-bytes 1024";
    server.restart(&format!("{}\n{slow}", conf(free_port()))).await;
    may_ask(&server).await;
    let look = present(&link(&server)).await;
    assert!(look.loading, "{look:?}");
    assert_eq!(look.node.map(|node| node.id), Some(id));
}

#[tokio::test]
async fn who_may_not_ask_for_nodes_or_asks_no_node_learns_nothing() {
    let server = Server::start(&conf(free_port())).await;
    assert_eq!(link(&server).look().await, Observed::Unknown(Why::Unauthorized));
    let alone = Server::start("").await;
    may_ask(&alone).await;
    assert_eq!(link(&alone).look().await, Observed::Unknown(Why::Garbled));
}

#[tokio::test]
async fn a_stranger_whose_third_answer_has_no_end_is_cut_off() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let flood = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut asked = [0; 1024];
        assert!(socket.read(&mut asked).await.unwrap() > 0, "who logs in");
        socket.write_all(b"+OK\r\n").await.unwrap();
        assert!(socket.read(&mut asked).await.unwrap() > 0, "all questions");
        socket.write_all(b"+first\r\n+second\r\n*1\r\n$500000000\r\n").await.unwrap();
        let mut sent = 0;
        while let Ok(written) = socket.write(&[b'x'; 65536]).await {
            sent += written;
        }
        sent
    });
    let (link, _) = link_to(as_node(target_at(port)), OPERATOR_PASSWORD);
    let look = link.look().await;
    assert!(look.is_unknown(), "{look:?}");
    // What the kernel's two buffers hold comes on top of what was read.
    assert!(flood.await.unwrap() < 50 << 20);
}

#[tokio::test]
async fn a_node_that_is_killed_while_it_is_asked_is_absent_in_that_look() {
    let mut server = node(free_port()).await;
    let link = link(&server);
    present(&link).await;
    server.signal("STOP");
    assert_eq!(link.look().await, Observed::Unknown(Why::Silent));
    let (seen, _) = tokio::join!(link.look(), async { server.kill_now() });
    assert_eq!(seen, Observed::Absent, "{:?}", link.trouble());
}

//! What a look brings back.

use crate::server::{OPERATOR_PASSWORD, Server, link_to, present, target_at};
use std::{collections::BTreeMap, net::Ipv4Addr};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use valkeeper::valkey::Error;
use valkeeper_core::{
    ids::{MemberId, Timestamp},
    info::{RawRole, RawSource},
    observation::{Link, Observed, ServerRole, Source, Why},
};

fn members() -> BTreeMap<String, MemberId> {
    BTreeMap::from([("127.0.0.1".to_owned(), MemberId::new(0, 0))])
}

#[tokio::test]
async fn a_primary_says_who_it_is_and_counts_its_replicas() {
    let primary = Server::start("").await;
    let _replica = Server::replica_of(&primary).await;
    let (_link, look) = primary.linked().await;
    assert_eq!(look.role, RawRole::Primary);
    assert_eq!(look.run_id, primary.field("run_id").await);
    assert_eq!(look.version, primary.field("valkey_version").await);
    assert_eq!(look.replid.0, primary.field("master_replid").await);
    assert_eq!((&look.replid2, look.replid2_offset), (&None, None));
    assert_eq!((look.replicas_online, look.last_io_ms, look.loading), (1, None, false));
}

#[tokio::test]
async fn a_replica_names_its_source_and_the_age_of_its_link() {
    let primary = Server::start("").await;
    let replica = Server::replica_of(&primary).await;
    let (_link, look) = replica.linked().await;
    let (_link, of_primary) = primary.linked().await;
    let source = RawSource { host: "127.0.0.1".to_owned(), port: primary.port };
    assert_eq!(look.role, RawRole::Replica { source, link: Link::Up });
    assert_eq!(look.replid, of_primary.replid);
    assert!(look.last_io_ms.is_some_and(|age| (0..20_000).contains(&age)), "{look:?}");

    let (facts, reading) = look.info.clone().resolved(&members(), Timestamp(7));
    let source = Source::Member(MemberId::new(0, 0));
    assert_eq!(facts.role, ServerRole::Replica { source, link: Link::Up });
    assert_eq!((reading.taken_at, reading.offset), (Timestamp(7), look.offset));
}

#[tokio::test]
async fn a_gated_server_says_whether_it_had_a_history() {
    for (port, had_history) in [(1, true), (2, false)] {
        let gated = Server::start(&format!("replicaof 127.0.0.1 {port}")).await;
        let (_link, look) = gated.linked().await;
        let (facts, _) = look.info.resolved(&members(), Timestamp(0));
        assert_eq!(
            facts.role,
            ServerRole::Replica { source: Source::Gate { had_history }, link: Link::Down }
        );
    }
}

#[tokio::test]
async fn a_loading_server_answers_and_says_so() {
    let mut server = Server::start("").await;
    server.run::<String>("DEBUG POPULATE 20000").await.unwrap();
    server.run::<String>("SAVE").await.unwrap();
    // A millisecond for each key, so that it is still loading whenever the look comes.
    server.restart("key-load-delay 1000\nloading-process-events-interval-bytes 1024").await;
    let (_link, look) = server.linked().await;
    assert!(look.loading, "{look:?}");
}

#[tokio::test]
async fn a_wrong_password_is_unauthorized_and_not_shown() {
    let server = Server::start("").await;
    let (link, _) = link_to(server.target(), "not-the-password");
    assert_eq!(link.look().await, Observed::Unknown(Why::Unauthorized));
    let trouble = link.trouble().unwrap();
    assert_eq!(trouble, Error::Unauthorized("WRONGPASS".to_owned()));
    assert!(!format!("{trouble} {trouble:?}").contains("not-the-password"));
}

#[tokio::test]
async fn no_secret_reaches_the_servers_log() {
    let server = Server::start("loglevel debug").await;
    let (_link, _) = server.linked().await;
    assert!(!server.log().contains(OPERATOR_PASSWORD));
}

#[tokio::test]
async fn a_stranger_at_the_address_is_garbled_and_not_absent() {
    for answer in
        ["HTTP/1.1 400 Bad Request\r\n\r\n", "+OK\r\n+OK\r\n", "-ERR whatever\r\n", "*-7\r\n", "\0\0\0\0"]
    {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let stranger = tokio::spawn(async move {
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let mut asked = [0; 1024];
                    while socket.read(&mut asked).await.is_ok_and(|read| read > 0) {
                        let _ = socket.write_all(answer.as_bytes()).await;
                    }
                });
            }
        });
        let target = target_at(port);
        let (link, _) = link_to(target, OPERATOR_PASSWORD);
        assert_eq!(link.look().await, Observed::Unknown(Why::Garbled), "{answer:?}: {:?}", link.trouble());
        stranger.abort();
    }
}

#[tokio::test]
async fn a_stranger_that_talks_without_end_is_cut_off() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let flood = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut sent = 0;
        socket.readable().await.unwrap();
        let _ = socket.write_all(b"$500000000\r\n").await;
        while let Ok(written) = socket.write(&[b'x'; 65536]).await {
            sent += written;
        }
        sent
    });
    let target = target_at(port);
    let (link, _) = link_to(target, OPERATOR_PASSWORD);
    assert_eq!(link.look().await, Observed::Unknown(Why::Garbled), "{:?}", link.trouble());
    // What the kernel's two buffers hold comes on top of what was read.
    assert!(flood.await.unwrap() < 50 << 20);
}

#[tokio::test]
async fn looking_again_uses_the_same_connection() {
    let server = Server::start("").await;
    let (link, _) = server.linked().await;
    let before = server.field("total_connections_received").await.parse::<u64>().unwrap();
    for _ in 0..10 {
        present(&link).await;
    }
    let after = server.field("total_connections_received").await.parse::<u64>().unwrap();
    assert_eq!(after - before, 1, "only this test's own");
}

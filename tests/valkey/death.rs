//! Death is proven, silence is not death.

use crate::{
    proxy::Proxy,
    server::{OPERATOR_PASSWORD, Server, link_to, present, target_at, woken},
};
use std::{
    net::{Ipv4Addr, TcpListener},
    time::{Duration, Instant},
};
use valkeeper::valkey::{Error, Target};
use valkeeper_core::observation::{Observed, Why};

/// Kills measured: the median says what is usual, whatever else the machine is doing.
const KILLS: usize = 9;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_process_wakes_at_once_and_is_absent() {
    let (mut wakes, mut proofs) = (Vec::new(), Vec::new());
    for _ in 0..KILLS {
        let mut server = Server::start("").await;
        let (link, wake) = server.link();
        present(&link).await;
        let killed = server.kill_now();
        woken(&wake).await;
        wakes.push(killed.elapsed());
        assert_eq!(link.look().await, Observed::Absent, "{:?}", link.trouble());
        proofs.push(killed.elapsed());
        assert_eq!(link.trouble(), Some(Error::Refused));
    }
    wakes.sort();
    proofs.sort();
    println!("SIGKILL to wake: {wakes:?}");
    println!("SIGKILL to proven absent: {proofs:?}");
    assert!(wakes[KILLS / 2] < Duration::from_millis(50), "{wakes:?}");
}

#[tokio::test]
async fn a_frozen_process_is_silent_and_never_absent() {
    let server = Server::start("").await;
    let (link, wake) = server.link();
    let before = present(&link).await;
    server.signal("STOP");
    for _ in 0..3 {
        assert_eq!(link.look().await, Observed::Unknown(Why::Silent));
    }
    server.signal("CONT");
    assert_eq!(present(&link).await.run_id, before.run_id);
    let nobody = tokio::time::timeout(Duration::ZERO, wake.notified()).await;
    assert!(nobody.is_err(), "no connection ended");
}

#[tokio::test]
async fn a_process_killed_while_frozen_wakes_and_is_absent() {
    let mut server = Server::start("").await;
    let (link, wake) = server.link();
    present(&link).await;
    server.signal("STOP");
    assert_eq!(link.look().await, Observed::Unknown(Why::Silent));
    server.kill_now();
    woken(&wake).await;
    assert_eq!(link.look().await, Observed::Absent);
}

#[tokio::test]
async fn a_process_killed_during_a_look_at_its_frozen_self_is_absent_in_that_look() {
    let mut server = Server::start("").await;
    let (link, _wake) = server.link();
    present(&link).await;
    server.signal("STOP");
    assert_eq!(link.look().await, Observed::Unknown(Why::Silent));
    let (seen, _) = tokio::join!(link.look(), async { server.kill_now() });
    assert_eq!(seen, Observed::Absent, "{:?}", link.trouble());
}

#[tokio::test]
async fn a_closed_connection_alone_is_not_death() {
    let server = Server::start("").await;
    let (link, wake) = server.link();
    let before = present(&link).await;
    let killed: i64 = server.run("CLIENT KILL USER valkeeper").await.unwrap();
    assert_eq!(killed, 1);
    woken(&wake).await;
    assert_eq!(present(&link).await.run_id, before.run_id);
}

#[tokio::test]
async fn a_restarted_process_is_another_process() {
    let mut server = Server::start("").await;
    let (link, wake) = server.link();
    let before = present(&link).await;
    server.restart("").await;
    woken(&wake).await;
    assert_ne!(present(&link).await.run_id, before.run_id);
}

#[tokio::test]
async fn a_refusal_where_no_connection_was_ever_held_is_no_death() {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let target = target_at(port);
    let (link, _) = link_to(target, OPERATOR_PASSWORD);
    assert_eq!(link.look().await, Observed::Unknown(Why::Silent));
    assert_eq!(link.trouble(), Some(Error::Refused));
}

#[tokio::test]
async fn a_dead_path_is_replaced_by_a_new_connection() {
    let server = Server::start("").await;
    let proxy = Proxy::to(server.port).await;
    let (link, wake) = link_to(Target { port: proxy.port, ..server.target() }, OPERATOR_PASSWORD);
    let before = present(&link).await;
    proxy.deafen();
    assert_eq!(link.look().await, Observed::Unknown(Why::Silent));
    let again = Instant::now();
    assert_eq!(present(&link).await.run_id, before.run_id);
    assert!(again.elapsed() < Duration::from_millis(500));
    // The new connection is the held one now: its end wakes.
    let _: i64 = server.run("CLIENT KILL USER valkeeper").await.unwrap();
    woken(&wake).await;
}

#[tokio::test]
async fn a_refused_connection_proves_nothing_while_the_held_one_is_open() {
    let server = Server::start("").await;
    let mut proxy = Proxy::to(server.port).await;
    let (link, _wake) = link_to(Target { port: proxy.port, ..server.target() }, OPERATOR_PASSWORD);
    present(&link).await;
    proxy.deafen();
    proxy.refuse().await;
    for _ in 0..3 {
        assert_eq!(link.look().await, Observed::Unknown(Why::Silent));
    }
}

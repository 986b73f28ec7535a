//! Agents and their servers as real processes, told by gRPC what to do as an operator would, or left alone.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "the helpers of a test are a test"
)]

mod announce;
mod by_key;
mod closed;
mod cluster;
mod news;
mod pki;
mod relay;
mod settings;
mod strangers;
mod support;
mod users;

use std::time::{Duration, Instant};
use support::{CLUSTER, Shard, eventually, signal};
use tonic::Code;
use valkeeper_agent::proto;
use valkeeper_core::ids::{MemberId, Seq};

const SNAPSHOTS: &str = "save 3600 1";
const NOTHING: &str = "save \"\"";
const APPEND_ONLY: &str = "save \"\"\nappendonly yes\nappenddirname appendonlydir";

#[tokio::test]
async fn a_server_that_is_killed_is_back_at_the_gate_and_the_agent_is_the_same() {
    let mut shard = Shard::start(1, SNAPSHOTS);
    let news = news::Desk::open(&shard.operator).await;
    let first = shard.at_gate(0, 1).await;
    shard.greet(0, 1, &news.address).await;
    let page = |path: &'static str| {
        let member = &shard.members[0];
        async move { member.page(path).await.unwrap().0 }
    };
    assert_eq!((page("/startupz").await, page("/readyz").await, page("/livez").await), (200, 503, 200));
    shard.promote(0, 1, 5, 0).await;
    assert_eq!((page("/startupz").await, page("/readyz").await), (200, 200));
    let member = &shard.members[0];
    let _: () = member.run("SET key value").await.unwrap();
    let _: () = member.run("SAVE").await.unwrap();
    let (pid, server) = (member.pid(), member.server_pid().await);
    // The next revision's: this pod's server does not get to see it.
    std::fs::write(member.dir.join("valkey.conf"), "a-directive-of-tomorrow yes\n").unwrap();
    let killed = Instant::now();
    signal(server, "KILL");
    news.heard("the server's end", |state| state.exited_run_id == first.run_id).await;
    println!("news of the end after {:?}", killed.elapsed());
    let again = shard.at_gate(0, 1).await;
    println!("at the gate again after {:?}", killed.elapsed());
    assert_ne!(again.run_id, first.run_id);
    assert_eq!(again.instance, first.instance);
    let member = &mut shard.members[0];
    assert!(member.lives() && member.pid() == pid);
    assert_eq!(member.field("role").await, "slave");
    assert_eq!(member.field("master_port").await, "1", "it has found its data");
    assert!(member.run::<()>("SET key other").await.is_err());
    assert!(member.log().contains("Ready to accept connections"), "its lines are passed on");
    let (status, metrics) = member.page("/metrics").await.unwrap();
    assert_eq!(status, 200);
    for line in ["redis_up 1", "redis_db_keys{db=\"db0\"} 1", "valkeeper_agent_server_restarts_total 1"] {
        assert!(metrics.lines().any(|l| l == line), "{line} in {metrics}");
    }
}

#[tokio::test]
async fn a_promotion_is_refused_if_anything_it_was_decided_from_is_not_so() {
    let shard = Shard::start(2, NOTHING);
    shard.at_gate(0, 3).await;
    shard.at_gate(1, 3).await;
    let right = shard.promotion(0, 3, 7, 0).await;
    let mut agent = shard.agent(0).await;
    let mut refused = async |request: proto::PromoteRequest| agent.promote(request).await.unwrap_err();
    let other = proto::PromoteRequest { run_id: "0".repeat(40), ..right.clone() };
    assert_eq!(refused(other).await.code(), Code::FailedPrecondition);
    let other = proto::PromoteRequest { replid: "0".repeat(40), ..right.clone() };
    assert_eq!(refused(other).await.code(), Code::FailedPrecondition);
    let other = proto::PromoteRequest { offset: right.offset + 1, ..right.clone() };
    assert_eq!(refused(other).await.code(), Code::FailedPrecondition);
    let other = proto::PromoteRequest { consents: 1, ..right.clone() };
    assert_eq!(refused(other).await.code(), Code::FailedPrecondition);
    let other = proto::PromoteRequest { brief: Some(shard.brief(7, 1, 0)), ..right.clone() };
    assert_eq!(refused(other).await.code(), Code::FailedPrecondition);
    let other = proto::PromoteRequest { epoch: 2, ..right.clone() };
    assert_eq!(refused(other).await.code(), Code::Aborted);
    assert_eq!(
        refused(proto::PromoteRequest { brief: None, ..right.clone() }).await.code(),
        Code::InvalidArgument
    );
    assert_eq!(shard.members[0].field("role").await, "slave");

    agent.promote(right.clone()).await.unwrap();
    assert_eq!(shard.members[0].ledger().brief.grant, Seq(7), "on disk before it is answered");
    shard.attach(1, 0, 3, 7, 0).await;
    let mut lower = shard.promotion(1, 3, 6, 0).await;
    let mut agent = shard.agent(1).await;
    assert_eq!(agent.promote(lower.clone()).await.unwrap_err().code(), Code::FailedPrecondition);
    lower.brief = Some(shard.brief(9, 1, 0));
    agent.promote(lower).await.unwrap();
    // The writer of a lower epoch changes nothing at all.
    let tell = proto::TellRequest { epoch: 2, brief: Some(shard.brief(99, 1, 0)) };
    assert_eq!(agent.tell(tell).await.unwrap_err().code(), Code::Aborted);
    assert_eq!(shard.members[1].ledger().brief.grant, Seq(9));
}

#[test]
fn it_installs_itself_where_a_container_can_run_it() {
    let dir = std::env::temp_dir().join(format!("vk-install-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let program = env!("CARGO_BIN_EXE_valkeeper-agent");
    for _ in 0..2 {
        let done = std::process::Command::new(program).arg("install").arg(&dir).status().unwrap();
        assert!(done.success());
    }
    let version = std::process::Command::new(dir.join("valkeeper-agent")).arg("--version").output().unwrap();
    assert!(version.stdout.starts_with(b"valkeeper-agent "));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[tokio::test]
async fn nobody_else_is_obeyed() {
    let shard = Shard::start(2, NOTHING);
    shard.at_gate(0, 1).await;
    let stranger = pki::Pki::new(CLUSTER);
    let greeted = async |live: &valkeeper_agent::tls::Live| match shard.try_agent(live, 0).await {
        Some(mut agent) => agent.greet(proto::GreetRequest::default()).await.map(drop).map_err(|e| e.code()),
        None => Err(Code::Unavailable),
    };
    assert!(greeted(&stranger.operator()).await.is_err());
    assert!(greeted(&stranger.member(CLUSTER, "0-1")).await.is_err());
    assert_eq!(greeted(&shard.pki.member(CLUSTER, "0-1")).await, Err(Code::PermissionDenied));
    assert!(greeted(&shard.pki.member(CLUSTER, "1-0")).await.is_err(), "a member of another shard");
    let before = shard.greet(0, 1, "").await;
    assert_eq!(before.epoch, 1);
    // Renewed while it runs.
    shard.renew();
    eventually("the new certificate", || async {
        let now = shard.greet(0, 1, "").await;
        (now.certificate_thumbprint != before.certificate_thumbprint && now.instance == before.instance)
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn without_the_operator_a_shard_that_was_stopped_in_order_comes_back_from_its_append_only_files() {
    comes_back(APPEND_ONLY).await;
}

#[tokio::test]
async fn without_the_operator_a_shard_that_was_stopped_in_order_comes_back_from_its_snapshots() {
    comes_back(SNAPSHOTS).await;
}

/// Ends every member in order and starts all again, the operator being away.
async fn comes_back(conf: &str) {
    let mut shard = Shard::start(3, conf);
    shard.serve(1, 5, 2_000).await;
    let _: () = shard.members[0].run("SET key value").await.unwrap();
    let offset = shard.members[0].field("master_repl_offset").await.parse::<i64>().unwrap();
    for member in &mut shard.members {
        member.terminate();
    }
    for member in &mut shard.members {
        assert!(member.ended().await.success(), "{}", member.log());
    }
    let left = shard.members[0].ledger().left.expect("what it left");
    assert!(left.offset >= offset, "{left:?}, {offset}");
    // One after the other: nobody goes on before everybody has answered.
    for member in &mut shard.members {
        member.start();
    }
    eventually("a primary", || async { (shard.members[0].field("role").await == "master").then_some(()) })
        .await;
    for member in &shard.members[1..] {
        member.linked().await;
        assert_eq!(member.run::<String>("GET key").await.unwrap(), "value");
    }
    let _: () = shard.members[0].run("SET key again").await.unwrap();
    let state = shard.greet(0, 1, "").await;
    assert_eq!((state.gate.as_str(), state.brief.unwrap().grant), ("resumed", 5));
    assert_eq!(shard.greet(1, 1, "").await.attached_to, "0-0");
    assert!(shard.members.iter().skip(1).all(|member| member.ledger().consents == 1));
    assert_eq!(shard.members[0].ledger().left, None);
}

#[tokio::test]
async fn without_the_operator_a_holder_that_has_lost_its_data_holds() {
    let mut shard = Shard::start(2, SNAPSHOTS);
    shard.serve(1, 5, 0).await;
    let _: () = shard.members[0].run("SET key value").await.unwrap();
    shard.members[0].kill();
    shard.members[0].lose_data();
    shard.members[0].start();
    eventually("a holder that holds", || async {
        shard.members[0].log().contains("BlankData").then_some(())
    })
    .await;
    assert_eq!(shard.members[0].field("role").await, "slave");
    assert_eq!(shard.members[1].run::<String>("GET key").await.unwrap(), "value", "nobody copies from it");
    // The operator is back and decides.
    shard.at_gate(0, 2).await;
    shard.promote(1, 2, 9, 0).await;
    shard.attach(0, 1, 2, 9, 0).await;
    assert_eq!(shard.members[0].run::<String>("GET key").await.unwrap(), "value");
}

#[tokio::test]
async fn a_server_that_a_person_made_primary_takes_writes_and_follows_when_it_is_told_to() {
    let shard = Shard::start(2, NOTHING);
    shard.serve(1, 5, 0).await;
    let _: () = shard.members[1].run("REPLICAOF NO ONE").await.unwrap();
    let _: () = shard.members[1].run("SET key other").await.unwrap();
    assert!(!shard.greet(1, 1, "").await.writes_stopped);
    shard.attach(1, 0, 1, 5, 0).await;
    assert_eq!(shard.members[1].field("role").await, "slave");
}

#[tokio::test]
async fn a_promotion_that_was_begun_is_finished_though_nobody_waits_for_it() {
    let shard = Shard::start(1, NOTHING);
    shard.at_gate(0, 1).await;
    let request = shard.promotion(0, 1, 5, 0).await;
    eventually("a grant that is known", || async {
        let mut agent = shard.agent(0).await;
        let given_up = tokio::time::timeout(Duration::from_millis(1), agent.promote(request.clone())).await;
        (given_up.is_ok() || shard.members[0].ledger().brief.grant == Seq(5)).then_some(())
    })
    .await;
    eventually("a primary", || async { (shard.members[0].field("role").await == "master").then_some(()) })
        .await;
    eventually("the command's end", || async {
        (shard.greet(0, 1, "").await.gate == "commanded").then_some(())
    })
    .await;
}

/// A server without data whose start leaves files: they are none, however often it is started.
async fn stays_blank(conf: &str, leftover: &str) {
    let mut shard = Shard::start(2, conf);
    shard.at_gate(0, 1).await;
    assert!(shard.members[0].ledger().blank);
    let member = &mut shard.members[0];
    member.terminate();
    assert!(member.ended().await.success(), "{}", member.log());
    assert!(member.dir.join("data").join(leftover).exists());
    member.start();
    let again = shard.at_gate(0, 1).await;
    let member = &shard.members[0];
    assert_eq!(member.field("master_port").await, "2", "{}", member.log());
    assert_eq!(again.drawn_replid, member.field("master_replid").await);
    // A synchronisation gives it data.
    shard.at_gate(1, 1).await;
    shard.promote(1, 1, 5, 0).await;
    assert!(!shard.members[1].ledger().blank, "whoever takes a grant has the data");
    shard.attach(0, 1, 1, 5, 0).await;
    eventually("data", || async { (!shard.members[0].ledger().blank).then_some(()) }).await;
    shard.members[0].kill();
    shard.members[0].start();
    shard.at_gate(0, 1).await;
    assert_eq!(shard.members[0].field("master_port").await, "1");
}

#[tokio::test]
async fn append_only_files_of_an_empty_start_are_no_data() {
    stays_blank(APPEND_ONLY, "appendonlydir").await;
}

#[tokio::test]
async fn a_snapshot_of_an_empty_start_is_no_data() {
    stays_blank(SNAPSHOTS, "dump.rdb").await;
}

#[tokio::test]
async fn a_server_that_cannot_save_is_ended_when_asked_again_and_claims_nothing() {
    let mut shard = Shard::start(1, SNAPSHOTS);
    shard.at_gate(0, 1).await;
    shard.promote(0, 1, 5, 0).await;
    let member = &mut shard.members[0];
    let _: () = member.run("SET key value").await.unwrap();
    // Where a snapshot is to be put, a directory is in the way.
    std::fs::create_dir(member.dir.join("data/dump.rdb")).unwrap();
    member.terminate();
    eventually("a refused save", async || member.log().contains("trying to shut").then_some(())).await;
    assert!(member.lives());
    member.terminate();
    assert_eq!(member.ended().await.code(), Some(137), "{}", member.log());
    assert_eq!(member.ledger().left, None);
}

/// Writes until one is refused; when the last one was accepted.
async fn last_write(shard: &Shard) -> Instant {
    let mut accepted = Instant::now();
    eventually("refused writes", async || match shard.members[0].run::<()>("SET key value").await {
        Ok(()) => {
            accepted = Instant::now();
            None
        }
        Err(error) => error.to_string().contains("NOREPLICAS").then_some(()),
    })
    .await;
    accepted
}

#[tokio::test]
async fn a_holder_that_nobody_confirms_stops_its_writes_in_time_and_goes_on_when_it_is_confirmed() {
    const WINDOW_MS: i64 = 1_500;
    let shard = Shard::start(3, NOTHING);
    let news = news::Desk::open(&shard.operator).await;
    shard.serve(1, 5, WINDOW_MS).await;
    shard.greet(0, 1, &news.address).await;
    let peers = [shard.members[1].pid(), shard.members[2].pid()];
    peers.iter().for_each(|pid| signal(*pid, "STOP"));
    let cut = Instant::now();
    let after = last_write(&shard).await.duration_since(cut);
    println!("the last write was accepted {after:?} after the cut");
    // The last request that was confirmed was sent before the cut.
    assert!(after < Duration::from_millis(1_700), "{after:?}");
    news.heard("stopped writes", |state| state.writes_stopped).await;
    assert_eq!(shard.members[0].page("/readyz").await.unwrap().0, 503);
    // The operator is asked, and it confirms.
    news.confirm(true);
    eventually("a write", || async { shard.members[0].run::<()>("SET key value").await.ok() }).await;
    assert_eq!(
        shard.members[0].run::<Vec<String>>("CONFIG GET min-replicas-to-write").await.unwrap()[1],
        "0"
    );
    news.confirm(false);
    last_write(&shard).await;
    // One of two peers is a majority.
    signal(peers[0], "CONT");
    eventually("a write", || async { shard.members[0].run::<()>("SET key value").await.ok() }).await;
    signal(peers[1], "CONT");
    assert!(shard.members[0].log().contains("writes are allowed again"));
}

#[tokio::test]
async fn a_holder_that_learns_of_a_higher_grant_writes_no_more_until_it_is_told() {
    let shard = Shard::start(3, NOTHING);
    shard.serve(1, 5, 2_000).await;
    // The others promise; the holder hears of it from them, not from the operator.
    let brief = shard.brief(9, 1, 2_000);
    let request = proto::PromiseRequest { epoch: 1, brief: Some(brief) };
    let mut first = shard.agent(1).await;
    eventually("a confirmed holder", || async {
        let (_, metrics) = shard.members[1].page("/metrics").await?;
        (!metrics.contains("valkeeper_agent_confirmations_total 0")).then_some(())
    })
    .await;
    let refused = first.promise(request.clone()).await;
    assert_eq!(refused.unwrap_err().code(), Code::FailedPrecondition, "the holder was confirmed lately");
    signal(shard.members[0].pid(), "STOP");
    let mut second = shard.agent(2).await;
    for agent in [&mut first, &mut second] {
        eventually("a promise", async || agent.promise(request.clone()).await.ok()).await;
    }
    signal(shard.members[0].pid(), "CONT");
    last_write(&shard).await;
    let state = shard.greet(0, 1, "").await;
    assert!(state.writes_stopped);
    assert_eq!(state.brief.unwrap().grant, 5);
    // A new grant that says it is right after all.
    let tell = proto::TellRequest { epoch: 1, brief: Some(shard.brief(12, 0, 2_000)) };
    shard.agent(0).await.tell(tell).await.unwrap();
    eventually("a write", || async { shard.members[0].run::<()>("SET key value").await.ok() }).await;
}

#[tokio::test]
async fn a_frozen_server_is_silent_and_a_fence_ends_it() {
    let shard = Shard::start(1, NOTHING);
    let before = shard.at_gate(0, 1).await;
    let server = shard.members[0].server_pid().await;
    signal(server, "STOP");
    let silent = eventually("silence", || async {
        Some(shard.greet(0, 1, "").await).filter(|state| state.silent_ms > 0)
    })
    .await;
    assert_eq!((silent.run_id.as_str(), silent.exited.as_str()), (before.run_id.as_str(), ""));
    let mut agent = shard.agent(0).await;
    let fence = |run_id: &str| proto::ServerRequest { epoch: 1, run_id: run_id.to_owned() };
    let other = agent.fence(fence(&"0".repeat(40))).await.unwrap_err();
    assert_eq!(other.code(), Code::FailedPrecondition);
    agent.fence(fence(&before.run_id)).await.unwrap();
    agent.fence(fence(&before.run_id)).await.unwrap();
    let after = eventually("another server", || async {
        Some(shard.greet(0, 1, "").await).filter(|state| !state.run_id.is_empty())
    })
    .await;
    assert_eq!(after.exited_run_id, before.run_id);
    assert_ne!(after.run_id, before.run_id);
}

/// What an operator does when a primary is to be replaced by the other member: writes wait, the other gets everything, takes
/// over, and the old one follows it. How long writes waited.
async fn hand_over(shard: &Shard, grant: u64) -> Duration {
    let run_id = shard.members[0].field("run_id").await;
    let (mut old, mut new) = (shard.agent(0).await, shard.agent(1).await);
    let mut promotion = shard.promotion(1, 1, grant, 0).await;
    let attach = proto::AttachRequest {
        epoch: 1,
        brief: promotion.brief.clone(),
        run_id: run_id.clone(),
        host: shard.members[1].ip.to_string(),
        port: u32::from(shard.members[1].port),
        node_id: String::new(),
    };
    let begun = Instant::now();
    let pause = proto::PauseRequest { epoch: 1, run_id, timeout_ms: 5_000 };
    let paused = old.pause(pause).await.unwrap().into_inner();
    (promotion.replid, promotion.offset) = (paused.replid, paused.offset);
    eventually("a replica that has everything", || async {
        let offset: i64 = shard.members[1].field("slave_repl_offset").await.parse().unwrap();
        (offset >= promotion.offset).then_some(())
    })
    .await;
    old.attach(attach).await.unwrap();
    new.promote(promotion).await.unwrap();
    begun.elapsed()
}

#[tokio::test]
async fn a_handover_loses_no_write_and_spares_the_operators_connection() {
    let shard = Shard::start(2, NOTHING);
    shard.serve(1, 5, 0).await;
    let _: () = shard.members[0].run("SET key value").await.unwrap();
    println!("writes waited {:?}", hand_over(&shard, 9).await);
    shard.members[0].linked().await;
    assert_eq!(shard.members[1].field("sync_full").await, "0", "the old primary goes on where it was");
    assert_eq!(shard.members[0].run::<String>("GET key").await.unwrap(), "value");
    assert_eq!(MemberId::new(0, 1), shard.members[0].ledger().brief.holder.unwrap());
    assert!(!shard.members[0].log().contains("writes are stopped"), "they were paused");

    let member = &shard.members[0];
    let (mut looking, mut client) = (member.connect("valkeeper").await, member.connect("default").await);
    let run_id: String = member.field("run_id").await;
    let disconnect = proto::ServerRequest { epoch: 1, run_id };
    shard.agent(0).await.disconnect(disconnect).await.unwrap();
    let ping = redis::cmd("PING");
    assert!(ping.query_async::<String>(&mut client).await.is_err());
    assert_eq!(ping.query_async::<String>(&mut looking).await.unwrap(), "PONG");
}

#[tokio::test]
async fn a_promotion_that_waited_for_too_long_is_not_begun() {
    let shard = Shard::start(2, NOTHING);
    shard.serve(1, 5, 0).await;
    let member = &shard.members[1];
    let promotion = shard.promotion(1, 1, 9, 0).await;
    let pid = member.server_pid().await;
    signal(pid, "STOP");
    // Each of these waits a second for the server, one after the other, and is for another process.
    let others: Vec<_> =
        (0..3).map(|_| proto::PromoteRequest { run_id: "another".to_owned(), ..promotion.clone() }).collect();
    let mut waiting = Vec::new();
    for request in others.into_iter().chain([promotion]) {
        let mut agent = shard.agent(1).await;
        waiting.push(tokio::spawn(async move { agent.promote(request).await }));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(Duration::from_millis(2_300)).await;
    signal(pid, "CONT");
    let last = waiting.pop().unwrap().await.unwrap().unwrap_err();
    assert!(last.message().contains("too late"), "{last}");
    assert_eq!(member.field("role").await, "slave");
}

#[tokio::test]
async fn a_primary_that_is_told_to_end_waits_for_its_handover_and_then_ends_at_once() {
    let mut shard = Shard::start(2, SNAPSHOTS);
    let news = news::Desk::open(&shard.operator).await;
    shard.serve(1, 5, 0).await;
    shard.greet(0, 1, &news.address).await;
    let _: () = shard.members[0].run("SET key value").await.unwrap();
    shard.members[0].terminate();
    news.heard("its leaving", |state| state.leaving).await;
    hand_over(&shard, 9).await;
    let begun = Instant::now();
    assert!(shard.members[0].ended().await.success());
    println!("ended {:?} after the handover", begun.elapsed());
    assert!(shard.members[0].log().contains("told to end"));
    assert_eq!(shard.members[1].run::<String>("GET key").await.unwrap(), "value");
    let _: () = shard.members[1].run("SET key more").await.unwrap();
}

#[tokio::test]
async fn a_frozen_primary_that_nobody_confirms_is_ended() {
    let shard = Shard::start(3, NOTHING);
    shard.serve(1, 5, 1_000).await;
    let before = shard.greet(0, 1, "").await;
    signal(shard.members[0].server_pid().await, "STOP");
    [1, 2].iter().for_each(|n| signal(shard.members[*n].pid(), "STOP"));
    eventually("the end of the frozen server", || async {
        Some(shard.greet(0, 1, "").await).filter(|state| state.exited_run_id == before.run_id)
    })
    .await;
    assert!(shard.members[0].log().contains("writes cannot be stopped"));
    let again = shard.at_gate(0, 1).await;
    assert!(!again.writes_stopped);
}

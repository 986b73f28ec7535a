//! Handovers: nothing acknowledged is lost, there are never two primaries, and a replica that lags changes nothing.

use crate::{
    agent::Pair,
    proxy::Proxy,
    server::{Instance, OPERATOR_PASSWORD, eventually, link_to, present, signal},
};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use valkeeper::{agents::Endpoint, valkey::Target};
use valkeeper_core::effect::Outcome;

/// Longest gap between two acknowledged writes in any of the handovers. Measured: some 10 ms; the rest is for a busy machine.
const GAP_MAX: Duration = Duration::from_secs(1);

/// Adds numbers until told to stop; returns those that were acknowledged and the longest gap between two. After a refusal, or where a
/// handover has ended its connection, the other server is tried.
async fn write_until(
    stop: Arc<AtomicBool>,
    mut first: Instance,
    mut second: Instance,
) -> (BTreeSet<u64>, Duration) {
    let mut connection = first.app().await;
    let (mut acknowledged, mut last, mut longest) = (BTreeSet::new(), Instant::now(), Duration::ZERO);
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let added = redis::cmd("SADD").arg("numbers").arg(number).query_async::<i64>(&mut connection).await;
        if added.is_ok() {
            acknowledged.insert(number);
            longest = longest.max(last.elapsed());
            last = Instant::now();
        } else {
            std::mem::swap(&mut first, &mut second);
            connection = first.app().await;
        }
    }
    (acknowledged, longest)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handover_under_load_loses_no_acknowledged_write() {
    let pair = Pair::start().await;
    let [first, second] = &pair.members;
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write_until(stop.clone(), **first, **second));
    let mut took = Vec::new();
    for (grant, (from, to)) in (2..).zip([(0, 1), (1, 0), (0, 1)]) {
        let [old, new] = [&pair.members[from], &pair.members[to]];
        let begun: u64 = old.run("SCARD numbers").await.unwrap();
        eventually("writes on the primary", || async {
            (old.run::<u64>("SCARD numbers").await.unwrap() > begun + 200).then_some(())
        })
        .await;
        let at = Instant::now();
        assert_eq!(pair.hand_over(grant, from, to, 2_000).await, Outcome::Verified);
        took.push(at.elapsed());
        assert_eq!((old.field("role").await.as_str(), new.field("role").await.as_str()), ("slave", "master"));
        old.in_sync().await;
    }
    let begun: u64 = second.run("SCARD numbers").await.unwrap();
    eventually("writes on the last primary", || async {
        (second.run::<u64>("SCARD numbers").await.unwrap() > begun + 200).then_some(())
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    let (acknowledged, longest_gap) = writer.await.unwrap();
    println!("handovers took {took:?}; longest gap between acknowledged writes {longest_gap:?}");
    let kept: BTreeSet<u64> = second.run("SMEMBERS numbers").await.unwrap();
    let lost: Vec<_> = acknowledged.difference(&kept).collect();
    assert!(lost.is_empty(), "lost {} of {}: {lost:?}", lost.len(), acknowledged.len());
    assert!(acknowledged.len() > 800, "{}", acknowledged.len());
    assert!(longest_gap < GAP_MAX, "{longest_gap:?}");
}

#[tokio::test]
async fn a_handover_to_a_replica_that_cannot_catch_up_fails_and_the_primary_goes_on() {
    let pair = Pair::start().await;
    let [primary, replica] = &pair.members;
    let proxy = Proxy::to(primary.port).await;
    let (_link, look) = replica.linked().await;
    let through = Endpoint { host: "127.0.0.1".to_owned(), port: proxy.port, node: None };
    pair.agents[1].attach(&replica.process(&look), &crate::agent::brief(1, primary), &through).await.unwrap();
    replica.in_sync().await;
    // Replication stalls, and both ends still believe in it.
    proxy.deafen();
    primary.run::<String>("SET key value").await.unwrap();
    let (link, _) = link_to(Target { port: proxy.port, ..primary.target() }, OPERATOR_PASSWORD);
    let outcome = pair.hand_over_through(&link, 2, 0, 1, 200).await;
    assert!(matches!(&outcome, Outcome::Failed(why) if why.contains("goes on")), "{outcome:?}");
    assert_eq!(
        (primary.field("role").await.as_str(), replica.field("role").await.as_str()),
        ("master", "slave")
    );
    let again = Instant::now();
    assert_eq!(primary.run::<String>("SET key again").await.unwrap(), "OK");
    assert!(again.elapsed() < Duration::from_secs(1), "writes are not paused any more");
}

#[tokio::test]
async fn a_handover_between_servers_that_are_no_pair_is_superseded() {
    let pair = Pair::start().await;
    let reversed = pair.hand_over(2, 1, 0, 500).await;
    assert!(matches!(&reversed, Outcome::Superseded(why) if why.contains("not a primary")), "{reversed:?}");
    let replica = &pair.members[1];
    let (look, from_look) = (present(&pair.links[1]).await, present(&pair.links[0]).await);
    signal(replica.server_pid().await, "STOP");
    let (from, to) = (pair.members[0].process(&from_look), replica.process(&look));
    let from = valkeeper::command::Side { agent: &pair.agents[0], link: &pair.links[0], server: &from };
    let to = valkeeper::command::Side { agent: &pair.agents[1], link: &pair.links[1], server: &to };
    let frozen = valkeeper::command::handover(&from, &to, &crate::agent::brief(2, replica), 0, 500).await;
    assert!(matches!(&frozen, Outcome::Superseded(why) if why.contains("does not answer")), "{frozen:?}");
    assert_eq!(pair.members[0].run::<String>("SET key value").await.unwrap(), "OK");
}

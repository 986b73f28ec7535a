//! Commands through agents: their preconditions, that what they report has happened, and whom agents obey.

use crate::{
    agent::{Member, Operator, Pair, Pki, at, brief},
    server::{eventually, present, signal},
};
use std::time::Duration;
use valkeeper::agents::{CallError, Paused};
use valkeeper_core::{
    ids::{ReplId, WriterEpoch},
    observation::{Observed, ServerProcess, Why},
};

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, CallError>) {
    assert!(matches!(answer, Err(CallError::Refused(_))), "{answer:?}");
}

#[tokio::test]
async fn a_promotion_whose_precondition_no_longer_holds_is_refused() {
    let Pair { members: [one, two], agents, .. } = &Pair::start().await;
    let (_link, look) = two.linked().await;
    let (process, grant) = (two.process(&look), brief(2, two));
    let other = "f".repeat(40);
    let stranger = valkeeper_core::effect::Server { run_id: other.clone(), ..process.clone() };
    refused(agents[1].promote(&stranger, &grant, &at(&look), 0).await);
    let history = Paused { replid: ReplId(other), ..at(&look) };
    refused(agents[1].promote(&process, &grant, &history, 0).await);
    let ahead = Paused { offset: look.offset + 1_000_000, ..at(&look) };
    refused(agents[1].promote(&process, &grant, &ahead, 0).await);
    refused(agents[1].promote(&process, &grant, &at(&look), 7).await);
    refused(agents[1].promote(&process, &brief(0, two), &at(&look), 0).await);
    assert_eq!((one.field("role").await.as_str(), two.field("role").await.as_str()), ("master", "slave"));
}

#[tokio::test]
async fn a_promotion_is_verified_and_keeps_the_old_history_as_the_second() {
    let Pair { members: [one, two], agents, operator, .. } = &Pair::start().await;
    let (link, before) = two.linked().await;
    signal(one.server_pid().await, "KILL");
    agents[1].promote(&two.process(&before), &brief(2, two), &at(&before), 0).await.unwrap();
    let after = present(&link).await;
    assert_eq!((&after.run_id, &after.replid2), (&before.run_id, &Some(before.replid.clone())));
    assert_eq!(two.run::<String>("SET key value").await.unwrap(), "OK");
    agents[1].check();
    eventually("the grant in the agent's words", || async {
        operator.facts(two).filter(|facts| facts.brief.grant.0 == 2 && facts.brief.holder == Some(two.id))
    })
    .await;
}

#[tokio::test]
async fn disconnecting_ends_every_client_but_not_the_operators_link_nor_replication() {
    let Pair { members: [one, two], agents, .. } = &Pair::start().await;
    let mut app = one.app().await;
    let (link, wake) = one.link();
    let look = present(&link).await;
    let stranger = valkeeper_core::effect::Server { run_id: "0".repeat(40), ..one.process(&look) };
    refused(agents[0].disconnect(&stranger).await);
    assert!(redis::cmd("PING").query_async::<String>(&mut app).await.is_ok());
    agents[0].disconnect(&one.process(&look)).await.unwrap();
    assert!(redis::cmd("PING").query_async::<String>(&mut app).await.is_err());
    assert_eq!(present(&link).await.replicas_online, 1);
    assert_eq!(two.field("master_link_status").await, "up");
    let woken = tokio::time::timeout(Duration::ZERO, wake.notified()).await;
    assert!(woken.is_err(), "the operator's own connection stays");
}

#[tokio::test]
async fn a_lower_epoch_is_refused_by_whoever_knows_a_higher_one() {
    let Pair { pki, members: [one, two], agents, operator, .. } = &Pair::start().await;
    let (_link, look) = two.linked().await;
    let newer = Operator::new(pki, 7);
    newer.reach(two).await;
    let answer = agents[1].promote(&two.process(&look), &brief(9, two), &at(&look), 0).await;
    assert!(matches!(&answer, Err(CallError::Deposed { by: WriterEpoch(7), .. })), "{answer:?}");
    assert_eq!(operator.board().deposed(), Some(WriterEpoch(7)));
    assert_eq!((one.field("role").await.as_str(), two.field("role").await.as_str()), ("master", "slave"));
    let late = Operator::new(pki, 3);
    late.dial(two).settled().await;
    assert_eq!(late.board().deposed(), Some(WriterEpoch(7)), "a greeting is refused as well");
}

#[tokio::test]
async fn an_agent_of_another_authority_is_not_listened_to_nor_does_it_listen() {
    let ours = Pki::new();
    let stranger = Member::start(&Pki::new(), 0).await;
    let operator = Operator::new(&ours, 1);
    let link = operator.dial(&stranger);
    link.settled().await;
    assert_eq!(operator.board().facts(stranger.id), Observed::Unknown(Why::Silent));
    let (_link, look) = stranger.linked().await;
    let answer = link.promote(&stranger.process(&look), &brief(1, &stranger), &at(&look), 0).await;
    assert!(matches!(answer, Err(CallError::Failed(_))), "{answer:?}");
    assert_eq!(stranger.field("role").await, "slave");
}

#[tokio::test]
async fn a_fence_ends_a_frozen_server_and_another_holds_at_the_gate() {
    let Pair { members: [one, _two], agents, operator, .. } = &Pair::start().await;
    let (_link, look) = one.linked().await;
    let process = one.process(&look);
    signal(one.server_pid().await, "STOP");
    agents[0].check();
    let stranger = valkeeper_core::effect::Server { run_id: "0".repeat(40), ..process.clone() };
    refused(agents[0].fence(&stranger).await);
    agents[0].fence(&process).await.unwrap();
    agents[0].check();
    eventually("the word that it has ended", || async {
        operator.board().has_exited(one.id, &process.run_id).then_some(())
    })
    .await;
    one.app().await;
    let (_link, after) = one.linked().await;
    assert_ne!(after.run_id, process.run_id);
    assert_eq!(one.field("role").await, "slave");
    agents[0].check();
    let facts = eventually("a server that runs", || async {
        agents[0].check();
        operator
            .facts(one)
            .filter(|facts| facts.server == ServerProcess::Running && facts.run_id == after.run_id)
    })
    .await;
    assert_eq!(facts.brief.holder, Some(one.id), "the grant is remembered");
}

#[tokio::test]
async fn a_renewed_certificate_is_served_without_a_restart() {
    let pki = Pki::new();
    let member = Member::start(&pki, 0).await;
    let operator = Operator::new(&pki, 1);
    let link = operator.reach(&member).await;
    let before = operator.facts(&member).unwrap().certificate;
    let (_server, look) = member.linked().await;
    member.renew(&pki);
    eventually("another certificate in the agent's words", || async {
        link.check();
        operator.facts(&member).filter(|facts| facts.certificate.thumbprint != before.thumbprint)
    })
    .await;
    let fresh = Operator::new(&pki, 2);
    fresh.reach(&member).await;
    let (_server, after) = member.linked().await;
    assert_eq!(after.run_id, look.run_id);
}

//! What the closed port of a node at the gate keeps out, with every user there from the start: clients, replicas, keys and slots of others.

use super::{
    NOTHING, SNAPSHOTS,
    cluster::{EPOCH, TAKES_KEYS},
    support::{Member, Shard, eventually, signal},
};
use std::{io::ErrorKind, net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
};
use tonic::Code;
use valkeeper_agent::proto::{self, Promotion};
use valkeeper_core::slots::SlotSet;

const KEYS: usize = 100;
/// Slot of `{a}`.
const SLOT: u16 = 15_495;
/// An application with a password of its own.
const APP: &str = "user app on >of-the-app ~* &* +@all";
/// Between two dials.
const KNOCK_PAUSE: Duration = Duration::from_millis(1);
const LOGS_IN: &[u8] = b"AUTH app of-the-app\r\n";

impl Shard {
    /// A primary with keys and a replica, and another primary that has a key.
    async fn three() -> Shard {
        let shard = Shard::with_nodes(3, NOTHING);
        shard.begin(0, 5, "0-8191").await;
        shard.begin(1, 5, "8192-16383").await;
        shard.meet(0, &shard.members[1]).await;
        shard.at_gate(2, EPOCH).await;
        shard.meet(0, &shard.members[2]).await;
        shard.follow(2, 0, 5).await;
        let [first, second, replica] = [0, 1, 2].map(|ordinal| &shard.members[ordinal]);
        for member in [second, first] {
            eventually("a node that serves", || async {
                let served = member.run::<String>("CLUSTER INFO").await.unwrap();
                served.contains("cluster_state:ok").then_some(())
            })
            .await;
        }
        for n in 0..KEYS {
            // Of the first one's slots.
            let _: () = first.run(&format!("SET {{b}}{n} value")).await.unwrap();
        }
        let _: () = second.run("SET {a}key value").await.unwrap();
        eventually("all of the keys", || async { (replica.keys().await == KEYS).then_some(()) }).await;
        shard
    }
}

impl Member {
    /// From its next start on the application may log in, and others may bring keys.
    fn add_users(&self) {
        let path = self.dir.join("users.acl");
        let users = std::fs::read_to_string(&path).unwrap();
        let replica = "+psync +replconf";
        assert!(users.contains(replica), "{users}");
        let users = users.replace(replica, &format!("{replica} {TAKES_KEYS}"));
        std::fs::write(&path, format!("{users}{APP}\n")).unwrap();
    }

    /// Dials its port again and again until it is told to end. How often nobody was there, and what those were answered that got in.
    async fn knock(&self, mut ended: watch::Receiver<bool>) -> (usize, Vec<String>) {
        let (mut refusals, mut answers) = (0, Vec::new());
        while !*ended.borrow_and_update() {
            let mut answer = [0; 64];
            match TcpStream::connect(SocketAddr::new(self.ip, self.port)).await {
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
                    refusals += 1;
                }
                Ok(mut stream) => {
                    stream.write_all(LOGS_IN).await.unwrap();
                    let length = stream.read(&mut answer).await.unwrap();
                    answers.push(String::from_utf8_lossy(&answer[..length]).into_owned());
                }
            }
            tokio::time::sleep(KNOCK_PAUSE).await;
        }
        (refusals, answers)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_gets_into_a_node_at_the_gate_and_everybody_does_when_it_is_opened() {
    let shard = Shard::three().await;
    let [first, second, replica] = [0, 1, 2].map(|ordinal| &shard.members[ordinal]);
    first.add_users();
    let server = first.server_pid().await;
    signal(server, "KILL");
    shard.at_gate(0, EPOCH).await;
    assert_eq!(first.mark().await, Some("blank"));

    let (end, ended) = watch::channel(false);
    let gated = async {
        // As its node is the primary still, its replica tries to synchronise.
        let tries = || replica.log().matches("Connecting to PRIMARY").count();
        let before = tries();
        eventually("two tries to synchronise", || async { (tries() >= before + 2).then_some(()) }).await;
        assert_eq!((first.keys().await, replica.keys().await), (0, KEYS));
        let sent = format!("MIGRATE {} {} {{a}}key 0 1000 AUTH2 replica of-replicas", first.ip, first.port);
        let refused = second.run::<String>(&sent).await.unwrap_err();
        assert!(refused.to_string().contains("IOERR"), "{refused}");
        let whole: SlotSet = SLOT.to_string().parse().unwrap();
        let handed = format!("CLUSTER MIGRATESLOTS SLOTSRANGE {SLOT} {SLOT} NODE {}", first.node().await.id);
        second.run::<()>(&handed).await.unwrap();
        let job = eventually("a job that failed", || async {
            let jobs: Vec<Vec<redis::Value>> = second.run("CLUSTER GETSLOTMIGRATIONS").await.unwrap();
            let told = format!("{jobs:?}");
            told.contains("failed").then_some(told)
        })
        .await;
        assert!(job.contains("onnect"), "{job}");
        assert!(whole.without(&second.node().await.slots).is_empty(), "the slot stays where it was");
        assert_eq!((second.keys().await, first.keys().await), (1, 0));
        // All of this at the gate, with users that could log in.
        assert!(first.connection("default").await.is_some(), "by the socket");
        assert_eq!((first.mark().await, first.field("tcp_port").await.as_str()), (Some("blank"), "0"));
        end.send_replace(true);
    };
    let ((refusals, answers), ()) = tokio::join!(first.knock(ended), gated);
    println!("{refusals} refusals at the gate");
    assert!(refusals > 100 && answers.is_empty(), "{refusals} refusals and {answers:?}");

    // Its replica takes over, and then it is opened: from the first connection on the right password is right.
    shard.promote_by(2, 6, Promotion::Takeover).await.unwrap();
    let (end, ended) = watch::channel(false);
    let opened = async {
        shard.follow(0, 2, 6).await;
        end.send_replace(true);
    };
    let ((refusals, answers), ()) = tokio::join!(first.knock(ended), opened);
    println!("{refusals} refusals and then {} answers", answers.len());
    assert!(!answers.is_empty() && answers.iter().all(|answer| answer == "+OK\r\n"), "{answers:?}");
    assert_eq!((first.mark().await, first.keys().await), (None, KEYS));
    let mut client = first.client().await.expect("the users of before");
    let moved = redis::cmd("GET").arg("{a}key").query_async::<String>(&mut client).await.unwrap_err();
    assert_eq!(moved.code(), Some("MOVED"));
}

#[tokio::test]
async fn a_port_that_somebody_closes_is_no_gate_and_is_opened_again() {
    let shard = Shard::with_nodes(1, SNAPSHOTS);
    shard.begin(0, 5, "0-16383").await;
    let member = &shard.members[0];
    member.fill(10).await;
    let mut client = member.client().await.unwrap();
    let server = member.server_pid().await;
    let () = redis::cmd("CONFIG").arg("SET").arg("port").arg(0).query_async(&mut client).await.unwrap();
    // Whoever is connected goes on writing: this must never be taken for a server that nobody has written to.
    let () = redis::cmd("SET").arg("key:0").arg("other").query_async(&mut client).await.unwrap();
    assert_eq!(member.mark().await, None);
    eventually("a port that is open again", || member.client()).await;
    let state = shard.greet(0, EPOCH, "").await;
    assert_eq!((state.gate.as_str(), member.server_pid().await), ("commanded", server));
}

#[tokio::test]
async fn a_role_that_is_not_settled_opens_nothing() {
    let shard = Shard::with_nodes(2, NOTHING);
    shard.begin(0, 5, "0-16383").await;
    shard.at_gate(1, EPOCH).await;
    let member = &shard.members[1];
    shard.meet(0, member).await;
    let request = proto::AttachRequest {
        epoch: EPOCH,
        brief: Some(shard.brief(5, 0, 0)),
        run_id: member.field("run_id").await,
        node_id: "0".repeat(40),
        ..proto::AttachRequest::default()
    };
    let nobodys = shard.agent(1).await.attach(request.clone()).await.unwrap_err();
    assert!(nobodys.message().contains("Unknown node"), "{nobodys}");
    let another = proto::AttachRequest { run_id: "0".repeat(40), ..request.clone() };
    assert_eq!(shard.agent(1).await.attach(another).await.unwrap_err().code(), Code::FailedPrecondition);
    let first = &shard.members[0];
    let (host, port) = (first.ip.to_string(), u32::from(first.port));
    let address = proto::AttachRequest { node_id: String::new(), host, port, ..request };
    assert_eq!(shard.agent(1).await.attach(address).await.unwrap_err().code(), Code::InvalidArgument);
    // Nor is it let in anywhere.
    let primaryauth: Vec<String> = member.run("CONFIG GET primaryauth").await.unwrap();
    assert_eq!(primaryauth, ["primaryauth", "valkeeper-gate"]);
    assert_eq!((member.mark().await, member.client().await.is_some()), (Some("blank"), false));
    shard.follow(1, 0, 5).await;
    assert!(member.mark().await.is_none() && member.client().await.is_some());
}

//! Clients at the address where a shard's primary was, in that moment and after it.

use super::{
    NOTHING, hand_over,
    support::{Member, PATIENCE, Shard, eventually, signal},
};
use redis::{AsyncCommands, aio::MultiplexedConnection};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

/// How long clients are passed on, with room for a busy machine.
const PASSED_ON_MAX: Duration = Duration::from_secs(8);

/// Clients whose writes come one after the other through a handover.
const WRITERS: u32 = 800;
/// Between two of them: several come between two commands of the agent.
const WRITERS_EVERY: Duration = Duration::from_micros(200);

/// Connects as soon as somebody listens.
async fn client(member: &Member) -> MultiplexedConnection {
    eventually("a client that is served", || member.client()).await
}

/// One command over a bare connection; what came back, empty if nothing did.
async fn says(stream: &mut TcpStream, command: &str) -> String {
    let mut answer = [0; 512];
    if stream.write_all(command.as_bytes()).await.is_err() {
        return String::new();
    }
    let read = tokio::time::timeout(PATIENCE, stream.read(&mut answer)).await.unwrap();
    String::from_utf8_lossy(&answer[..read.unwrap_or(0)]).into_owned()
}

#[tokio::test]
async fn clients_of_an_old_primary_write_to_the_new_one_and_never_hear_of_a_replica() {
    let shard = Shard::start(2, NOTHING);
    shard.serve(1, 5, 0).await;
    let [old, new] = [&shard.members[0], &shard.members[1]];
    let before = client(old).await;
    // A client's own connection through the handover: it waits, is ended, and comes back to the same address.
    let writer = tokio::spawn({
        let (ip, port) = (old.ip, old.port);
        async move {
            let (mut errors, mut gap, mut last, begun) =
                (Vec::new(), Duration::ZERO, Instant::now(), Instant::now());
            let mut stream = None;
            let mut number = 0;
            while begun.elapsed() < Duration::from_secs(2) {
                if stream.is_none() {
                    stream = TcpStream::connect((ip, port)).await.ok();
                }
                let Some(open) = &mut stream else { continue };
                let answer = says(open, &format!("SET counter {}\r\n", number + 1)).await;
                if answer == "+OK\r\n" {
                    number += 1;
                    gap = gap.max(last.elapsed());
                    last = Instant::now();
                } else {
                    errors.push(answer);
                    stream = None;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            (number, errors, gap, last.elapsed())
        }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let run_id = old.field("run_id").await;
    println!("writes waited {:?}", hand_over(&shard, 9).await);
    assert_eq!(old.page("/readyz").await.unwrap(), (503, "its clients are passed on\n".to_owned()));
    let mut passed = client(old).await;
    let (_, metrics) = old.page("/metrics").await.unwrap();
    let taken = |l: &str| l.strip_prefix("valkeeper_agent_relayed_connections_total ").map(str::to_owned);
    assert!(metrics.lines().any(|l| l == "valkeeper_agent_relaying 1"), "{metrics}");
    assert!(metrics.lines().filter_map(taken).any(|n| n.parse::<u64>().unwrap() > 0), "{metrics}");
    let role: Vec<redis::Value> = redis::cmd("ROLE").query_async(&mut passed).await.unwrap();
    assert_eq!(role[0], redis::Value::BulkString(b"master".to_vec()));
    let _: () = passed.set("key", "value").await.unwrap();
    assert_eq!(new.run::<String>("GET key").await.unwrap(), "value");
    drop(before);
    let (number, errors, gap, since) = writer.await.unwrap();
    println!("{number} writes, longest gap {gap:?}, errors {errors:?}");
    assert!(errors.iter().all(String::is_empty) && errors.len() <= 1, "{errors:?}");
    assert!(since < Duration::from_millis(500));
    assert_eq!(new.run::<i64>("GET counter").await.unwrap(), number);

    // Then the port is the replica's again, and whoever was passed on has to look for the primary itself.
    let begun = Instant::now();
    eventually("the end of what is passed on", async || {
        passed.get::<_, String>("key").await.is_err().then_some(())
    })
    .await;
    let mut later = client(old).await;
    assert!(begun.elapsed() < PASSED_ON_MAX, "{:?}", begun.elapsed());
    let refused = later.set::<_, _, ()>("key", "other").await.unwrap_err();
    assert_eq!(refused.code(), Some("READONLY"));
    eventually("the end of who goes on writing to a replica", async || {
        later.set::<_, _, ()>("key", "other").await.is_err_and(|error| error.code().is_none()).then_some(())
    })
    .await;
    eventually("its log", async || old.log().contains("are sent away").then_some(())).await;
    let mut later = client(old).await;
    assert_eq!(old.field("run_id").await, run_id);
    assert_eq!(later.get::<_, String>("key").await.unwrap(), "value");
}

/// Writes of clients that were connected before come all the time: each is done, or ends with its connection.
#[tokio::test]
async fn no_write_of_many_clients_is_told_of_a_replica() {
    let shard = Shard::start(2, NOTHING);
    shard.serve(1, 5, 0).await;
    let old = &shard.members[0];
    drop(client(old).await);
    let mut streams = Vec::new();
    for _ in 0..WRITERS {
        let mut stream = TcpStream::connect((old.ip, old.port)).await.unwrap();
        assert_eq!(says(&mut stream, "PING\r\n").await, "+PONG\r\n");
        streams.push(stream);
    }
    // A thread of its own: a timer of the runtime is as coarse as the whole handover.
    let writers = tokio::task::spawn_blocking(move || {
        for stream in &streams {
            let begun = Instant::now();
            // What cannot be sent any more was ended.
            let _ = stream.try_write(b"INCR writes\r\n");
            while begun.elapsed() < WRITERS_EVERY {
                std::hint::spin_loop();
            }
        }
        streams
    });
    hand_over(&shard, 9).await;
    let (mut done, mut ended, mut told) = (0, 0, Vec::new());
    for mut stream in writers.await.unwrap() {
        match says(&mut stream, "").await {
            answer if answer.is_empty() => ended += 1,
            answer if answer.starts_with(':') => done += 1,
            other => told.push(other),
        }
    }
    println!("{done} done, {ended} ended, told {}", told.len());
    assert!(told.is_empty(), "{told:?}");
    assert!(ended > 0, "the handover was after all of them");
    assert_eq!(shard.members[1].run::<i64>("GET writes").await.unwrap(), done);
}

#[tokio::test]
async fn who_comes_to_a_dead_primary_is_held_until_there_is_another() {
    let shard = Shard::start(3, NOTHING);
    shard.serve(1, 5, 0).await;
    let [old, new] = [&shard.members[0], &shard.members[1]];
    signal(old.server_pid().await, "KILL");
    eventually("the relay", async || old.log().contains("are passed on to the primary").then_some(())).await;
    let promotion = shard.promotion(1, 1, 9, 0).await;
    let mut held = TcpStream::connect((old.ip, old.port)).await.unwrap();
    let other = tokio::spawn(async move { (says(&mut held, "SET key value\r\n").await, held) });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!other.is_finished(), "nobody is primary");
    shard.agent(1).await.promote(promotion).await.unwrap();
    let (answer, mut held) = other.await.unwrap();
    assert_eq!(answer, "+OK\r\n");
    assert_eq!(new.run::<String>("GET key").await.unwrap(), "value");
    // As the operator does next: the old one follows, and still its clients are passed on.
    shard.attach(0, 1, 1, 9, 0).await;
    assert_eq!(says(&mut held, "SET key more\r\n").await, "+OK\r\n");
    // A higher grant of another's ends it.
    shard.promote(2, 1, 12, 0).await;
    let until = Instant::now() + PASSED_ON_MAX;
    while says(&mut held, "SET key lost\r\n").await == "+OK\r\n" {
        assert!(Instant::now() < until, "it goes on under the lower grant");
    }
    let mut next = client(old).await;
    let _: () = next.set("key", "third").await.unwrap();
    assert_eq!(shard.members[2].run::<String>("GET key").await.unwrap(), "third");
}

#[tokio::test]
async fn what_a_member_passes_on_is_not_passed_on_again() {
    let shard = Shard::start(2, NOTHING);
    shard.serve(1, 5, 0).await;
    let [old, new] = [&shard.members[0], &shard.members[1]];
    hand_over(&shard, 9).await;
    client(old).await;
    // As if it came from the other member's relay.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(new.ip, 0)).unwrap();
    let mut stream = socket.connect(SocketAddr::new(old.ip, old.port)).await.unwrap();
    assert_eq!(says(&mut stream, "PING\r\n").await, "", "the connection is ended");
}

#[tokio::test]
async fn a_port_is_closed_until_its_server_has_left_the_gate() {
    let shard = Shard::start(1, NOTHING);
    shard.at_gate(0, 1).await;
    let member = &shard.members[0];
    let refused = TcpStream::connect((member.ip, member.port)).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    shard.promote(0, 1, 5, 0).await;
    let mut open = member.client().await.expect("open when the promotion is done");
    let _: () = open.set("key", "value").await.unwrap();
    let _: () = member.run("SAVE").await.unwrap();
    signal(member.server_pid().await, "KILL");
    shard.at_gate(0, 1).await;
    assert!(TcpStream::connect((member.ip, member.port)).await.is_err());
}

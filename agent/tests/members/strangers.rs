//! Connections that say nothing, or too many, at the port of an agent.

use super::{NOTHING, Shard};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::net::TcpSocket;

/// Far less than a handshake's own bound of two seconds, which strangers hold theirs for.
const AT_ONCE: Duration = Duration::from_millis(1_000);

#[tokio::test]
async fn strangers_that_say_nothing_keep_neither_the_operator_nor_a_peer_out() {
    let shard = Shard::start(2, NOTHING);
    shard.serve(1, 5, 0).await;
    let member = &shard.members[1];
    let to = SocketAddr::new(member.ip, member.port + 1);
    let mut silent = Vec::new();
    for _ in 0..300 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
        silent.push(socket.connect(to).await.unwrap());
    }
    let begun = Instant::now();
    let greeted = shard.try_agent(&shard.operator, 1).await;
    assert!(greeted.is_some() && begun.elapsed() < AT_ONCE, "after {:?}", begun.elapsed());
}

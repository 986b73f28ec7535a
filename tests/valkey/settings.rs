//! The table of directives that change while a server runs, against the server: what it has by itself, and that it takes it.

use crate::server::Server;
use valkeeper_core::config::{DIRECTIVES, Directive, Owner, ServerVersion};

/// What the server can take while it runs and is not told so: the operator decides by it, the agent sets it, or it is another's name.
const NOT_LIVE: [&str; 6] = [
    "commandlog-execution-slower-than",
    "commandlog-slow-execution-max-len",
    "io-threads",
    "lua-time-limit",
    "min-replicas-max-lag",
    "min-replicas-to-write",
];

#[tokio::test]
async fn every_live_directive_has_the_default_of_the_table_and_takes_it_and_no_other_does() {
    // None of its own configuration is a live directive.
    let server = Server::start("").await;
    let version: ServerVersion = server.field("valkey_version").await.parse().unwrap();
    let mut app = server.app().await;
    let mut wrong = Vec::new();
    let of_user = DIRECTIVES.iter().filter(|d| d.is_in(version) && d.owner == Owner::User);
    for Directive { name, live, .. } in of_user {
        // By name: `*` leaves out some.
        let has: Vec<String> = server.run(&format!("CONFIG GET {name}")).await.unwrap();
        let Some(found) = has.get(1) else {
            wrong.push(format!("{name}: the server does not know it"));
            continue;
        };
        let told: redis::RedisResult<String> =
            redis::cmd("CONFIG").arg("SET").arg(name).arg(found).query_async(&mut app).await;
        match (live, told) {
            // It reads the one word and answers with the other.
            (Some(default), Ok(_)) if found.replace(" slave ", " replica ") == *default => {}
            (None, Err(_)) => {}
            (None, Ok(_)) if NOT_LIVE.contains(name) => {}
            (live, told) => wrong.push(format!("{name}: {found:?}, by the table {live:?}; told {told:?}")),
        }
    }
    assert!(wrong.is_empty(), "Valkey {version}:\n{}", wrong.join("\n"));
}

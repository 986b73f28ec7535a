//! Effects on servers. Each is sent once, on the connection that is held when it begins: its precondition is checked
//! there, and what it brought about is looked at there. A connection that breaks in between makes it fail; nothing is
//! repeated on another connection, which may lead to another process or come from another epoch.

use super::{
    Error, MemberLink,
    connection::Connection,
    parse::{Handover, Look, RawRole, RawSource},
};
use redis::{Cmd, Value, cmd};
use std::time::Duration;
use tokio::time::Instant;
use valkeeper_core::{effect::Outcome, ids::ReplId, observation::Link};

/// Bound on one command and on each check before and after it. Longer than the stall of a fork, shorter than the
/// default detection window of 3 s.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(1);

/// Between two looks while waiting for what a command brings about: a handover takes some 7 ms, so this costs
/// less than a third of it.
const POLL_PAUSE: Duration = Duration::from_millis(2);

/// What a handover may take beyond its own timeout, for the two servers to swap roles.
const HANDOVER_MARGIN: Duration = Duration::from_secs(1);

/// Why an effect ended before it was verified.
enum Stop {
    /// Nothing was sent.
    Superseded(String),
    /// Something was sent.
    Failed(String),
}

impl From<Stop> for Outcome {
    fn from(stop: Stop) -> Outcome {
        match stop {
            Stop::Superseded(why) => Outcome::Superseded(why),
            Stop::Failed(why) => Outcome::Failed(why),
        }
    }
}

/// A server whose precondition has been checked.
struct Checked {
    connection: Connection,
    look: Look,
}

impl MemberLink {
    /// `REPLICAOF NO ONE`, if the process `run_id` is still a replica on history `replid` at `offset` or further, and
    /// has its data set in memory.
    pub async fn promote(&self, run_id: &str, replid: &ReplId, offset: i64) -> Outcome {
        outcome(self.try_promote(run_id, replid, offset).await)
    }

    /// `REPLICAOF` the address, if the process is still `run_id`. Verified when it names that source as its own; the
    /// synchronisation goes on after that.
    pub async fn attach(&self, run_id: &str, to_host: &str, to_port: u16) -> Outcome {
        outcome(self.try_attach(run_id, to_host, to_port).await)
    }

    /// `FAILOVER TO` from this primary to its replica `to`, which has `timeout_ms` to catch up while writes wait.
    /// Verified when the two have swapped roles. Never forced: at worst the primary goes on as before.
    pub async fn handover(&self, run_id: &str, to: &MemberLink, to_run_id: &str, timeout_ms: u32) -> Outcome {
        outcome(self.try_handover(run_id, to, to_run_id, timeout_ms).await)
    }

    /// `CLIENT KILL TYPE normal`, sparing the connection it comes on: clients look for the primary again. Replication
    /// links are of another type and stay.
    pub async fn disconnect_clients(&self, run_id: &str) -> Outcome {
        outcome(self.try_disconnect_clients(run_id).await)
    }

    async fn try_promote(&self, run_id: &str, replid: &ReplId, offset: i64) -> Result<(), Stop> {
        let Checked { connection, look } = self.checked(run_id).await?;
        if look.role == RawRole::Primary {
            return Err(Stop::Superseded("it is a primary already".to_owned()));
        }
        if look.loading {
            return Err(Stop::Superseded("it is loading its data set".to_owned()));
        }
        if is_syncing(&look.role) {
            return Err(Stop::Superseded("it is being synchronised and has no complete data set".to_owned()));
        }
        if look.replid != *replid {
            return Err(Stop::Superseded(format!("it is on history {}, not {replid}", look.replid)));
        }
        if look.offset < offset {
            return Err(Stop::Superseded(format!("it is at offset {}, not at {offset}", look.offset)));
        }
        send::<Value>(&connection, cmd("REPLICAOF").arg("NO").arg("ONE")).await?;
        verify(&connection, |look| look.role == RawRole::Primary, "it is not a primary").await
    }

    async fn try_attach(&self, run_id: &str, to_host: &str, to_port: u16) -> Result<(), Stop> {
        let Checked { connection, look: _ } = self.checked(run_id).await?;
        send::<Value>(&connection, cmd("REPLICAOF").arg(to_host).arg(to_port)).await?;
        let wanted = RawSource { host: to_host.to_owned(), port: to_port };
        verify(&connection, |look| follows(&look.role, &wanted), "it does not follow that address").await
    }

    async fn try_handover(
        &self,
        run_id: &str,
        to: &MemberLink,
        to_run_id: &str,
        timeout_ms: u32,
    ) -> Result<(), Stop> {
        let from = self.checked(run_id).await?;
        let replica = to.checked(to_run_id).await?;
        if from.look.role != RawRole::Primary {
            return Err(Stop::Superseded("it is not a primary any more".to_owned()));
        }
        let of_this = RawSource { host: self.target().address.to_string(), port: self.target().port };
        if !follows(&replica.look.role, &of_this) || link(&replica.look.role) != Some(Link::Up) {
            return Err(Stop::Superseded("the other is not a linked replica of it".to_owned()));
        }
        let mut failover = cmd("FAILOVER");
        failover.arg("TO").arg(to.target().address.to_string()).arg(to.target().port);
        failover.arg("TIMEOUT").arg(timeout_ms);
        send::<Value>(&from.connection, &failover).await?;
        let until = Instant::now() + Duration::from_millis(timeout_ms.into()) + HANDOVER_MARGIN;
        swapped(&from.connection, &replica.connection, until).await
    }

    async fn try_disconnect_clients(&self, run_id: &str) -> Result<(), Stop> {
        let Checked { connection, look: _ } = self.checked(run_id).await?;
        let mut kill = cmd("CLIENT");
        kill.arg("KILL").arg("TYPE").arg("normal").arg("SKIPME").arg("yes");
        // The answer is the proof: the server counts what it has closed.
        send::<i64>(&connection, &kill).await?;
        Ok(())
    }

    /// The held connection, if the process at its other end is `run_id`.
    async fn checked(&self, run_id: &str) -> Result<Checked, Stop> {
        let member = self.target().member;
        let Some(connection) = self.held() else {
            return Err(Stop::Superseded(format!("no connection to {member} is held")));
        };
        let look = connection.look_within(COMMAND_TIMEOUT).await;
        let look = look.map_err(|error| Stop::Superseded(format!("could not check {member}: {error}")))?;
        if look.run_id != run_id {
            return Err(Stop::Superseded(format!(
                "{member} is another process: {}, not {run_id}",
                look.run_id
            )));
        }
        Ok(Checked { connection, look })
    }
}

fn outcome(result: Result<(), Stop>) -> Outcome {
    result.map_or_else(Outcome::from, |()| Outcome::Verified)
}

async fn send<T: redis::FromRedisValue>(connection: &Connection, command: &Cmd) -> Result<T, Stop> {
    connection.ask_within(COMMAND_TIMEOUT, command).await.map_err(|error| Stop::Failed(error.to_string()))
}

/// Looks until `holds`, for [`COMMAND_TIMEOUT`].
async fn verify(connection: &Connection, holds: impl Fn(&Look) -> bool, otherwise: &str) -> Result<(), Stop> {
    let until = Instant::now() + COMMAND_TIMEOUT;
    loop {
        let look = connection.look_within(COMMAND_TIMEOUT).await.map_err(|error| unverified(&error))?;
        if holds(&look) {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(Stop::Failed(format!("sent and accepted, but {otherwise}")));
        }
        tokio::time::sleep(POLL_PAUSE).await;
    }
}

/// Waits until the two have swapped roles. No `FAILOVER ABORT` when that takes too long: the replica may have taken over
/// just then, and the abort would make a second primary.
async fn swapped(from: &Connection, to: &Connection, until: Instant) -> Result<(), Stop> {
    loop {
        let old = from.look_within(COMMAND_TIMEOUT).await.map_err(|error| unverified(&error))?;
        let new = to.look_within(COMMAND_TIMEOUT).await.map_err(|error| unverified(&error))?;
        match (&old.role, &new.role) {
            (RawRole::Replica { .. }, RawRole::Primary) if old.handover == Handover::None => return Ok(()),
            (RawRole::Primary, RawRole::Replica { .. }) if old.handover == Handover::None => {
                return Err(Stop::Failed("the replica did not catch up; the primary goes on".to_owned()));
            }
            (RawRole::Primary | RawRole::Replica { .. }, RawRole::Primary | RawRole::Replica { .. }) => {}
        }
        if Instant::now() >= until {
            return Err(Stop::Failed(format!(
                "not finished in time; the old primary says {:?}",
                old.handover
            )));
        }
        tokio::time::sleep(POLL_PAUSE).await;
    }
}

fn unverified(error: &Error) -> Stop {
    Stop::Failed(format!("sent and accepted, but not verified: {error}"))
}

fn link(role: &RawRole) -> Option<Link> {
    match role {
        RawRole::Primary => None,
        RawRole::Replica { source: _, link } => Some(*link),
    }
}

fn is_syncing(role: &RawRole) -> bool {
    link(role) == Some(Link::Syncing)
}

fn follows(role: &RawRole, wanted: &RawSource) -> bool {
    match role {
        RawRole::Primary => false,
        RawRole::Replica { source, link: _ } => source == wanted,
    }
}

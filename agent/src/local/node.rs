//! What a server in Cluster mode is told: to become primary or to follow, by the words of Valkey Cluster, and only then to listen, which opens
//! its gate. `OK` does not mean done there, so everything is seen in what the node says afterwards.

use super::{COMMAND_TIMEOUT, Cmd, Error, FromRedisValue, Life, Local, Look, POLL_PAUSE, cmd};
use crate::{boot::PRIMARYAUTH_NOBODYS, election::Standing, shared::is_at_gate};
use std::time::Duration;
use tokio::time::Instant;
use valkeeper_core::{config::ServerVersion, ids::NodeId, info::RawSource, nodes::Nodes, slots::SlotSet};

/// For up to a second nodes of 8.0.1 hold a new replica for one of another shard (valkey-io/valkey#774). A primary that hands over to it
/// before that stays an empty primary, and one that dies does not start again, as its `nodes.conf` is corrupt to it. So there the link
/// comes up with the next try to log in, a second later.
const SHARD_KNOWN_AT_ONCE_FROM: ServerVersion = ServerVersion { major: 8, minor: 1 };

/// Between two requests for a vote: a refused one is not repeated by the server itself for four times the node timeout.
const FORCE_PAUSE: Duration = Duration::from_millis(100);
/// Bound on a promotion by vote, which takes 3 to 15 ms where it can succeed: past it others are asked anew who may vote.
const FORCE_TIMEOUT: Duration = Duration::from_millis(300);
/// Bound on a planned handover, in which the old primary pauses its writes: what the server is given for one, which the operator plans with,
/// after the last request. Whoever is told that it came to nothing shall not see it won later.
const HANDOVER_TIMEOUT: Duration = Duration::from_millis(3_500);
/// Between two requests for one. It takes 50 to 110 ms, three times as long beside pods that start; where a vote is refused (seen just after other shards' elections), the server itself
/// does nothing more before its writes have been paused for the whole time. So it is asked once more, and not again.
const HANDOVER_PAUSE: Duration = Duration::from_millis(500);
/// Between two tries to follow a node: gossip takes 22 to 47 ms to make a replica of an old primary, which refuses until then.
const REPLICATE_PAUSE: Duration = Duration::from_millis(10);

/// Cancels every job of the node that hands slots over, unless one has granted them: from then on the target takes them whatever becomes
/// of the job, and a plain `CANCELSLOTMIGRATIONS` lets clients write here until gossip says so. Those writes are acknowledged and lost
/// (two were, with 9.1.2). In the server nothing happens between the look and the word; a script that may write would wait there, as granted slots
/// are not written to.
const CANCEL_UNGRANTED: &str = "\
    for _, job in ipairs(redis.call('CLUSTER', 'GETSLOTMIGRATIONS')) do \
        local said = {} \
        for at = 1, #job, 2 do said[job[at]] = job[at + 1] end \
        if said.operation == 'EXPORT' and said.state == 'failover-granted' then return 'GRANTED' end \
    end \
    return redis.pcall('CLUSTER', 'CANCELSLOTMIGRATIONS')";

/// What became of jobs that were to be cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// None is left.
    All,
    /// None was cancelled: the slots of one are as good as the target's.
    Granted,
}

/// How a replica becomes primary.
pub struct Failover {
    option: Option<&'static str>,
    /// Between two requests.
    pause: Duration,
    /// No request is made later than this.
    last: Duration,
    timeout: Duration,
}

impl Failover {
    /// By vote.
    pub const FORCE: Failover =
        Failover { option: Some("FORCE"), pause: FORCE_PAUSE, last: FORCE_TIMEOUT, timeout: FORCE_TIMEOUT };
    /// Without.
    pub const TAKEOVER: Failover = Failover {
        option: Some("TAKEOVER"),
        pause: FORCE_PAUSE,
        last: COMMAND_TIMEOUT,
        timeout: COMMAND_TIMEOUT,
    };
    /// With the old primary, which begins anew when it is asked again, its writes paused all the while.
    pub const HANDOVER: Failover =
        Failover { option: None, pause: HANDOVER_PAUSE, last: HANDOVER_PAUSE, timeout: HANDOVER_TIMEOUT };
}

/// True of a node that is a primary to the others, whatever gate it is behind.
fn is_primary(look: &Look) -> bool {
    look.nodes.as_ref().is_some_and(|nodes| nodes.myself.primary.is_none())
}

/// The server that a decision was about. The next one is at the gate again, and none of this reaches it.
struct Server<'a> {
    local: &'a Local,
    life: Life,
}

impl Server<'_> {
    async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Error> {
        self.local.ask_of(Some(self.life), command).await
    }

    async fn look(&self) -> Result<Look, Error> {
        self.local.look_of(Some(self.life), COMMAND_TIMEOUT).await
    }

    /// Follows that node, seen to be done; paused clients go on and learn what it is now.
    async fn follow(&self, to: &NodeId) -> Result<Look, Error> {
        let begun = Instant::now();
        let mut refused = Error::Unverified("its node does not replicate that one");
        loop {
            let look = self.look().await?;
            if look.nodes.as_ref().is_some_and(|nodes| nodes.myself.primary.as_ref() == Some(to)) {
                self.ask::<()>(cmd("CLIENT").arg("UNPAUSE")).await?;
                return Ok(look);
            }
            if begun.elapsed() >= COMMAND_TIMEOUT {
                return Err(refused);
            }
            match self.ask::<()>(cmd("CLUSTER").arg("REPLICATE").arg(to.to_string())).await {
                Ok(()) => tokio::time::sleep(POLL_PAUSE).await,
                Err(error @ Error::Refused(_)) => {
                    refused = error;
                    tokio::time::sleep(REPLICATE_PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Lets a replica log in at its primary, and opens the gate if it is closed. The node's role is settled before that.
    async fn open(&self, look: Look) -> Result<Look, Error> {
        if is_at_gate(&look.info) {
            self.local.listen(self.life).await?;
            let is_open = |look: &Look| !is_at_gate(&look.info);
            return self.local.until_of(Some(self.life), is_open, "its gate is closed").await;
        }
        // Also where the gate is open: the last command may have come to its end before this.
        self.log_in_at_primary(&self.local.users.primaryauth()?).await?;
        Ok(look)
    }

    /// What a replica logs in at its primary with.
    async fn log_in_at_primary(&self, primaryauth: &str) -> Result<(), Error> {
        self.ask(cmd("CONFIG").arg("SET").arg("primaryauth").arg(primaryauth)).await
    }
}

impl Local {
    /// The process with this run id, and what it says.
    async fn server(&self, run_id: &str) -> Result<(Server<'_>, Look), Error> {
        let look = self.process(run_id).await?;
        Ok((Server { local: self, life: look.life }, look))
    }

    /// Makes the node primary, or waits for nothing if it is one, and opens the gate.
    pub(super) async fn promote_node(&self, run_id: &str, by: Option<Failover>) -> Result<Look, Error> {
        let begun = Instant::now();
        let (mut refused, mut due) = (Error::Unverified("its node is not a primary"), begun);
        let (server, mut look) = self.server(run_id).await?;
        loop {
            if is_primary(&look) {
                return server.open(look).await;
            }
            let Some(Failover { option, pause, last, timeout }) = &by else { return Err(refused) };
            if begun.elapsed() >= *timeout {
                return Err(refused);
            }
            if due <= Instant::now() && due <= begun + *last {
                due = Instant::now() + *pause;
                match server.ask::<()>(cmd("CLUSTER").arg("FAILOVER").arg(*option)).await {
                    Ok(()) => {}
                    Err(error @ Error::Refused(_)) => refused = error,
                    Err(error) => return Err(error),
                }
            }
            tokio::time::sleep(POLL_PAUSE).await;
            look = server.look().await?;
        }
    }

    /// Makes the node of the process with this `run_id` replicate another, unless it does, and opens the gate.
    pub async fn replicate(&self, run_id: &str, to: &NodeId) -> Result<Look, Error> {
        let (server, look) = self.server(run_id).await?;
        // Of another it would copy until it is told to follow this one.
        let follows_another = look
            .nodes
            .as_ref()
            .is_none_or(|nodes| nodes.myself.primary.as_ref().is_some_and(|primary| primary != to));
        let version = look.info.version.parse::<ServerVersion>().ok();
        let is_known_at_once = version.is_some_and(|version| version >= SHARD_KNOWN_AT_ONCE_FROM);
        let logs_in_first = is_at_gate(&look.info) && !follows_another && is_known_at_once;
        if logs_in_first {
            // Before it tries to log in for the first time: the next try is a second later.
            server.log_in_at_primary(&self.users.primaryauth()?).await?;
        }
        let followed = server.follow(to).await;
        if followed.is_err() && logs_in_first {
            // Whomever it replicates then, it must not copy anything.
            server.log_in_at_primary(PRIMARYAUTH_NOBODYS).await?;
        }
        server.open(followed?).await
    }

    /// Whether the node stands for election when its primary is lost.
    pub async fn stand_for_election(&self, standing: Standing) -> Result<(), Error> {
        let refrains = match standing {
            Standing::Stands => "no",
            Standing::Refrains => "yes",
        };
        self.ask(cmd("CONFIG").arg("SET").arg("cluster-replica-no-failover").arg(refrains)).await
    }

    /// `CLUSTER MEET`: accepted, and the rest is gossip's.
    pub async fn meet(&self, at: &RawSource) -> Result<(), Error> {
        self.ask(cmd("CLUSTER").arg("MEET").arg(&at.host).arg(at.port)).await
    }

    /// Config epoch of a node that has met nobody: any other refuses, and has one by itself in time.
    pub async fn set_config_epoch(&self, epoch: u64) -> Result<(), Error> {
        self.ask(cmd("CLUSTER").arg("SET-CONFIG-EPOCH").arg(epoch)).await
    }

    /// Slots that nobody owns, seen to be the node's.
    pub async fn add_slots(&self, slots: &SlotSet) -> Result<Look, Error> {
        let mut add = cmd("CLUSTER");
        add.arg("ADDSLOTSRANGE");
        for (first, last) in slots.runs() {
            add.arg(first).arg(last);
        }
        self.ask::<()>(&add).await?;
        // Who owned them before may have had a higher epoch, and others still believe in it.
        self.ask::<String>(cmd("CLUSTER").arg("BUMPEPOCH")).await?;
        let has = |nodes: &Nodes| slots.without(&nodes.myself.slots).is_empty();
        self.until(|look| look.nodes.as_ref().is_some_and(has), "its node does not have all of the slots")
            .await
    }

    /// `CLUSTER MIGRATESLOTS`: the job is accepted, and goes on by itself.
    pub async fn migrate_slots(&self, slots: &SlotSet, to: &NodeId) -> Result<(), Error> {
        let mut migrate = cmd("CLUSTER");
        migrate.arg("MIGRATESLOTS").arg("SLOTSRANGE");
        for (first, last) in slots.runs() {
            migrate.arg(first).arg(last);
        }
        self.ask(migrate.arg("NODE").arg(to.to_string())).await
    }

    /// `CLUSTER CANCELSLOTMIGRATIONS`: every job of the node, as long as that loses nothing. That there is none is as good.
    pub async fn cancel_slot_migrations(&self) -> Result<Cancelled, Error> {
        match self.ask::<String>(cmd("EVAL_RO").arg(CANCEL_UNGRANTED).arg(0)).await {
            Ok(said) if said == "GRANTED" => Ok(Cancelled::Granted),
            Ok(_) => Ok(Cancelled::All),
            Err(Error::Refused(said)) if said.contains("No migrations ongoing") => Ok(Cancelled::All),
            Err(error) => Err(error),
        }
    }

    /// `CLUSTER FORGET`; a node that it does not know is forgotten.
    pub async fn forget_node(&self, id: &NodeId) -> Result<(), Error> {
        match self.ask(cmd("CLUSTER").arg("FORGET").arg(id.to_string())).await {
            Err(Error::Refused(said)) if said.contains("Unknown node") => Ok(()),
            done => done,
        }
    }
}

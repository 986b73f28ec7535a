//! The port of clients. It is closed while the server is at the gate: whoever connects is refused, and so is a replica. It is the server's
//! once it has left the gate, and the relay's for a moment where a server has stopped being primary (see [`crate::relay`]). In Cluster mode the
//! closed port is the gate, and the command that settles the role opens it: nothing here opens a gate.

use crate::{
    local::{self, Look},
    relay,
    shared::{Agent, Known},
};
use std::{sync::Arc, time::Duration};
use valkeeper_core::info::RawSource;

/// Bound on taking the port from a primary that is being demoted: a command and a system call.
const TAKE_OVER_MAX: Duration = Duration::from_millis(300);

impl Agent {
    /// Has the server listen, unless it does or the relay has the port.
    ///
    /// # Errors
    /// The server's; clients are still refused, and the next look tries again.
    pub async fn open_port(&self) -> Result<(), local::Error> {
        let _alone = self.port.lock().await;
        let is_shut = |known: &Known| {
            // Of a server that has said so itself, and has not ended since.
            let is_settled = known.info.is_some() && !known.is_at_gate();
            is_settled && !known.listens && !known.relays && (!known.leaving || known.is_primary())
        };
        let Some(server) = self.read(|known| is_shut(known).then_some(known.life)) else { return Ok(()) };
        self.local.listen(server).await?;
        self.update(|known| known.listens |= known.life == server);
        Ok(())
    }

    /// Has the server follow an address. Who wrote to it while it was primary is ended, and passed on when it comes back.
    ///
    /// # Errors
    /// The server's. If it is primary still, it gets its port back at the next look.
    pub async fn follow(
        self: &Arc<Self>,
        run_id: &str,
        was_primary: bool,
        to: &RawSource,
    ) -> Result<Look, local::Error> {
        if !was_primary {
            return self.local.attach(run_id, to, None).await;
        }
        // Writes wait meanwhile, and go on by themselves when their pause is over: it must not be over before they may not.
        let taken = tokio::time::timeout(TAKE_OVER_MAX, self.take_port()).await;
        if let Err(error) = taken.unwrap_or(Err(local::Error::Silent)) {
            // Then its clients learn that it is a replica now.
            tracing::warn!(%error, "the server keeps its port: clients are not passed on");
        }
        let followed = self.local.attach(run_id, to, Some(&self.config.args.operator_user)).await;
        if followed.is_err() {
            self.look_now.notify_one();
        }
        followed
    }

    /// Closes the port, which leaves the connections that there are, and has the relay take it. Nobody opens it in between.
    async fn take_port(self: &Arc<Self>) -> Result<(), local::Error> {
        let _alone = self.port.lock().await;
        self.local.close_port().await?;
        self.update(|known| known.listens = false);
        relay::begin(self).await;
        Ok(())
    }

    /// Takes the port back from the relay where the server is primary all the same: its demotion failed, or its promotion was answered late.
    pub async fn reclaim_port(self: &Arc<Self>) {
        let is_passed_on = |known: &Known| known.relays && known.is_primary();
        if !self.read(is_passed_on) {
            return;
        }
        // Whoever demotes it just now has the relay begin before that is done.
        if let Ok(_acting) = self.acting.try_lock()
            && self.read(is_passed_on)
        {
            tracing::warn!("the server is primary, and its clients were passed on: it gets its port back");
            self.relay.end().await;
            self.settle_port().await;
        }
    }

    /// Has the server listen after its role is settled: what a command did is done, whether clients reach it at once or after the next look.
    pub async fn settle_port(self: &Arc<Self>) {
        if let Err(error) = self.open_port().await {
            tracing::warn!(%error, "the server does not listen yet");
            self.look_now.notify_one();
        }
    }
}

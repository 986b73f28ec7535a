//! The port of clients. It is closed while the server is at the gate: whoever connects is refused, and so is a replica. It is the server's
//! once it has left the gate, and the relay's for a moment where a server has stopped being primary (see [`crate::relay`]).

use crate::{
    local::{self, Look},
    relay,
    shared::Agent,
};
use std::sync::Arc;
use valkeeper_core::info::RawSource;

impl Agent {
    /// Has the server listen, unless it does or the relay has the port.
    ///
    /// # Errors
    /// The server's; clients are still refused, and the next look tries again.
    pub async fn open_port(&self) -> Result<(), local::Error> {
        let _alone = self.port.lock().await;
        let is_shut = self.read(|known| !known.listens && !known.relays && !known.leaving);
        if !is_shut {
            return Ok(());
        }
        self.local.listen(self.config.args.server_port).await?;
        self.update(|known| known.listens = true);
        Ok(())
    }

    /// Has the server listen no more; connections that it has stay.
    ///
    /// # Errors
    /// The server's.
    pub async fn close_port(&self) -> Result<(), local::Error> {
        let _alone = self.port.lock().await;
        self.local.listen(0).await?;
        self.update(|known| known.listens = false);
        Ok(())
    }

    /// Has the server follow an address. Who wrote to it while it was primary is ended, and passed on when it comes back.
    ///
    /// # Errors
    /// The server's.
    pub async fn follow(self: &Arc<Self>, was_primary: bool, to: &RawSource) -> Result<Look, local::Error> {
        if !was_primary {
            return self.local.attach(to, None).await;
        }
        match self.close_port().await {
            Ok(()) => relay::begin(self).await,
            // Then its clients learn that it is a replica now.
            Err(error) => tracing::warn!(%error, "the server keeps its port: clients are not passed on"),
        }
        self.local.attach(to, Some(&self.config.args.operator_user)).await
    }

    /// Has the server listen after its role is settled: what a command did is done, whether clients reach it at once or after the next look.
    pub async fn settle_port(self: &Arc<Self>) {
        if let Err(error) = self.open_port().await {
            tracing::warn!(%error, "the server does not listen yet");
            self.look_now.notify_one();
        }
    }
}

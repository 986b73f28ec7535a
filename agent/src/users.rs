//! The users' files while the server runs. Kubernetes brings a changed Secret to each member at another moment, up to 90 s after the change:
//! the server is given the new users at once, and a replica whose primary does not let it in tries the passwords that there are.

use crate::{
    boot::Users,
    shared::{Agent, is_at_gate},
};
use std::{sync::Arc, time::Duration};
use valkeeper_core::{info::RawRole, observation::Link};

/// Between two readings of the files.
const READ_PERIOD: Duration = Duration::from_secs(1);
/// How many readings a password of replication is tried for: a replica tries to log in once a second.
const TRIED_FOR: u32 = 3;

/// Keeps the server's users in step with the files.
pub async fn watch(agent: &Arc<Agent>, users: &Users) {
    let (mut untold, mut refused) = (false, 0_u32);
    loop {
        tokio::time::sleep(READ_PERIOD).await;
        match users.take_in() {
            Ok(true) => {
                untold = true;
                agent.renew();
            }
            Ok(false) => {}
            // Kubelet is just changing them.
            Err(error) => tracing::debug!(%error, "the users' files cannot be read"),
        }
        let Some(info) = agent.read(|known| known.info.clone()) else { continue };
        if untold {
            let told = agent.local.set_users().await;
            untold = told.is_err();
            match told {
                Ok(()) => tracing::info!("the server has the users of the changed files"),
                Err(error) => tracing::warn!(%error, "the users of the changed files are not set yet"),
            }
        }
        if is_at_gate(&info) || info.loading {
            continue;
        }
        let link_is_down = matches!(info.role, RawRole::Replica { source: _, link: Link::Down });
        refused = if link_is_down { refused + 1 } else { 0 };
        let tries = refused >= TRIED_FOR;
        refused = if tries { 0 } else { refused };
        let changed =
            if tries { agent.local.try_next_login().await } else { agent.local.settle_login().await };
        if let Err(error) = changed {
            tracing::warn!(%error, "the password of replication could not be changed");
        }
    }
}

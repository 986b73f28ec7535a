//! One answer of a server, with the moment it arrived.

use std::ops::Deref;
use tokio::time::Instant;
use valkeeper_core::info::{Garbled, Info};

/// One answer of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// When it arrived.
    pub answered_at: Instant,
    /// What it says.
    pub info: Info,
}

impl Look {
    /// Parses the sections server, replication and persistence of INFO.
    pub fn parse(text: &str, answered_at: Instant) -> Result<Look, Garbled> {
        Ok(Look { answered_at, info: Info::parse(text)? })
    }
}

impl Deref for Look {
    type Target = Info;

    fn deref(&self) -> &Info {
        &self.info
    }
}

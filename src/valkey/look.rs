//! One answer of a server, with the moment it arrived.

use std::ops::Deref;
use tokio::time::Instant;
use valkeeper_core::{
    exports::{Fields, exports, import_failed},
    info::{Garbled, Info},
    nodes::Nodes,
    observation::NodeFacts,
};

use super::Error;

/// One answer of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// When it arrived.
    pub answered_at: Instant,
    /// What it says. At the gate it follows the gate.
    pub info: Info,
    /// What its node says, in a Valkey Cluster.
    pub node: Option<NodeFacts>,
}

impl Look {
    /// Parses the sections server, replication and persistence of INFO, and keyspace if it was asked.
    pub fn parse(text: &str, answered_at: Instant) -> Result<Look, Garbled> {
        Ok(Look { answered_at, info: Info::parse(text)?, node: None })
    }

    /// Parses the same with `CLUSTER NODES`, of a server in a Valkey Cluster; and `CLUSTER INFO` and `CLUSTER GETSLOTMIGRATIONS`, which spoil
    /// nothing, whatever they say.
    pub fn parse_node(
        info: &str,
        (nodes, state): (&str, &str),
        jobs: Option<&[Fields]>,
        answered_at: Instant,
    ) -> Result<Look, Error> {
        let Look { answered_at, info, node: _ } = Look::parse(info, answered_at)?;
        let nodes: Nodes = nodes.parse()?;
        let (known, exports_unread) = (jobs.map(exports).unwrap_or_default(), jobs.is_none());
        let down = state.lines().any(|line| line.trim_end() == "cluster_state:fail");
        let import_failed = jobs.and_then(import_failed);
        let node = NodeFacts { exports: known, exports_unread, import_failed, down, ..nodes.facts() };
        Ok(Look { answered_at, info: info.behind_gate(), node: Some(node) })
    }
}

impl Deref for Look {
    type Target = Info;

    fn deref(&self) -> &Info {
        &self.info
    }
}

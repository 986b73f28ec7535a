//! The nodes of a Valkey Cluster, whoever made it: the way to them, and what all of them must say before a fault may come.

use super::{
    load::TIMEOUT_READ,
    resp::{Connection, Reach, Reply, Role},
    slots,
    subject::{Subject, numbers},
    wait::until,
};
use anyhow::{Context, bail};
use std::{collections::HashSet, io, net::IpAddr, time::Duration};

/// Bound on each wait. A node may be slow that copies its data to another.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Bound on a server's snapshot of what benchmarks give it to keep.
const SNAPSHOT_MAX: Duration = Duration::from_secs(60);

/// The way to the nodes.
#[derive(Clone, Debug)]
pub struct Nodes {
    /// How addresses are reached.
    pub reach: Reach,
    /// Password of the application's user.
    pub password: String,
    /// Every node.
    pub addresses: Vec<IpAddr>,
}

impl Nodes {
    /// Those of a ValkeyCluster, as far as its pods have addresses.
    pub async fn of(subject: &Subject) -> anyhow::Result<Nodes> {
        let addresses = subject.members().await?.iter().filter_map(|member| member.address).collect();
        Ok(Nodes { reach: subject.reach.clone(), password: subject.password().await?, addresses })
    }

    /// Asks something that blocks.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Nodes) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let nodes = self.clone();
        tokio::task::spawn_blocking(move || question(&nodes)).await?
    }

    /// A connection to one.
    pub fn open(&self, address: IpAddr) -> io::Result<Connection> {
        Connection::open(&self.reach, address, &self.password, CALL_TIMEOUT)
    }

    /// A connection to one that answers.
    pub fn any(&self) -> anyhow::Result<Connection> {
        self.addresses.iter().find_map(|address| self.open(*address).ok()).context("nobody answers")
    }

    /// Who serves a slot, as the first that answers sees it.
    pub fn owner(&self, slot: u16) -> anyhow::Result<IpAddr> {
        let runs = slots::runs(&mut self.any()?)?;
        slots::owner(&runs, slot).with_context(|| format!("nobody serves slot {slot}"))
    }

    /// A node's id.
    pub fn id(&self, address: IpAddr) -> anyhow::Result<String> {
        let reply = self.open(address)?.call(&["CLUSTER", "MYID"])?;
        Ok(reply.text().with_context(|| format!("CLUSTER MYID: {reply:?}"))?.to_owned())
    }

    /// Sends a command to a node that must say OK.
    pub fn tell(&self, address: IpAddr, words: &[&str]) -> anyhow::Result<()> {
        match self.open(address)?.call(words)? {
            Reply::Text(_) => Ok(()),
            other @ (Reply::Error(_) | Reply::Integer(_) | Reply::Nil | Reply::List(_)) => {
                bail!("{address}, {}: {other:?}", words.join(" "))
            }
        }
    }

    /// The members of a set of numbers in a slot.
    pub async fn set(&self, slot: u16, key: &str) -> anyhow::Result<HashSet<u64>> {
        let key = key.to_owned();
        let read = move |nodes: &Nodes| {
            let owner = nodes.owner(slot)?;
            let connection = Connection::open(&nodes.reach, owner, &nodes.password, TIMEOUT_READ)?;
            Ok(numbers(connection, &key)?)
        };
        self.ask(read).await
    }

    /// Waits until every node sees all of them and all slots served, and each primary feeds so many replicas.
    pub async fn settled(&self, replicas: usize, patience: Duration) -> anyhow::Result<()> {
        let look = move |nodes: &Nodes| {
            let each = nodes.addresses.iter();
            each.copied().try_for_each(|address| nodes.is_settled(address, replicas).context(address))
        };
        until("every node to be settled", patience, || self.ask(look)).await.map(|_| ())
    }

    fn is_settled(&self, address: IpAddr, replicas: usize) -> anyhow::Result<()> {
        let mut node = self.open(address)?;
        let (slots, known) = (slots::COUNT.to_string(), self.addresses.len().to_string());
        says(
            &mut node,
            &[("cluster_state", "ok"), ("cluster_slots_ok", &slots), ("cluster_known_nodes", &known)],
        )?;
        match node.role()? {
            Role::Primary => {
                // A replica's link is there before its primary feeds it.
                let told = node.call(&["INFO", "replication"])?;
                let fed = told.text().unwrap_or_default().matches("state=online").count();
                if fed == replicas { Ok(()) } else { bail!("it feeds {fed} replicas") }
            }
            Role::Replica { of: _, link } if link == "connected" => Ok(()),
            Role::Replica { of, link } => bail!("its link to {of} is {link}"),
        }
    }

    /// Makes every server write a snapshot and waits until that is done: none comes by itself soon after, and nothing else is being
    /// written meanwhile.
    pub async fn snapshot(&self) -> anyhow::Result<()> {
        self.written().await?;
        let begin = |nodes: &Nodes| {
            for address in &nodes.addresses {
                nodes.tell(*address, &["BGSAVE"])?;
            }
            Ok(())
        };
        self.ask(begin).await?;
        self.written().await
    }

    async fn written(&self) -> anyhow::Result<()> {
        let look = |nodes: &Nodes| {
            for address in &nodes.addresses {
                let mut node = nodes.open(*address)?;
                for field in ["rdb_bgsave_in_progress", "aof_rewrite_in_progress", "aof_rewrite_scheduled"] {
                    let told = node.info("persistence", field)?;
                    if told.as_deref() != Some("0") {
                        bail!("{field} of {address} is {told:?}");
                    }
                }
            }
            Ok(())
        };
        until("what is being written to disks", SNAPSHOT_MAX, || self.ask(look)).await.map(|_| ())
    }
}

/// Fails if a node's `CLUSTER INFO` does not have these fields.
pub fn says(node: &mut Connection, wanted: &[(&str, &str)]) -> anyhow::Result<()> {
    let reply = node.call(&["CLUSTER", "INFO"])?;
    let text = reply.text().with_context(|| format!("CLUSTER INFO: {reply:?}"))?;
    for (field, value) in wanted {
        let said = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        if said.map(str::trim_end) != Some(*value) {
            bail!("{field} is {said:?}, not {value}");
        }
    }
    Ok(())
}

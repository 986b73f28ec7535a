//! Many small keys over all slots of a Valkey Cluster, written and read a thousand at a time from who owns them.

use super::{
    resp::{Connection, Reply},
    slots::{self, AT_ONCE},
    subject::Subject,
};
use anyhow::{Context, bail};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

/// Bound on each wait. A node may be slow that copies its data to another.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Keys that were written, each with its own name as value.
pub struct Keys {
    names: Arc<Vec<String>>,
    slots: Arc<Vec<u16>>,
}

impl Keys {
    /// Writes new ones; each was acknowledged.
    pub async fn write(subject: &Subject, count: usize) -> anyhow::Result<Keys> {
        let run = format!("{:x}", std::time::UNIX_EPOCH.elapsed()?.as_nanos());
        let names: Arc<Vec<String>> = Arc::new((0..count).map(|i| format!("tests:{run}:{i}")).collect());
        let (mut node, asked) = (any_node(subject).await?, Arc::clone(&names));
        let slots = tokio::task::spawn_blocking(move || slots::of_keys(&mut node, &asked)).await??;
        let keys = Keys { names, slots: Arc::new(slots) };
        let written = |_: &str, reply: &Reply| reply.text() == Some("OK");
        keys.each(subject, |name| vec!["SET", name, name], written).await?;
        Ok(keys)
    }

    /// Reads all of them; the first that is not as it was written is an error.
    pub async fn read(&self, subject: &Subject) -> anyhow::Result<()> {
        self.each(subject, |name| vec!["GET", name], |name, reply| reply.text() == Some(name)).await
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.names.len()
    }

    /// Asks the owner of each key, as one node names them.
    async fn each(
        &self,
        subject: &Subject,
        command: for<'a> fn(&'a str) -> Vec<&'a str>,
        is_right: fn(&str, &Reply) -> bool,
    ) -> anyhow::Result<()> {
        let (mut node, reach, password) =
            (any_node(subject).await?, subject.reach.clone(), subject.password().await?);
        let (names, slots) = (Arc::clone(&self.names), Arc::clone(&self.slots));
        let ask = move || -> anyhow::Result<()> {
            let runs = slots::runs(&mut node)?;
            let mut by_owner: BTreeMap<IpAddr, Vec<&str>> = BTreeMap::new();
            for (name, slot) in names.iter().zip(slots.iter()) {
                let owner =
                    slots::owner(&runs, *slot).with_context(|| format!("nobody serves slot {slot}"))?;
                by_owner.entry(owner).or_default().push(name);
            }
            for (owner, names) in by_owner {
                let mut connection = Connection::open(&reach, owner, &password, CALL_TIMEOUT)?;
                for some in names.chunks(AT_ONCE) {
                    let commands: Vec<Vec<&str>> = some.iter().map(|name| command(name)).collect();
                    let replies = connection.call_all(&commands)?;
                    let mut wrong = some.iter().zip(&replies).filter(|(name, reply)| !is_right(name, reply));
                    if let Some((name, reply)) = wrong.next() {
                        bail!("{owner} answers {reply:?} of {name}");
                    }
                }
            }
            Ok(())
        };
        tokio::task::spawn_blocking(ask).await?
    }
}

/// A member that answers.
pub async fn any_node(subject: &Subject) -> anyhow::Result<Connection> {
    for member in subject.members().await? {
        if let Ok(connection) = subject.connect(&member, CALL_TIMEOUT).await {
            return Ok(connection);
        }
    }
    bail!("nobody answers")
}

//! Many small keys over all slots of a Valkey Cluster, or over some, written and read a thousand at a time from who owns them.

use super::{
    nodes::Nodes,
    resp::{Connection, Reply},
    slots::{self, AT_ONCE, Tag},
    subject::Subject,
};
use anyhow::{Context, bail};
use std::{collections::BTreeMap, net::IpAddr, ops::RangeInclusive, sync::Arc};

/// Tags that are tried for keys in some slots only: six for each slot, so that hardly one is without.
const TAGS: usize = 100_000;

/// Keys that were written, each with its own name as value.
pub struct Keys {
    names: Arc<Vec<String>>,
    slots: Arc<Vec<u16>>,
    /// Values are filled up to so many bytes.
    value_bytes: usize,
}

impl Keys {
    /// Writes new ones; each was acknowledged.
    pub async fn write(subject: &Subject, count: usize) -> anyhow::Result<Keys> {
        let nodes = Nodes::of(subject).await?;
        let run = run()?;
        let names: Vec<String> = (0..count).map(|i| format!("tests:{run}:{i}")).collect();
        let (slots, names) = slots_of(&nodes, names).await?;
        Keys { names: Arc::new(names), slots: Arc::new(slots), value_bytes: 0 }.put(&nodes).await
    }

    /// The same in some slots only, with values of so many bytes.
    pub async fn write_into(
        nodes: &Nodes,
        into: RangeInclusive<u16>,
        count: usize,
        value_bytes: usize,
    ) -> anyhow::Result<Keys> {
        let run = run()?;
        let (slots, texts) = slots_of(nodes, (0..TAGS).map(|i| i.to_string()).collect()).await?;
        let tags = texts.into_iter().zip(slots).map(|(text, slot)| Tag { text, slot });
        let tags: Vec<Tag> = tags.filter(|tag| into.contains(&tag.slot)).collect();
        let named = |(i, tag): (usize, &Tag)| (tag.key(&format!("tests:{run}:{i}")), tag.slot);
        let (names, slots): (Vec<_>, Vec<_>) = tags.iter().cycle().take(count).enumerate().map(named).unzip();
        Keys { names: Arc::new(names), slots: Arc::new(slots), value_bytes }.put(nodes).await
    }

    async fn put(self, nodes: &Nodes) -> anyhow::Result<Keys> {
        let wrong =
            self.each(nodes, |name, value| vec!["SET", name, value], |_, reply| reply.text() == Some("OK"));
        match wrong.await?.first {
            None => Ok(self),
            Some(first) => bail!("{first}"),
        }
    }

    /// Reads all of them; the first that is not as it was written is an error.
    pub async fn read(&self, subject: &Subject) -> anyhow::Result<()> {
        match self.compare(&Nodes::of(subject).await?).await?.first {
            None => Ok(()),
            Some(first) => bail!("{first}"),
        }
    }

    /// Reads all of them.
    pub async fn compare(&self, nodes: &Nodes) -> anyhow::Result<Wrong> {
        self.each(nodes, |name, _| vec!["GET", name], |value, reply| reply.text() == Some(value)).await
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.names.len()
    }

    /// Asks the owner of each key, as one node names them.
    async fn each(
        &self,
        nodes: &Nodes,
        command: for<'a> fn(&'a str, &'a str) -> Vec<&'a str>,
        is_right: fn(&str, &Reply) -> bool,
    ) -> anyhow::Result<Wrong> {
        let (names, slots, value_bytes) =
            (Arc::clone(&self.names), Arc::clone(&self.slots), self.value_bytes);
        let ask = move |nodes: &Nodes| {
            let runs = slots::runs(&mut nodes.any()?)?;
            let mut by_owner: BTreeMap<IpAddr, Vec<&str>> = BTreeMap::new();
            for (name, slot) in names.iter().zip(slots.iter()) {
                let owner =
                    slots::owner(&runs, *slot).with_context(|| format!("nobody serves slot {slot}"))?;
                by_owner.entry(owner).or_default().push(name);
            }
            let mut wrong = Wrong::default();
            for (owner, names) in by_owner {
                let mut connection = nodes.open(owner)?;
                for some in names.chunks(AT_ONCE) {
                    let values: Vec<String> =
                        some.iter().map(|name| format!("{name:.<value_bytes$}")).collect();
                    let pairs = || some.iter().zip(&values);
                    let commands: Vec<Vec<&str>> =
                        pairs().map(|(name, value)| command(name, value)).collect();
                    for ((name, value), reply) in pairs().zip(connection.call_all(&commands)?) {
                        if !is_right(value, &reply) {
                            wrong.count += 1;
                            wrong.first.get_or_insert_with(|| format!("{owner} answers {reply:?} of {name}"));
                        }
                    }
                }
            }
            Ok(wrong)
        };
        nodes.ask(ask).await
    }
}

/// Keys that are not as they were written.
#[derive(Clone, Debug, Default)]
pub struct Wrong {
    /// How many.
    pub count: usize,
    /// What was answered of the first.
    pub first: Option<String>,
}

/// A word that no other run has.
fn run() -> anyhow::Result<String> {
    Ok(format!("{:x}", std::time::UNIX_EPOCH.elapsed()?.as_nanos()))
}

/// The slots of keys, and the keys.
async fn slots_of(nodes: &Nodes, keys: Vec<String>) -> anyhow::Result<(Vec<u16>, Vec<String>)> {
    nodes.ask(move |nodes| Ok((slots::of_keys(&mut nodes.any()?, &keys)?, keys))).await
}

/// A member that answers.
pub async fn any_node(subject: &Subject) -> anyhow::Result<Connection> {
    Nodes::of(subject).await?.ask(Nodes::any).await
}

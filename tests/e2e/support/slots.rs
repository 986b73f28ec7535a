//! The smallest client of a Valkey Cluster: it asks a node who serves a slot, and goes where it is sent. Slots of keys are the servers'
//! own answers, too: a mistake of ours about them must not hide here.

use super::resp::{Connection, PORT, Reach, Reply};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    net::{IpAddr, ToSocketAddrs},
    time::Duration,
};

/// Redirections that one command follows. One is usual after slots have moved, two while nodes learn of it; more is a circle.
const REDIRECTIONS_MAX: usize = 5;
/// Tags that are tried until each primary has one of its own. A hundred numbers are spread over the slots by a checksum: none of a few
/// shards is missed.
const TAGS_MAX: usize = 100;

/// Slots of a Valkey Cluster.
pub const COUNT: u16 = 16_384;
/// Commands that are sent before the first answer is read: their answers fit into a socket's buffers.
pub const AT_ONCE: usize = 1_000;

/// A run of slots and the node that serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    first: u16,
    last: u16,
    owner: IpAddr,
}

/// A hash tag: every key that has it in braces is in the same slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag {
    /// What is between the braces.
    pub text: String,
    /// The slot.
    pub slot: u16,
}

impl Tag {
    /// A key with this tag.
    pub fn key(&self, name: &str) -> String {
        format!("{name}:{{{}}}", self.text)
    }
}

/// Who serves which slots, as one node sees it.
pub fn runs(node: &mut Connection) -> io::Result<Vec<Run>> {
    let reply = node.call(&["CLUSTER", "SLOTS"])?;
    let garbled = || io::Error::other(format!("CLUSTER SLOTS: {reply:?}"));
    let Reply::List(entries) = &reply else { return Err(garbled()) };
    entries.iter().map(|entry| run(entry).ok_or_else(garbled)).collect()
}

/// `[first, last, [endpoint, port, id, metadata], ...]`: the first node is the primary.
fn run(entry: &Reply) -> Option<Run> {
    let [first, last, owner, ..] = entry.list() else { return None };
    let slot = |reply: &Reply| reply.integer().and_then(|slot| u16::try_from(slot).ok());
    Some(Run { first: slot(first)?, last: slot(last)?, owner: node_address(owner)? })
}

/// The node's own address, which tests compare with its pod's. A node that is told by name has it in its metadata: `[ip, 10.0.0.1]`
/// (the command's page, "CLUSTER SLOTS", `networking metadata`); what the name leads to is its Service.
fn node_address(node: &Reply) -> Option<IpAddr> {
    let [endpoint, _port, _id, metadata, ..] = node.list() else { return None };
    let own = metadata.list().chunks(2).find_map(|pair| match pair {
        [key, ip] if key.text() == Some("ip") => ip.text()?.parse().ok(),
        _ => None,
    });
    own.or_else(|| address(endpoint.text()?))
}

/// The node that serves a slot.
pub fn owner(runs: &[Run], slot: u16) -> Option<IpAddr> {
    runs.iter().find(|run| run.first <= slot && slot <= run.last).map(|run| run.owner)
}

/// How many slots each node serves.
pub fn counts(runs: &[Run]) -> BTreeMap<IpAddr, usize> {
    let mut counts = BTreeMap::new();
    for Run { first, last, owner } in runs {
        *counts.entry(*owner).or_default() += usize::from(*last) + 1 - usize::from(*first);
    }
    counts
}

/// The slots of keys.
pub fn of_keys(node: &mut Connection, keys: &[String]) -> io::Result<Vec<u16>> {
    let mut slots = Vec::new();
    for some in keys.chunks(AT_ONCE) {
        let asked: Vec<Vec<&str>> = some.iter().map(|key| vec!["CLUSTER", "KEYSLOT", key]).collect();
        for reply in node.call_all(&asked)? {
            let slot = reply.integer().and_then(|slot| u16::try_from(slot).ok());
            slots.push(slot.ok_or_else(|| io::Error::other(format!("CLUSTER KEYSLOT: {reply:?}")))?);
        }
    }
    Ok(slots)
}

/// For each of some slots a tag whose slot is as near as a thousand tags come.
pub fn tags_near(node: &mut Connection, wanted: &[u16]) -> io::Result<Vec<Tag>> {
    let texts: Vec<String> = (0..AT_ONCE).map(|number| number.to_string()).collect();
    let slots = of_keys(node, &texts)?;
    let near = |wanted: &u16| texts.iter().zip(&slots).min_by_key(|(_, slot)| slot.abs_diff(*wanted));
    let tags = wanted.iter().filter_map(near).map(|(text, slot)| Tag { text: text.clone(), slot: *slot });
    Ok(tags.collect())
}

/// A tag for each node that serves slots, by its address.
pub fn tags(node: &mut Connection) -> io::Result<BTreeMap<IpAddr, Tag>> {
    let runs = runs(node)?;
    let mut tags = BTreeMap::new();
    for number in 0..TAGS_MAX {
        let text = number.to_string();
        let reply = node.call(&["CLUSTER", "KEYSLOT", &text])?;
        let slot = reply.integer().and_then(|slot| u16::try_from(slot).ok());
        let slot = slot.ok_or_else(|| io::Error::other(format!("CLUSTER KEYSLOT: {reply:?}")))?;
        if let Some(owner) = owner(&runs, slot) {
            tags.entry(owner).or_insert(Tag { text, slot });
        }
    }
    Ok(tags)
}

/// Where an answer sends the client: `MOVED 3999 10.0.0.1:6379`.
pub fn moved(reply: &Reply) -> Option<IpAddr> {
    sent_by("MOVED ", reply)
}

/// The same for this one command, while keys are on their way one by one: `ASK 3999 10.0.0.1:6379`.
pub fn asked(reply: &Reply) -> Option<IpAddr> {
    sent_by("ASK ", reply)
}

fn sent_by(word: &str, reply: &Reply) -> Option<IpAddr> {
    let Reply::Error(text) = reply else { return None };
    let (_slot, target) = text.strip_prefix(word)?.split_once(' ')?;
    let (name, _port) = target.rsplit_once(':')?;
    address(name)
}

/// Nodes name each other by address or by a name in DNS, as the spec has it.
fn address(name: &str) -> Option<IpAddr> {
    name.parse().ok().or_else(|| (name, PORT).to_socket_addrs().ok()?.next().map(|found| found.ip()))
}

/// A client that knows one node, remembers nothing of where keys are, and follows every redirection.
pub struct Client {
    reach: Reach,
    password: String,
    timeout: Duration,
    first: IpAddr,
    open: BTreeMap<IpAddr, Connection>,
    /// How often it was sent elsewhere.
    pub redirections: usize,
}

impl Client {
    /// Begins every command at `first`.
    pub fn new(reach: Reach, first: IpAddr, password: String, timeout: Duration) -> Client {
        Client { reach, password, timeout, first, open: BTreeMap::new(), redirections: 0 }
    }

    /// The answer of whoever does not send it elsewhere. An answer that is an error is an error here, too.
    pub fn call(&mut self, words: &[&str]) -> io::Result<Reply> {
        let mut at = self.first;
        for _ in 0..=REDIRECTIONS_MAX {
            let reply = self.on(at, words)?;
            match (moved(&reply), reply) {
                (Some(to), _) => {
                    self.redirections += 1;
                    at = to;
                }
                (None, Reply::Error(text)) => return Err(io::Error::other(format!("{at}: {text}"))),
                (None, reply) => return Ok(reply),
            }
        }
        Err(io::Error::other(format!("redirected more than {REDIRECTIONS_MAX} times, last to {at}")))
    }

    fn on(&mut self, at: IpAddr, words: &[&str]) -> io::Result<Reply> {
        let connection = match self.open.entry(at) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(none) => {
                none.insert(Connection::open(&self.reach, at, &self.password, self.timeout)?)
            }
        };
        let reply = connection.call(words);
        if reply.is_err() {
            self.open.remove(&at);
        }
        reply
    }
}

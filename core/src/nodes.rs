//! `CLUSTER NODES` to types: what one node of a Valkey Cluster knows of all of them. The text comes from a server that may be anything,
//! so what does not parse is an error that names the line and the field, never a guess.

use crate::{
    ids::NodeId,
    observation::NodeFacts,
    slots::{SLOTS, SlotSet},
};
use std::{collections::BTreeMap, str::FromStr};

/// Longest answer that is read, in bytes: a thousand nodes of 300 bytes each, and as much again for slots in pieces.
const NODES_BYTES_MAX: usize = 1024 * 1024;

/// What the node that was asked thinks of another's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It answers.
    Alive,
    /// It has not answered this node for the node timeout (`fail?`).
    Suspected,
    /// A majority of the primaries says so (`fail`).
    Failed,
    /// It was met and has not answered yet: its id is a made-up one.
    Handshake,
}

/// A slot in the middle of a classic migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Open {
    /// It comes from that node.
    Importing(u16, NodeId),
    /// It goes to that node.
    Migrating(u16, NodeId),
}

impl Open {
    /// The slot.
    pub fn number(&self) -> u16 {
        match self {
            Open::Importing(slot, _) | Open::Migrating(slot, _) => *slot,
        }
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// Its IP address as the others reach it; `None` if nobody knows (`noaddr`).
    pub address: Option<String>,
    /// Whom it replicates; `None`: it is a primary.
    pub primary: Option<NodeId>,
    /// What is thought of it. Of itself, a node thinks that it is alive.
    pub life: Life,
    /// Its config epoch, or its primary's.
    pub epoch: u64,
    /// True if the bus connection to it is there.
    pub linked: bool,
    /// The slots it serves.
    pub slots: SlotSet,
    /// Slots that are being moved by hand; only a node itself says this.
    pub open: Vec<Open>,
}

/// What one node says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nodes {
    /// Itself.
    pub myself: Node,
    /// All others, in order of their ids.
    pub others: Vec<Node>,
}

/// Why an answer cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodesError {
    /// Longer than any honest answer.
    #[error("CLUSTER NODES has {0} bytes, more than {NODES_BYTES_MAX}")]
    TooLong(usize),
    /// A line lacks a field, or the field cannot be understood.
    #[error("CLUSTER NODES, line {line}: {what} cannot be understood")]
    Malformed {
        /// Counted from 1.
        line: usize,
        /// Name of the field.
        what: &'static str,
    },
    /// No line, or more than one, is about the node that was asked.
    #[error("CLUSTER NODES has {0} lines about the node itself, where there is one")]
    Myself(usize),
}

impl Nodes {
    /// Every node that is known, the one that was asked first.
    pub fn all(&self) -> impl Iterator<Item = &Node> {
        std::iter::once(&self.myself).chain(&self.others)
    }

    /// What of it is recorded: nothing that changes while nothing happens.
    pub fn facts(&self) -> NodeFacts {
        let dead = |node: &Node| match node.life {
            Life::Failed => true,
            // No minority calls anybody failed: where the others are no majority any more, its suspicion is all there is.
            Life::Suspected => !self.has_majority(),
            Life::Alive | Life::Handshake => false,
        };
        let met = || self.others.iter().filter(|node| node.life != Life::Handshake);
        let shaking = |node: &Node| node.address.clone().filter(|_| node.life == Life::Handshake);
        let served = self.all().filter(|node| !dead(node) && node.primary.is_none());
        let covered = served.fold(SlotSet::default(), |all, node| all.with(&node.slots));
        NodeFacts {
            id: self.myself.id.clone(),
            primary: self.myself.primary.clone(),
            epoch: self.myself.epoch,
            slots: self.myself.slots.clone(),
            knows: met().map(|node| (node.id.clone(), node.address.clone())).collect(),
            meeting: self.others.iter().filter_map(shaking).collect(),
            failed: met().filter(|node| dead(node)).map(|node| node.id.clone()).collect(),
            covered: u16::try_from(covered.len()).unwrap_or(SLOTS),
            exports: Vec::new(),
            exports_unread: false,
            import_failed: None,
            migrating: self.open(|open| match open {
                Open::Migrating(slot, to) => Some((*slot, to.clone())),
                Open::Importing(..) => None,
            }),
            importing: self.open(|open| match open {
                Open::Importing(slot, from) => Some((*slot, from.clone())),
                Open::Migrating(..) => None,
            }),
            down: false,
        }
    }

    fn open(&self, kind: impl Fn(&Open) -> Option<(u16, NodeId)>) -> BTreeMap<u16, NodeId> {
        // A replica says so, too, of what its primary has open.
        self.myself.open.iter().filter(|_| self.myself.primary.is_none()).filter_map(kind).collect()
    }

    /// True if this node reaches a majority of the primaries with slots, or there are none.
    fn has_majority(&self) -> bool {
        let voters = || self.all().filter(|node| node.primary.is_none() && !node.slots.is_empty());
        let reached = voters().filter(|node| node.life == Life::Alive).count();
        voters().count() == 0 || reached > voters().count() / 2
    }

    /// What is known of a node.
    pub fn get(&self, id: &NodeId) -> Option<&Node> {
        self.all().find(|node| node.id == *id)
    }
}

impl FromStr for Nodes {
    type Err = NodesError;

    fn from_str(text: &str) -> Result<Nodes, NodesError> {
        if text.len() > NODES_BYTES_MAX {
            return Err(NodesError::TooLong(text.len()));
        }
        let (mut mine, mut others) = (Vec::new(), Vec::new());
        for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let parsed = parse(line).map_err(|what| NodesError::Malformed { line: at + 1, what })?;
            match parsed {
                (true, node) => mine.push(node),
                (false, node) => others.push(node),
            }
        }
        others.sort_by(|a, b| a.id.cmp(&b.id));
        let found = mine.len();
        match mine.pop() {
            Some(myself) if found == 1 => Ok(Nodes { myself, others }),
            Some(_) | None => Err(NodesError::Myself(found)),
        }
    }
}

/// One line, and whether it is about the node that was asked. The error is the name of the field.
fn parse(line: &str) -> Result<(bool, Node), &'static str> {
    let mut fields = line.split(' ');
    let mut field = |what: &'static str| fields.next().ok_or(what);
    let id = field("id")?.parse().map_err(|_| "id")?;
    let address = address(field("address")?)?;
    let flags: Vec<&str> = field("flags")?.split(',').collect();
    let primary = match field("primary")? {
        "-" => None,
        id => Some(id.parse().map_err(|_| "primary")?),
    };
    let (_ping, _pong) = (field("ping-sent")?, field("pong-recv")?);
    let epoch = field("config-epoch")?.parse().map_err(|_| "config-epoch")?;
    let linked = match field("link-state")? {
        "connected" => true,
        "disconnected" => false,
        _ => return Err("link-state"),
    };
    let (slots, open) = slots(fields)?;
    let has = |flag: &str| flags.contains(&flag);
    let life = match () {
        () if has("handshake") => Life::Handshake,
        () if has("fail") => Life::Failed,
        () if has("fail?") => Life::Suspected,
        () => Life::Alive,
    };
    let address = address.filter(|_| !has("noaddr"));
    Ok((has("myself"), Node { id, address, primary, life, epoch, linked, slots, open }))
}

/// `ip:port@bus[,hostname[,name=value]...]`. An IPv6 address has colons of its own.
fn address(field: &str) -> Result<Option<String>, &'static str> {
    let ends = field.split(',').next().unwrap_or_default();
    let (client, _bus) = ends.rsplit_once('@').ok_or("address")?;
    let (ip, port) = client.rsplit_once(':').ok_or("address")?;
    port.parse::<u16>().map_err(|_| "address")?;
    Ok((!ip.is_empty()).then(|| ip.trim_start_matches('[').trim_end_matches(']').to_owned()))
}

fn slots<'a>(fields: impl Iterator<Item = &'a str>) -> Result<(SlotSet, Vec<Open>), &'static str> {
    let (mut served, mut open) = (Vec::new(), Vec::new());
    for field in fields.filter(|field| !field.is_empty()) {
        match field.strip_prefix('[') {
            None => served.push(field),
            Some(moving) => open.push(opened(moving).ok_or("slots")?),
        }
    }
    Ok((served.join(" ").parse().map_err(|_| "slots")?, open))
}

/// `93-<-ID]` is imported, `77->-ID]` migrated.
fn opened(moving: &str) -> Option<Open> {
    let moving = moving.strip_suffix(']')?;
    let slot = |text: &str| text.parse().ok().filter(|slot| *slot < SLOTS);
    match (moving.split_once("-<-"), moving.split_once("->-")) {
        (Some((number, from)), None) => Some(Open::Importing(slot(number)?, from.parse().ok()?)),
        (None, Some((number, to))) => Some(Open::Migrating(slot(number)?, to.parse().ok()?)),
        (None, None) | (Some(_), Some(_)) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(digit: char) -> NodeId {
        digit.to_string().repeat(40).parse().unwrap()
    }

    fn text() -> String {
        let [a, b, c, d] = ['a', 'b', 'c', 'd'].map(id);
        format!(
            "{b} 10.0.0.2:6379@16379,,tls-port=0,shard-id=69bc slave {a} 0 1700000000000 3 connected\n\
             {a} 10.0.0.1:6379@16379,orders-0-0,nodename=orders-0-0 myself,master - 0 0 3 connected 0-5460 6000 [93-<-{c}] [77->-{c}]\n\
             {c} :0@0,,shard-id=1 master,fail,noaddr - 1700000000000 1700000000001 7 disconnected 5461-5999 6001-16383\n\
             {d} fd00::4:6379@16379 handshake - 0 0 0 disconnected\n"
        )
    }

    #[test]
    fn what_a_node_knows_is_read_line_by_line() {
        let nodes: Nodes = text().parse().unwrap();
        let Nodes { myself, others } = &nodes;
        assert_eq!(
            (myself.id.clone(), myself.address.as_deref(), myself.epoch),
            (id('a'), Some("10.0.0.1"), 3)
        );
        assert_eq!(myself.slots.to_string(), "0-5460 6000");
        assert_eq!(myself.open, [Open::Importing(93, id('c')), Open::Migrating(77, id('c'))]);
        assert_eq!(others.iter().map(|n| n.id.clone()).collect::<Vec<_>>(), ['b', 'c', 'd'].map(id));
        let [b, c, d] = ['b', 'c', 'd'].map(|digit| nodes.get(&id(digit)).unwrap());
        assert_eq!((b.primary.clone(), b.life, b.linked), (Some(id('a')), Life::Alive, true));
        assert_eq!(
            (c.address.as_deref(), c.life, c.linked, c.slots.len()),
            (None, Life::Failed, false, 10_922)
        );
        assert_eq!((d.address.as_deref(), d.life), (Some("fd00::4"), Life::Handshake));
    }

    #[test]
    fn what_a_server_wrote_is_read() {
        // valkey-server 9.1.2 on loopback, the second node stopped.
        let nodes: Nodes = "\
            a08d9343782b50190eb0e038ef02027defe11876 127.0.0.1:27001@37001,n1.svc myself,master - 0 0 0 connected 0-5460 6000 \
            [77->-2e90fc43cbf87f05dc7fc204e24e24ee7cf4c9f3] [7000-<-2e90fc43cbf87f05dc7fc204e24e24ee7cf4c9f3]\n\
            2e90fc43cbf87f05dc7fc204e24e24ee7cf4c9f3 127.0.0.1:27002@37002,n2.svc master,fail? - 1795300535101 1795300534088 1 disconnected 5461-5999 6001-16383\n\
            0564249205ea18bda84d211a844feb92e9871076 127.0.0.1:27003@37003,n3.svc slave a08d9343782b50190eb0e038ef02027defe11876 0 1795300538130 0 connected\n"
            .parse()
            .unwrap();
        let lives: Vec<Life> = nodes.all().map(|node| node.life).collect();
        assert_eq!(lives, [Life::Alive, Life::Alive, Life::Suspected]);
        assert_eq!(nodes.myself.open.iter().map(Open::number).collect::<Vec<_>>(), [77, 7000]);
        assert_eq!(nodes.all().map(|node| node.slots.len()).sum::<usize>(), usize::from(SLOTS));
        // Before anybody was met, a node does not know its own address.
        let alone: Nodes =
            "a08d9343782b50190eb0e038ef02027defe11876 :27001@37001,n1.svc myself,master - 0 0 0 connected"
                .parse()
                .unwrap();
        assert_eq!((alone.myself.address, alone.others), (None, Vec::new()));
    }

    #[test]
    fn a_suspicion_counts_where_no_majority_can_confirm_it() {
        let [a, b, c] = ['a', 'b', 'c'].map(id);
        let seen = |b_flags: &str, c_flags: &str| {
            let text = format!(
                "{a} 10.0.0.1:6379@16379 myself,master - 0 0 1 connected 0-5460\n\
                 {b} 10.0.0.2:6379@16379 {b_flags} - 0 0 2 connected 5461-10921\n\
                 {c} 10.0.0.3:6379@16379 {c_flags} - 0 0 3 connected 10922-16383\n"
            );
            let facts = text.parse::<Nodes>().unwrap().facts();
            (facts.failed.into_iter().collect::<Vec<_>>(), facts.covered)
        };
        assert_eq!(seen("master", "master"), (vec![], SLOTS));
        assert_eq!(seen("master", "master,fail?"), (vec![], SLOTS), "two of three will say so, or not");
        assert_eq!(seen("master", "master,fail"), (vec![c.clone()], 10_922));
        assert_eq!(seen("master,fail?", "master,fail?"), (vec![b.clone(), c.clone()], 5_461));
        let facts = text().parse::<Nodes>().unwrap().facts();
        assert_eq!(facts.knows.keys().cloned().collect::<Vec<_>>(), [b, c], "a handshake is no acquaintance");
        assert_eq!(facts.meeting.into_iter().collect::<Vec<_>>(), ["fd00::4"]);
    }

    #[test]
    fn a_line_that_is_none_is_refused_with_its_number_and_field() {
        for (from, to, what) in [
            ("bbbb 10.", "bbb 10.", "id"),
            ("6379@16379,,tls", "6379,,tls", "address"),
            (" connected 0-5460", " perhaps 0-5460", "link-state"),
            ("0-5460", "0-16384", "slots"),
            ("[93-<-", "[93-", "slots"),
            (" 0 0 3 connected", " 0 0 x connected", "config-epoch"),
        ] {
            let wrong = text().replacen(from, to, 1);
            assert_ne!(wrong, text(), "{from}");
            let refused = wrong.parse::<Nodes>().unwrap_err();
            assert!(
                matches!(&refused, NodesError::Malformed { line: 1..=2, what: named } if *named == what),
                "{what}: {refused}"
            );
        }
        assert_eq!(text().replace("myself,", "").parse::<Nodes>(), Err(NodesError::Myself(0)));
        assert_eq!("".parse::<Nodes>(), Err(NodesError::Myself(0)));
        let long = " ".repeat(NODES_BYTES_MAX + 1);
        assert_eq!(long.parse::<Nodes>(), Err(NodesError::TooLong(NODES_BYTES_MAX + 1)));
    }

    proptest! {
        #[test]
        fn nothing_that_a_server_says_is_a_panic(garbage in "\\PC{0,200}", at in 0_usize..600, with in any::<char>()) {
            let _ = garbage.parse::<Nodes>();
            let mut chars: Vec<char> = text().chars().collect();
            let at = at % chars.len();
            chars[at] = with;
            let _ = chars.into_iter().collect::<String>().parse::<Nodes>();
        }
    }
}

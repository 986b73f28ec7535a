//! INFO text to types. The text comes from a server that may be anything, so nothing here trusts it: what does not
//! parse is [`Garbled`], never a panic and never a guess.

use crate::{
    config::{GATE_ADDRESS, GATE_PORT_BLANK, GATE_PORT_HISTORY, GATE_SOCKET_HISTORY},
    ids::{MemberId, ReplId, Timestamp},
    observation::{Link, Reading, ServerFacts, ServerRole, Source},
};
use std::collections::BTreeMap;

/// Longest INFO answer that is read. Three sections are 4 KiB plus 100 bytes per replica.
const INFO_BYTES_MAX: usize = 256 * 1024;
/// Longest word that is kept: the longest legitimate one is a DNS name.
const WORD_CHARS_MAX: usize = 253;
/// Characters of a run id and of a replication id.
const ID_CHARS: usize = 40;

/// Why an answer cannot be understood. Holds the names of fields, never what was in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Garbled {
    /// Not an answer to the command.
    #[error("the answer is not one to what was asked")]
    NotAnAnswer,
    /// Longer than any honest answer.
    #[error("the answer is too long")]
    TooLong,
    /// A field is not there.
    #[error("INFO has no field {0}")]
    Missing(&'static str),
    /// A field is there twice.
    #[error("INFO has the field {0} twice")]
    Twice(&'static str),
    /// A field holds something that it cannot hold.
    #[error("INFO field {0} cannot be understood")]
    Malformed(&'static str),
}

/// Whom a replica follows, as the server writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawSource {
    /// Host: an IP address or a name.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// What a server says it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RawRole {
    /// `role:master`.
    Primary,
    /// `role:slave`.
    Replica {
        /// Whom it follows.
        source: RawSource,
        /// State of the link.
        link: Link,
    },
}

/// One answer of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// `run_id`: another process has another one.
    pub run_id: String,
    /// `valkey_version`, or `redis_version` of a server that has none.
    pub version: String,
    /// `tcp_port`: 0 while it listens for no client.
    pub port: u16,
    /// Where it is in Cluster mode whatever its role, as its port was never open.
    pub gate: Option<RawSource>,
    /// Role and source.
    pub role: RawRole,
    /// True while it loads its data set.
    pub loading: bool,
    /// `master_replid`.
    pub replid: ReplId,
    /// `master_replid2`, `None` if it never changed.
    pub replid2: Option<ReplId>,
    /// `second_repl_offset`, `None` if there is no second history.
    pub replid2_offset: Option<i64>,
    /// Replication offset in bytes: a replica's `slave_repl_offset`, a primary's `master_repl_offset`.
    pub offset: i64,
    /// Replica only: milliseconds since the last byte from its source; whole seconds, `None` without link.
    pub last_io_ms: Option<i64>,
    /// Number of replicas that are online.
    pub replicas_online: u32,
    /// Number of keys in all databases; `None` if the section keyspace was not asked.
    pub keys: Option<u64>,
}

/// The member (or gate) that `raw` means. `addresses` are the IP addresses of the cluster's members.
pub fn resolve(raw: &RawSource, addresses: &BTreeMap<String, MemberId>) -> Source {
    let RawSource { host, port } = raw;
    match (host.as_str(), *port) {
        (GATE_ADDRESS, GATE_PORT_HISTORY) => Source::Gate { had_history: true },
        (GATE_ADDRESS, GATE_PORT_BLANK) => Source::Gate { had_history: false },
        (host, port) => match addresses.get(host) {
            Some(member) => Source::Member(*member),
            None => Source::Foreign(format!("{host}:{port}")),
        },
    }
}

impl Info {
    /// Parses the sections server, replication and persistence of INFO, and keyspace if it is there.
    pub fn parse(text: &str) -> Result<Info, Garbled> {
        if text.len() > INFO_BYTES_MAX {
            return Err(Garbled::TooLong);
        }
        let fields = Fields(text);
        let role = fields.role()?;
        let is_replica = role != RawRole::Primary;
        let offset_field = if is_replica { "slave_repl_offset" } else { "master_repl_offset" };
        let port = fields.port("tcp_port")?;
        Ok(Info {
            run_id: fields.id("run_id")?.to_owned(),
            version: fields.version()?,
            port,
            gate: fields.gate(port),
            role,
            loading: fields.flag("loading")?,
            replid: ReplId(fields.id("master_replid")?.to_owned()),
            replid2: Some(fields.id("master_replid2")?)
                .filter(|id| id.bytes().any(|byte| byte != b'0'))
                .map(|id| ReplId(id.to_owned())),
            replid2_offset: Some(fields.number("second_repl_offset")?).filter(|offset| *offset >= 0),
            offset: fields.number(offset_field)?,
            last_io_ms: if is_replica { fields.last_io_ms()? } else { None },
            replicas_online: fields.replicas_online(),
            keys: fields.keys()?,
        })
    }

    /// The answer of a server in Cluster mode: one whose port was never open follows the gate, whatever its node is to the others.
    #[must_use]
    pub fn behind_gate(self) -> Info {
        match self.gate.clone() {
            None => self,
            Some(source) => {
                Info { role: RawRole::Replica { source, link: Link::Down }, last_io_ms: None, ..self }
            }
        }
    }

    /// The answer as facts and reading. `taken_at` is when it arrived, on the caller's clock.
    pub fn resolved(
        self,
        addresses: &BTreeMap<String, MemberId>,
        taken_at: Timestamp,
    ) -> (ServerFacts, Reading) {
        let Info {
            run_id,
            version,
            port: _,
            gate: _,
            role,
            loading,
            replid,
            replid2,
            replid2_offset,
            offset,
            last_io_ms,
            replicas_online,
            keys,
        } = self;
        let role = match role {
            RawRole::Primary => ServerRole::Primary,
            RawRole::Replica { source, link } => {
                ServerRole::Replica { source: resolve(&source, addresses), link }
            }
        };
        let facts = ServerFacts { run_id, version, role, loading, replid, replid2, replid2_offset };
        (facts, Reading { taken_at, offset, last_io_ms, replicas_online, keys })
    }
}

/// The `name:value` lines of an INFO answer.
struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    fn lines(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        self.0.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(':'))
    }

    /// The only value of the field, `None` if there is none.
    fn find(&self, name: &'static str) -> Result<Option<&'a str>, Garbled> {
        let mut values = self.lines().filter(|(field, _)| *field == name).map(|(_, value)| value);
        let first = values.next();
        // A second one may have been smuggled in through a field that holds free text.
        if values.next().is_some() { Err(Garbled::Twice(name)) } else { Ok(first) }
    }

    fn value(&self, name: &'static str) -> Result<&'a str, Garbled> {
        self.find(name)?.ok_or(Garbled::Missing(name))
    }

    /// Of all databases: `db0:keys=3,expires=0,avg_ttl=0`. An empty section has its headline only.
    fn keys(&self) -> Result<Option<u64>, Garbled> {
        if !self.0.lines().any(|line| line.trim_end() == "# Keyspace") {
            return Ok(None);
        }
        let mut all = 0_u64;
        for (field, value) in self.lines() {
            let number = field.strip_prefix("db").filter(|number| number.parse::<u32>().is_ok());
            if let (Some(_), Some(rest)) = (number, value.strip_prefix("keys=")) {
                let keys = rest.split(',').next().unwrap_or_default();
                all = all.saturating_add(keys.parse().map_err(|_| Garbled::Malformed("keys"))?);
            }
        }
        Ok(Some(all))
    }

    fn number(&self, name: &'static str) -> Result<i64, Garbled> {
        self.value(name)?.parse().map_err(|_| Garbled::Malformed(name))
    }

    fn flag(&self, name: &'static str) -> Result<bool, Garbled> {
        match self.value(name)? {
            "0" => Ok(false),
            "1" => Ok(true),
            _ => Err(Garbled::Malformed(name)),
        }
    }

    /// 40 lower-case hex digits.
    fn id(&self, name: &'static str) -> Result<&'a str, Garbled> {
        let id = self.value(name)?;
        let is_hex = id.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if is_hex && id.len() == ID_CHARS { Ok(id) } else { Err(Garbled::Malformed(name)) }
    }

    /// A visible word of bounded length.
    fn word(&self, name: &'static str) -> Result<&'a str, Garbled> {
        let word = self.value(name)?;
        let is_word = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_graphic());
        if is_word && word.len() <= WORD_CHARS_MAX { Ok(word) } else { Err(Garbled::Malformed(name)) }
    }

    fn version(&self) -> Result<String, Garbled> {
        let own = self.find("valkey_version")?.is_some();
        self.word(if own { "valkey_version" } else { "redis_version" }).map(str::to_owned)
    }

    fn role(&self) -> Result<RawRole, Garbled> {
        match self.value("role")? {
            "master" => Ok(RawRole::Primary),
            "slave" => Ok(RawRole::Replica { source: self.source()?, link: self.link()? }),
            _ => Err(Garbled::Malformed("role")),
        }
    }

    fn source(&self) -> Result<RawSource, Garbled> {
        Ok(RawSource { host: self.word("master_host")?.to_owned(), port: self.port("master_port")? })
    }

    fn port(&self, name: &'static str) -> Result<u16, Garbled> {
        self.value(name)?.parse().map_err(|_| Garbled::Malformed(name))
    }

    /// Lines `listenerN:name=tcp,bind=...,port=...`. That of a port which is closed again stays, without the port: clients may be left.
    /// What cannot be read for a mark counts as blank, which claims less.
    fn gate(&self, port: u16) -> Option<RawSource> {
        let is_listener =
            |field: &str| field.strip_prefix("listener").is_some_and(|n| n.parse::<u32>().is_ok());
        let mut paths = Vec::new();
        for (_, value) in self.lines().filter(|(field, _)| is_listener(field)) {
            let (kind, bound) = value.split_once(',').unwrap_or((value, ""));
            if kind != "name=unix" {
                return None;
            }
            paths.push(bound.strip_prefix("bind=").unwrap_or_default());
        }
        let is_history = |path: &&str| path.rsplit('/').next() == Some(GATE_SOCKET_HISTORY);
        let had_history = !paths.is_empty() && paths.iter().all(is_history);
        let gate = if had_history { GATE_PORT_HISTORY } else { GATE_PORT_BLANK };
        (port == 0).then(|| RawSource { host: GATE_ADDRESS.to_owned(), port: gate })
    }

    fn link(&self) -> Result<Link, Garbled> {
        match (self.value("master_link_status")?, self.flag("master_sync_in_progress")?) {
            ("up", _) => Ok(Link::Up),
            ("down", true) => Ok(Link::Syncing),
            ("down", false) => Ok(Link::Down),
            _ => Err(Garbled::Malformed("master_link_status")),
        }
    }

    fn last_io_ms(&self) -> Result<Option<i64>, Garbled> {
        let seconds = self.number("master_last_io_seconds_ago")?;
        Ok(Some(seconds.saturating_mul(1000)).filter(|ms| *ms >= 0))
    }

    /// Lines `slaveN:ip=...,port=...,state=online,...`.
    fn replicas_online(&self) -> u32 {
        let is_replica = |field: &str| {
            field
                .strip_prefix("slave")
                .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        };
        let online = self
            .lines()
            .filter(|(field, value)| is_replica(field) && value.split(',').any(|part| part == "state=online"))
            .count();
        u32::try_from(online).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIMARY: &str = "# Server\r\nredis_version:7.2.4\r\nvalkey_version:9.1.2\r\n\
        run_id:0123456789abcdef0123456789abcdef01234567\r\ntcp_port:6379\r\n\r\n# Persistence\r\nloading:0\r\n\r\n\
        # Replication\r\nrole:master\r\nconnected_slaves:2\r\n\
        slave0:ip=10.0.0.2,port=6379,state=online,offset=70,lag=0,type=replica\r\n\
        slave1:ip=10.0.0.3,port=6379,state=wait_bgsave,offset=0,lag=0,type=replica\r\n\
        master_replid:8888888888888888888888888888888888888888\r\n\
        master_replid2:0000000000000000000000000000000000000000\r\n\
        master_repl_offset:84\r\nsecond_repl_offset:-1\r\n";

    fn replica() -> String {
        PRIMARY.replace(
            "role:master\r\n",
            "role:slave\r\nmaster_host:10.0.0.1\r\nmaster_port:6379\r\nmaster_link_status:up\r\n\
             master_last_io_seconds_ago:3\r\nmaster_sync_in_progress:0\r\nslave_repl_offset:80\r\n",
        )
    }

    fn parse(text: &str) -> Result<Info, Garbled> {
        Info::parse(text)
    }

    #[test]
    fn a_primary_has_its_own_offset_and_the_replicas_that_are_online() {
        let look = parse(PRIMARY).unwrap();
        assert_eq!((look.role, look.offset, look.replicas_online), (RawRole::Primary, 84, 1));
        assert_eq!((look.version.as_str(), look.loading, look.last_io_ms), ("9.1.2", false, None));
        assert_eq!((look.replid2, look.replid2_offset), (None, None));
    }

    #[test]
    fn a_replica_has_the_offset_it_has_applied() {
        let look = parse(&replica()).unwrap();
        let source = RawSource { host: "10.0.0.1".to_owned(), port: 6379 };
        assert_eq!(look.role, RawRole::Replica { source, link: Link::Up });
        assert_eq!((look.offset, look.last_io_ms), (80, Some(3000)));
    }

    #[test]
    fn a_link_that_is_down_is_syncing_only_while_a_synchronisation_runs() {
        let down = replica().replace("link_status:up", "link_status:down").replace("ago:3", "ago:-1");
        let syncing = down.replace("sync_in_progress:0", "sync_in_progress:1");
        for (text, expected) in [(down, Link::Down), (syncing, Link::Syncing)] {
            let look = parse(&text).unwrap();
            assert!(matches!(look.role, RawRole::Replica { source: _, link } if link == expected));
            assert_eq!(look.last_io_ms, None);
        }
    }

    #[test]
    fn a_second_history_has_an_id_and_an_end() {
        let text = PRIMARY
            .replace(&"0".repeat(40), &"7".repeat(40))
            .replace("second_repl_offset:-1", "second_repl_offset:61");
        let look = parse(&text).unwrap();
        assert_eq!((look.replid2, look.replid2_offset), (Some(ReplId("7".repeat(40))), Some(61)));
    }

    #[test]
    fn a_server_without_its_own_version_field_gives_the_compatible_one() {
        let text = PRIMARY.replace("valkey_version:9.1.2\r\n", "");
        assert_eq!(parse(&text).unwrap().version, "7.2.4");
    }

    #[test]
    fn every_field_that_is_missing_or_doubled_is_named() {
        for line in replica().lines().filter(|line| line.contains(':') && !line.starts_with("slave")) {
            let (name, _) = line.split_once(':').unwrap();
            if ["redis_version", "valkey_version", "connected_slaves", "master_repl_offset"].contains(&name) {
                continue;
            }
            let without = replica().replace(&format!("{line}\r\n"), "");
            let missing = parse(&without).unwrap_err();
            assert!(matches!(missing, Garbled::Missing(field) if field == name), "{name}: {missing}");
            let doubled = parse(&format!("{}{line}\r\n", replica())).unwrap_err();
            assert!(matches!(doubled, Garbled::Twice(field) if field == name), "{name}: {doubled}");
        }
    }

    #[test]
    fn values_that_cannot_be_are_garbled() {
        for (from, to) in [
            ("run_id:01", "run_id:XX"),
            ("run_id:01", "run_id:0"),
            ("role:slave", "role:sentinel"),
            ("master_port:6379", "master_port:65536"),
            ("tcp_port:6379", "tcp_port:65536"),
            ("tcp_port:6379", "tcp_port:"),
            ("master_host:10.0.0.1", "master_host:"),
            ("master_host:10.0.0.1", "master_host:10.0.0.1 or so"),
            ("master_host:10.0.0.1", "master_host:\u{1b}[31m"),
            ("link_status:up", "link_status:maybe"),
            ("loading:0", "loading:yes"),
            ("slave_repl_offset:80", "slave_repl_offset:9223372036854775808"),
            ("ago:3", "ago:soon"),
            ("valkey_version:9.1.2", "valkey_version:"),
        ] {
            let text = replica().replace(from, to);
            assert!(matches!(parse(&text), Err(Garbled::Malformed(_))), "{to}: {:?}", parse(&text));
        }
        let far = replica().replace("10.0.0.1", &"x".repeat(WORD_CHARS_MAX + 1));
        assert_eq!(parse(&far), Err(Garbled::Malformed("master_host")));
        assert_eq!(parse(&"a:b\r\n".repeat(INFO_BYTES_MAX)), Err(Garbled::TooLong));
    }

    #[test]
    fn no_prefix_of_an_answer_and_no_broken_byte_makes_it_panic() {
        let text = replica();
        for end in 0..text.len() {
            let _ = parse(&text[..end]);
            let mut bytes = text.clone().into_bytes();
            bytes[end] ^= 0x15;
            let _ = parse(&String::from_utf8_lossy(&bytes));
        }
    }

    /// An answer with this port and these listeners.
    fn listening(text: &str, port: &str, listeners: &[&str]) -> String {
        let lines: String = listeners.iter().map(|line| format!("{line}\r\n")).collect();
        text.replace("tcp_port:6379\r\n", &format!("tcp_port:{port}\r\n{lines}"))
    }

    #[test]
    fn a_node_whose_port_was_never_open_follows_the_gate_whatever_it_is_to_the_others() {
        let (blank, history) = (GATE_PORT_BLANK, GATE_PORT_HISTORY);
        let begun_blank = format!("listener1:name=unix,bind=/run/vk/{}", crate::config::GATE_SOCKET_BLANK);
        let begun_with_data = format!("listener1:name=unix,bind=/run/vk/{GATE_SOCKET_HISTORY}");
        let (blank_line, history_line) = (begun_blank.as_str(), begun_with_data.as_str());
        let deeper = format!("{history_line}/of");
        for text in [PRIMARY.to_owned(), replica()] {
            for (listeners, port) in [
                (&[history_line][..], history),
                (&[blank_line], blank),
                // Nothing that can be read for a mark: an agent of an earlier build, another's listener, two of them.
                (&["listener1:name=unix,bind=/run/vk/valkeeper.sock"], blank),
                (&["listener1:name=unix"], blank),
                (&[deeper.as_str()], blank),
                (&[], blank),
                (&[history_line, blank_line], blank),
            ] {
                let plain = parse(&listening(&text, "0", listeners)).unwrap();
                let source = RawSource { host: GATE_ADDRESS.to_owned(), port };
                let role = RawRole::Replica { source, link: Link::Down };
                let gated = Info { role, last_io_ms: None, ..plain.clone() };
                assert_eq!(plain.behind_gate(), gated, "{listeners:?}: offset and history stay");
            }
        }
    }

    #[test]
    fn a_node_whose_port_is_open_or_was_is_what_it_says() {
        let socket = format!("listener1:name=unix,bind=/run/vk/{GATE_SOCKET_HISTORY}");
        for (port, listeners) in [
            ("6379", &["listener0:name=tcp,bind=10.0.0.1,port=6379", socket.as_str()][..]),
            ("6379", &[&socket]),
            ("6379", &[]),
            // Closed by somebody's hand: whoever was connected is still there and may write.
            ("0", &["listener0:name=tcp", &socket]),
            ("0", &["listener0:name=tcp,bind=10.0.0.1", &socket]),
            ("0", &["listener2:name=tls,bind=10.0.0.1,port=6380", &socket]),
        ] {
            for text in [PRIMARY.to_owned(), replica()] {
                let plain = parse(&listening(&text, port, listeners)).unwrap();
                assert_eq!(plain.port.to_string(), port);
                assert_eq!(plain.clone().behind_gate(), plain, "{listeners:?}");
            }
        }
    }

    #[test]
    fn a_source_is_the_gate_a_member_or_foreign() {
        let member = MemberId::new(0, 1);
        // Even if a member had the gate's address, the gate's ports mean the gate.
        let addresses = BTreeMap::from([("10.0.0.1".to_owned(), member), (GATE_ADDRESS.to_owned(), member)]);
        let at = |host: &str, port| resolve(&RawSource { host: host.to_owned(), port }, &addresses);
        assert_eq!(at(GATE_ADDRESS, GATE_PORT_HISTORY), Source::Gate { had_history: true });
        assert_eq!(at(GATE_ADDRESS, GATE_PORT_BLANK), Source::Gate { had_history: false });
        assert_eq!(at("10.0.0.1", 6379), Source::Member(member));
        assert_eq!(at("10.0.0.9", 6379), Source::Foreign("10.0.0.9:6379".to_owned()));
    }
}

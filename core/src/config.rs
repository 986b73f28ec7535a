//! valkey.conf as a pure text: typed settings in, one sorted file out, every value escaped by its type. What the
//! operator owns, which directive a version knows and what its value may be is the table in `directives`.

mod directives;
mod live;

pub use directives::{DIRECTIVES, Directive, Kind, Owner};
pub use live::{LiveSetting, SETTINGS_MARK, line, settings_of};

use crate::spec::{IoThreads, Profile};
use std::{collections::BTreeMap, fmt, str::FromStr};

/// Address that a server at the boot gate "follows": nobody ever answers there, so its link is never up and it
/// refuses PSYNC.
pub const GATE_ADDRESS: &str = "127.0.0.1";
/// Port of the gate of a server that found a data file when it started.
pub const GATE_PORT_HISTORY: u16 = 1;
/// Port of the gate of a server that found none: it is blank.
pub const GATE_PORT_BLANK: u16 = 2;
/// Name of the socket of a node of a Valkey Cluster that found no data file. A server in Cluster mode refuses to follow an address: there a
/// port that was never open is the gate, and the socket's name, which nobody can change, says what the server began with.
pub const GATE_SOCKET_BLANK: &str = "valkeeper-blank.sock";
/// The same of a server that found a data file.
pub const GATE_SOCKET_HISTORY: &str = "valkeeper-history.sock";

/// Port of every member.
pub const PORT: u16 = 6379;
/// Port at which the nodes of a Valkey Cluster talk to each other: Valkey's rule.
pub const BUS_PORT: u16 = PORT + 10_000;
/// What a node of a Valkey Cluster keeps of it, in the data directory.
pub const NODES_FILE: &str = "nodes.conf";
/// Directory of the data files.
pub const DATA_DIR: &str = "/data";
/// Snapshot in the data directory.
pub const RDB_FILE: &str = "dump.rdb";
/// Directory of the append-only files in the data directory.
pub const AOF_DIR: &str = "appendonlydir";
/// Where valkey.conf is mounted.
pub const CONF_DIR: &str = "/etc/valkey/conf";
/// Where users.acl and auth.conf are mounted.
pub const SECRET_DIR: &str = "/etc/valkey/secret";

/// How long a server that is told to stop waits for its replicas, in seconds: Valkey's default, named because the
/// pod's grace period must be longer.
pub const SHUTDOWN_TIMEOUT_S: u32 = 10;
/// Share of the memory limit that keys may use, in percent. The rest is for the copy-on-write pages of a snapshot,
/// the replication backlog, output buffers and fragmentation; a cgroup kill would cost more than the memory.
pub const MAXMEMORY_PERCENT: u64 = 60;
/// Least memory limit in bytes: an empty server with a backlog takes about 20 MiB.
pub const MEMORY_LIMIT_MIN_BYTES: u64 = 64 << 20;
/// Oldest version served: 7.2 has other names (masterauth) and no hide-user-data-from-log.
pub const VERSION_MIN: ServerVersion = ServerVersion { major: 8, minor: 0 };

/// Backlog where there is no memory limit, in bytes: a minute at 1 MiB/s.
const BACKLOG_DEFAULT_BYTES: u64 = 64 << 20;
/// Least and greatest backlog in bytes. Below, any restart of a replica is a full synchronisation; above, longer
/// absences are cheaper as one.
const BACKLOG_BYTES: (u64, u64) = (4 << 20, 256 << 20);
/// Share of the memory limit for the backlog, in percent.
const BACKLOG_PERCENT: u64 = 5;
/// Least and greatest node timeout of a Valkey Cluster in milliseconds. Below, a stall by fork looks like death to the other nodes;
/// above, a failover of their own while the operator is away takes longer for nothing.
const NODE_TIMEOUT_MS: (i64, i64) = (1_000, 2_000);
/// How much shorter than the detection window it is, in milliseconds: a primary that reaches no majority of the others refuses writes after
/// this timeout, and shall have when the operator acts.
const NODE_TIMEOUT_MARGIN_MS: i64 = 1_000;
/// Node timeouts for which a replica may have been cut off and is still elected: Valkey's default. Without this bound the nodes elect
/// one that is empty.
const REPLICA_VALIDITY_FACTOR: i64 = 10;
/// How long a node that was forgotten is not heard of again, so that everyone has been told. Valkey's minute would keep out a shard that
/// is removed and wanted again: its members come back with their ids. Seconds.
const FORGOTTEN_S: i64 = 5;
/// First version in which it can be set how long a handover between two nodes may take.
const HANDOVER_BOUND_SINCE: ServerVersion = ServerVersion { major: 8, minor: 1 };
/// How long that is: as long as the operator plans with. Milliseconds.
const HANDOVER_MAX_MS: i64 = 3_000;
/// Ended handovers of slots that a server remembers: each look reads them all, and the last one is enough. Count.
const MIGRATION_LOG_MAX: i64 = 16;
/// First version that hands slots over atomically (`CLUSTER MIGRATESLOTS`). Before it they go key by key, which takes many times as long and
/// sends clients to and fro.
pub const ATOMIC_SLOTS_SINCE: ServerVersion = ServerVersion { major: 9, minor: 0 };
/// First release that does so with I/O threads as well; before it jobs hang. Major, minor, patch.
pub const ATOMIC_SLOTS_WITH_THREADS_SINCE: (u16, u16, u16) = (9, 1, 2);
/// First version that hands its slots over when it is told to stop.
const FAILOVER_ON_SIGTERM_SINCE: ServerVersion = ServerVersion { major: 9, minor: 0 };
/// Snapshot times: after an hour with one change, five minutes with a hundred, a minute with ten thousand. A snapshot
/// also carries the replication id and offset, without which a restarted member's history cannot be ordered.
const SAVE_POINTS: &str = "3600 1 300 100 60 10000";

/// Major and minor version of a server: configuration never depends on a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServerVersion {
    /// The 9 of 9.1.2.
    pub major: u16,
    /// The 1 of 9.1.2.
    pub minor: u16,
}

impl fmt::Display for ServerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A text that does not begin with MAJOR.MINOR.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a version: expected MAJOR.MINOR or MAJOR.MINOR.PATCH, for example 9.1")]
pub struct NotAVersion(String);

impl FromStr for ServerVersion {
    type Err = NotAVersion;

    /// Reads `9.1`, `9.1.2`, `v9.1.2-alpine`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bare = text.strip_prefix('v').unwrap_or(text);
        let bare = bare.split(['-', '+', '_']).next().unwrap_or(bare);
        let mut parts = bare.split('.').map(str::parse);
        match (parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok(ServerVersion { major, minor }),
            (Some(_) | None, _) => Err(NotAVersion(text.to_owned())),
        }
    }
}

/// True if a server of this release, such as 9.1.2, can hand slots over atomically.
pub fn is_atomic(release: &str, threads: IoThreads) -> bool {
    let Ok(version) = release.parse::<ServerVersion>() else { return false };
    let bare = release.split(['-', '+', '_']).next().unwrap_or(release);
    let patch = bare.split('.').nth(2).and_then(|patch| patch.parse().ok()).unwrap_or_default();
    let whole: (u16, u16, u16) = (version.major, version.minor, patch);
    match threads {
        IoThreads::Off => version >= ATOMIC_SLOTS_SINCE,
        IoThreads::On => whole >= ATOMIC_SLOTS_WITH_THREADS_SINCE,
    }
}

/// Which data files a server writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// None.
    Nothing,
    /// Snapshots.
    Rdb,
    /// Snapshots and the append-only file.
    RdbAof,
}

/// A value of a known type, as it will be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Setting {
    /// `yes` or `no`.
    YesNo(bool),
    /// A whole number.
    Integer(i64),
    /// A size in bytes.
    Bytes(u64),
    /// A share in percent.
    Percent(u8),
    /// One word or text.
    Text(String),
    /// Several words.
    Words(Vec<String>),
}

impl Setting {
    /// The value as it stands in valkey.conf, escaped so that it can be nothing but one value.
    pub fn render(&self) -> String {
        self.words().iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }

    /// The value word by word, as it is.
    pub fn words(&self) -> Vec<String> {
        match self {
            Setting::YesNo(true) => vec!["yes".to_owned()],
            Setting::YesNo(false) => vec!["no".to_owned()],
            Setting::Integer(number) => vec![number.to_string()],
            Setting::Bytes(bytes) => vec![bytes.to_string()],
            Setting::Percent(share) => vec![format!("{share}%")],
            Setting::Text(text) => vec![text.clone()],
            Setting::Words(words) => words.clone(),
        }
    }
}

/// A text as one argument of a configuration line: bare if it is plain, else in double quotes with every byte that
/// could end the argument or the line escaped.
pub fn quoted(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-./:*+@%,".contains(&b);
    if !text.is_empty() && text.bytes().all(plain) {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for byte in text.bytes() {
        match byte {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            b' '..=b'~' => out.push(char::from(byte)),
            other => out.push_str(&format!("\\x{other:02x}")),
        }
    }
    out.push('"');
    out
}

/// Why a directive of the user is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nobody knows it.
    #[error("it is no directive of Valkey that the operator knows")]
    Unknown,
    /// The operator sets it.
    #[error("the operator owns it: {0}")]
    Owned(&'static str),
    /// Not in this version.
    #[error("Valkey {version} does not have it: {has}")]
    Version {
        /// The version asked for.
        version: ServerVersion,
        /// Which versions have it.
        has: String,
    },
    /// The value is not of its type.
    #[error("allowed: {allowed}")]
    Value {
        /// What is allowed.
        allowed: String,
    },
}

/// Reads one directive of the user.
///
/// # Errors
/// Why it is refused for this version.
pub fn read(name: &str, value: &str, version: ServerVersion) -> Result<Setting, Refusal> {
    let directive = Directive::find(name).ok_or(Refusal::Unknown)?;
    if let Owner::Operator(why) = directive.owner {
        return Err(Refusal::Owned(why));
    }
    if !directive.is_in(version) {
        return Err(Refusal::Version { version, has: directive.versions() });
    }
    directive.kind.read(value).ok_or_else(|| Refusal::Value { allowed: directive.kind.allowed() })
}

/// How long the nodes of a Valkey Cluster wait for one that does not answer, in milliseconds.
pub fn node_timeout_ms(detection_window_ms: i64) -> i64 {
    let (least, most) = NODE_TIMEOUT_MS;
    (detection_window_ms - NODE_TIMEOUT_MARGIN_MS).clamp(least, most)
}

/// Everything that valkey.conf depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerConfig {
    /// Version of the server.
    pub version: ServerVersion,
    /// What the data is worth.
    pub profile: Profile,
    /// How long its node waits for another, in milliseconds; `None`: it is in no Valkey Cluster.
    pub node_timeout_ms: Option<i64>,
    /// Which files it writes.
    pub files: Files,
    /// Memory limit of the container in bytes, if it has one.
    pub memory_limit_bytes: Option<u64>,
    /// The user's settings, read by [`read`]; they win over the operator's defaults.
    pub settings: BTreeMap<String, Setting>,
}

impl ServerConfig {
    /// The text of valkey.conf: sorted, one directive a line.
    pub fn render(&self) -> String {
        let mut out =
            String::from("# Written by valkeeper. Change spec.config of the ValkeyCluster instead.\n");
        out.push_str(&format!("{SETTINGS_MARK}{}\n", self.live_digest()));
        for (name, setting) in &self.all() {
            out.push_str(&format!("{name} {}\n", setting.render()));
        }
        out
    }

    /// Every directive that is named, by the user or by the operator.
    fn all(&self) -> BTreeMap<&str, Setting> {
        let mut all = self.defaults();
        all.extend(self.settings.iter().map(|(name, setting)| (name.as_str(), setting.clone())));
        all
    }

    fn defaults(&self) -> BTreeMap<&str, Setting> {
        let mut all = fixed();
        all.insert("appendonly", Setting::YesNo(self.files == Files::RdbAof));
        let save = match self.files {
            Files::Nothing => Setting::Text(String::new()),
            Files::Rdb | Files::RdbAof => words(SAVE_POINTS),
        };
        all.insert("save", save);
        let eviction = match self.profile {
            Profile::Cache => "allkeys-lru",
            Profile::Durable => "noeviction",
        };
        all.insert("maxmemory-policy", Setting::Text(eviction.to_owned()));
        let share = |percent: u64| self.memory_limit_bytes.map(|limit| limit / 100 * percent);
        if let Some(bytes) = share(MAXMEMORY_PERCENT) {
            all.insert("maxmemory", Setting::Bytes(bytes));
        }
        let (least, most) = BACKLOG_BYTES;
        let backlog = share(BACKLOG_PERCENT).map_or(BACKLOG_DEFAULT_BYTES, |b| b.clamp(least, most));
        all.insert("repl-backlog-size", Setting::Bytes(backlog));
        all.extend(self.node_timeout_ms.into_iter().flat_map(|timeout_ms| self.of_node(timeout_ms)));
        all
    }

    fn of_node(&self, timeout_ms: i64) -> BTreeMap<&'static str, Setting> {
        let mut all = BTreeMap::from([
            // Who belongs to which shard is the operator's.
            ("cluster-allow-replica-migration", Setting::YesNo(false)),
            ("cluster-blacklist-ttl", Setting::Integer(FORGOTTEN_S)),
            ("cluster-config-file", Setting::Text(NODES_FILE.to_owned())),
            ("cluster-enabled", Setting::YesNo(true)),
            ("cluster-node-timeout", Setting::Integer(timeout_ms)),
            ("cluster-replica-validity-factor", Setting::Integer(REPLICA_VALIDITY_FACTOR)),
            // A shard that is down is no reason for the others to refuse.
            ("cluster-require-full-coverage", Setting::YesNo(false)),
        ]);
        if self.version >= FAILOVER_ON_SIGTERM_SINCE {
            all.insert("shutdown-on-sigterm", Setting::Text("failover".to_owned()));
            all.insert("cluster-slot-migration-log-max-len", Setting::Integer(MIGRATION_LOG_MAX));
        }
        if self.version >= HANDOVER_BOUND_SINCE {
            all.insert("cluster-manual-failover-timeout", Setting::Integer(HANDOVER_MAX_MS));
        }
        all
    }
}

/// What every member has, whatever the spec.
fn fixed() -> BTreeMap<&'static str, Setting> {
    let text = |t: &str| Setting::Text(t.to_owned());
    BTreeMap::from([
        ("aclfile", Setting::Text(format!("{SECRET_DIR}/users.acl"))),
        ("appenddirname", text(AOF_DIR)),
        ("appendfsync", text("everysec")),
        ("bind", words("* -::*")),
        ("daemonize", Setting::YesNo(false)),
        ("dbfilename", text(RDB_FILE)),
        ("dir", text(DATA_DIR)),
        // Both would let a client with the password run code or read files as the server.
        ("enable-debug-command", text("no")),
        ("enable-protected-configs", text("no")),
        ("hide-user-data-from-log", Setting::YesNo(true)),
        // primaryuser and primaryauth: a secret, so not in this file.
        ("include", Setting::Text(format!("{SECRET_DIR}/auth.conf"))),
        ("port", Setting::Integer(i64::from(PORT))),
        // Authentication is by ACL; protected mode would only refuse other pods.
        ("protected-mode", Setting::YesNo(false)),
        // A replica at the gate or cut off still answers, so that it can be asked what it has.
        ("replica-serve-stale-data", Setting::YesNo(true)),
        ("repl-diskless-sync-delay", Setting::Integer(0)),
        // Replicas are witnesses of a silent primary: they must hear from a living one well within the window.
        ("repl-ping-replica-period", Setting::Integer(1)),
        ("shutdown-timeout", Setting::Integer(i64::from(SHUTDOWN_TIMEOUT_S))),
        ("tcp-keepalive", Setting::Integer(60)),
    ])
}

fn words(text: &str) -> Setting {
    Setting::Words(text.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V9_1: ServerVersion = ServerVersion { major: 9, minor: 1 };
    const V8_0: ServerVersion = ServerVersion { major: 8, minor: 0 };

    fn config(profile: Profile, files: Files, limit: Option<u64>) -> ServerConfig {
        ServerConfig {
            version: V9_1,
            profile,
            node_timeout_ms: None,
            files,
            memory_limit_bytes: limit,
            settings: BTreeMap::new(),
        }
    }

    /// Splits a line as Valkey does: words, and double quotes with escapes.
    fn split(line: &str) -> Vec<Vec<u8>> {
        let (mut out, mut chars) = (Vec::new(), line.bytes().peekable());
        loop {
            while chars.next_if(u8::is_ascii_whitespace).is_some() {}
            let Some(&first) = chars.peek() else { return out };
            let mut word = Vec::new();
            if first == b'"' {
                chars.next();
                while let Some(c) = chars.next() {
                    match c {
                        b'"' => break,
                        b'\\' => match chars.next().unwrap() {
                            b'n' => word.push(b'\n'),
                            b'r' => word.push(b'\r'),
                            b't' => word.push(b'\t'),
                            b'x' => {
                                let hex = [chars.next().unwrap(), chars.next().unwrap()];
                                word.push(
                                    u8::from_str_radix(std::str::from_utf8(&hex).unwrap(), 16).unwrap(),
                                );
                            }
                            other => word.push(other),
                        },
                        other => word.push(other),
                    }
                }
            } else {
                while let Some(c) = chars.next_if(|c| !c.is_ascii_whitespace()) {
                    word.push(c);
                }
            }
            out.push(word);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_exactly_one_value_on_one_line(text in any::<String>()) {
            let rendered = Setting::Text(text.clone()).render();
            prop_assert!(!rendered.contains(['\n', '\r']));
            prop_assert_eq!(split(&rendered), vec![text.into_bytes()]);
        }
    }

    #[test]
    fn a_value_cannot_smuggle_in_another_directive() {
        let mut config = config(Profile::Cache, Files::Nothing, None);
        let sly = read("locale-collate", "C\nrequirepass \"\"", V9_1).unwrap();
        config.settings.insert("locale-collate".into(), sly);
        assert!(!config.render().lines().any(|l| l.starts_with("requirepass")));
    }

    #[test]
    fn durable_keeps_and_cache_evicts() {
        let durable = config(Profile::Durable, Files::RdbAof, Some(1 << 30)).render();
        for line in ["appendonly yes", "save 3600 1 300 100 60 10000", "maxmemory-policy noeviction"] {
            assert!(durable.lines().any(|l| l == line), "{line} in\n{durable}");
        }
        let cache = config(Profile::Cache, Files::Nothing, Some(1 << 30)).render();
        for line in ["appendonly no", "save \"\"", "maxmemory-policy allkeys-lru", "maxmemory 644245080"] {
            assert!(cache.lines().any(|l| l == line), "{line} in\n{cache}");
        }
    }

    #[test]
    fn keys_backlog_and_a_base_fit_into_every_allowed_limit() {
        for limit in [MEMORY_LIMIT_MIN_BYTES, 256 << 20, 1 << 30, 64 << 30] {
            let defaults = config(Profile::Durable, Files::RdbAof, Some(limit));
            let defaults = defaults.defaults();
            let (Setting::Bytes(max), Setting::Bytes(backlog)) =
                (&defaults["maxmemory"], &defaults["repl-backlog-size"])
            else {
                panic!("sizes")
            };
            assert!(max + backlog + (12 << 20) < limit, "{limit}");
        }
    }

    #[test]
    fn lines_are_sorted_and_every_one_is_known_to_the_oldest_version() {
        let text = config(Profile::Durable, Files::RdbAof, None).render();
        let names: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|l| l.split(' ').next().unwrap())
            .collect();
        assert!(names.is_sorted());
        for name in names {
            assert!(Directive::find(name).unwrap().is_in(VERSION_MIN), "{name}");
        }
    }

    #[test]
    fn what_the_user_may_set_wins_over_a_default() {
        let mut config = config(Profile::Durable, Files::RdbAof, Some(1 << 30));
        let setting = read("appendfsync", "always", V9_1).unwrap();
        config.settings.insert("appendfsync".into(), setting);
        let text = config.render();
        assert!(text.contains("appendfsync always\n") && !text.contains("everysec"));
    }

    #[test]
    fn a_node_of_a_valkey_cluster_says_so_and_another_server_says_nothing_of_it() {
        let alone = config(Profile::Durable, Files::RdbAof, None);
        assert!(!alone.render().contains("cluster-") && !alone.render().contains("shutdown-on"));
        let node = ServerConfig { node_timeout_ms: Some(node_timeout_ms(3_000)), ..alone };
        for line in [
            "cluster-enabled yes",
            "cluster-config-file nodes.conf",
            "cluster-node-timeout 2000",
            "cluster-allow-replica-migration no",
            "cluster-blacklist-ttl 5",
            "cluster-require-full-coverage no",
            "cluster-replica-validity-factor 10",
            "shutdown-on-sigterm failover",
            "cluster-manual-failover-timeout 3000",
            "cluster-slot-migration-log-max-len 16",
        ] {
            assert!(node.render().lines().any(|l| l == line), "{line} in\n{}", node.render());
        }
        let older = ServerConfig { version: V8_0, ..node };
        assert!(!older.render().contains("shutdown-on-sigterm") && !older.render().contains("migration-log"));
        assert!(!older.render().contains("cluster-manual-failover-timeout"));
        assert_eq!([2_000, 2_500, 60_000].map(node_timeout_ms), [1_000, 1_500, 2_000]);
    }

    #[test]
    fn what_the_operator_owns_is_refused_with_the_reason() {
        for name in
            ["port", "dir", "replicaof", "aclfile", "requirepass", "primaryauth", "masterauth", "include"]
                .into_iter()
                .chain(["cluster-enabled", "cluster-node-timeout", "cluster-announce-ip"])
        {
            assert!(matches!(read(name, "x", V9_1), Err(Refusal::Owned(_))), "{name}");
        }
        assert_eq!(read("prot", "1", V9_1), Err(Refusal::Unknown));
    }

    #[test]
    fn a_directive_is_refused_where_its_version_does_not_have_it() {
        assert!(read("log-format", "logfmt", V9_1).is_ok());
        let refusal = read("log-format", "logfmt", V8_0).unwrap_err();
        assert_eq!(refusal.to_string(), "Valkey 8.0 does not have it: since 8.1");
        assert!(read("dynamic-hz", "yes", V8_0).is_ok());
        assert_eq!(
            read("dynamic-hz", "yes", V9_1).unwrap_err().to_string(),
            "Valkey 9.1 does not have it: until 8.0"
        );
    }

    #[test]
    fn values_are_read_by_type() {
        assert_eq!(read("maxmemory", "100mb", V9_1), Ok(Setting::Bytes(100 << 20)));
        assert_eq!(read("maxmemory", "1k", V9_1), Ok(Setting::Bytes(1000)));
        assert_eq!(read("maxmemory-clients", "5%", V9_1), Ok(Setting::Percent(5)));
        assert_eq!(read("activedefrag", "yes", V9_1), Ok(Setting::YesNo(true)));
        assert!(read("activedefrag", "true", V9_1).is_err());
        assert!(read("maxmemory", "a lot", V9_1).is_err());
        assert!(read("maxmemory-policy", "random", V9_1).is_err());
        assert!(read("io-threads", "0", V9_1).is_err());
        let limit = read("client-output-buffer-limit", "replica 512mb 128mb 60", V9_1).unwrap();
        assert_eq!(limit.render(), "replica 512mb 128mb 60");
    }

    #[test]
    fn slots_go_atomically_from_9_0_on_and_beside_io_threads_from_9_1_2_on() {
        for (release, alone, beside) in [
            ("8.1.4", false, false),
            ("9.0.0", true, false),
            ("9.1.1", true, false),
            ("9.1.2", true, true),
            ("v9.1.10-alpine", true, true),
            ("10.0", true, true),
            ("9.1", true, false),
            ("nine", false, false),
        ] {
            let found = [IoThreads::Off, IoThreads::On].map(|threads| is_atomic(release, threads));
            assert_eq!(found, [alone, beside], "{release}");
        }
    }

    #[test]
    fn versions_are_read_from_tags() {
        for text in ["9.1", "9.1.2", "v9.1.2", "9.1.2-alpine3.22"] {
            assert_eq!(text.parse::<ServerVersion>().unwrap(), V9_1, "{text}");
        }
        for text in ["latest", "9", "", "9.x", "bookworm"] {
            assert!(text.parse::<ServerVersion>().is_err(), "{text}");
        }
    }
}

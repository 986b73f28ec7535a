//! The directives of valkey.conf from 8.0 to 9.1: type of the value, versions that have it, and whether it is the
//! user's to set. A directive that is not here is refused: a typing error must not wait for a server to die of it.

use super::{ServerVersion, Setting};

/// Who sets a directive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The user may.
    User,
    /// Only the operator, for this reason.
    Operator(&'static str),
}

/// Type of a directive's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `yes` or `no`.
    YesNo,
    /// A whole number from the first to the second, both included.
    Integer(i64, i64),
    /// A size: a number, or one with b, k, kb, m, mb, g, gb.
    Bytes,
    /// A size or a share such as 5%.
    BytesOrPercent,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Any of these letters, or none.
    Letters(&'static str),
    /// Any one text.
    Text,
    /// Words separated by spaces.
    Words,
}

impl Kind {
    /// The value read as this type, if it is one.
    pub fn read(self, value: &str) -> Option<Setting> {
        match self {
            Kind::YesNo => match value {
                "yes" => Some(Setting::YesNo(true)),
                "no" => Some(Setting::YesNo(false)),
                _ => None,
            },
            Kind::Integer(least, most) => {
                value.parse().ok().filter(|n| (least..=most).contains(n)).map(Setting::Integer)
            }
            Kind::Bytes => read_bytes(value).map(Setting::Bytes),
            Kind::BytesOrPercent => match value.strip_suffix('%') {
                Some(share) => share.parse().ok().filter(|p| *p <= 100).map(Setting::Percent),
                None => read_bytes(value).map(Setting::Bytes),
            },
            Kind::Choice(words) => words.contains(&value).then(|| Setting::Text(value.to_owned())),
            Kind::Letters(letters) => {
                value.chars().all(|c| letters.contains(c)).then(|| Setting::Text(value.to_owned()))
            }
            Kind::Text => Some(Setting::Text(value.to_owned())),
            Kind::Words => {
                let words: Vec<String> = value.split_whitespace().map(str::to_owned).collect();
                (!words.is_empty()).then_some(Setting::Words(words))
            }
        }
    }

    /// What is allowed, for people.
    pub fn allowed(self) -> String {
        match self {
            Kind::YesNo => "yes, no".to_owned(),
            Kind::Integer(least, i64::MAX) => format!("a whole number from {least}"),
            Kind::Integer(least, most) => format!("a whole number from {least} to {most}"),
            Kind::Bytes => "a size such as 100mb".to_owned(),
            Kind::BytesOrPercent => "a size such as 100mb or a share such as 5%".to_owned(),
            Kind::Choice(words) => words.join(", "),
            Kind::Letters(letters) => format!("letters of {letters}"),
            Kind::Text => "any text".to_owned(),
            Kind::Words => "words separated by spaces".to_owned(),
        }
    }
}

fn read_bytes(value: &str) -> Option<u64> {
    let digits = value.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = value.split_at(digits);
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" => 1_000,
        "kb" => 1 << 10,
        "m" => 1_000_000,
        "mb" => 1 << 20,
        "g" => 1_000_000_000,
        "gb" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// One directive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directive {
    /// Its name.
    pub name: &'static str,
    /// Type of its value.
    pub kind: Kind,
    /// First version that has it.
    pub since: ServerVersion,
    /// Last version that has it; `None`: the newest has it.
    pub until: Option<ServerVersion>,
    /// Who sets it.
    pub owner: Owner,
    /// What a server has that is not told otherwise, if it can be told while it runs; `None`: it needs a restart, or somebody else tells
    /// it. `tests/valkey/settings.rs` holds both against a server.
    pub live: Option<&'static str>,
}

impl Directive {
    /// The directive of this name.
    pub fn find(name: &str) -> Option<&'static Directive> {
        DIRECTIVES.binary_search_by(|d| d.name.cmp(name)).ok().and_then(|i| DIRECTIVES.get(i))
    }

    /// True if servers of this version have it.
    pub fn is_in(&self, version: ServerVersion) -> bool {
        version >= self.since && self.until.is_none_or(|last| version <= last)
    }

    /// Which versions have it, for people.
    pub fn versions(&self) -> String {
        match self.until {
            Some(last) => format!("until {last}"),
            None => format!("since {}", self.since),
        }
    }

    const fn since(mut self, major: u16, minor: u16) -> Self {
        self.since = ServerVersion { major, minor };
        self
    }

    const fn until(mut self, major: u16, minor: u16) -> Self {
        self.until = Some(ServerVersion { major, minor });
        self
    }

    const fn live(mut self, default: &'static str) -> Self {
        self.live = Some(default);
        self
    }
}

const fn user(name: &'static str, kind: Kind) -> Directive {
    Directive {
        name,
        kind,
        since: ServerVersion { major: 8, minor: 0 },
        until: None,
        owner: Owner::User,
        live: None,
    }
}

const fn owned(name: &'static str, why: &'static str) -> Directive {
    Directive { owner: Owner::Operator(why), ..user(name, Kind::Text) }
}

const ADDRESS: &str = "members are found by it";
const CLUSTER: &str =
    "the operator decides how the nodes of topology Cluster find each other and who is elected";
const FILES: &str = "set spec.profile and spec.persistence instead";
const LINK: &str = "the operator decides who follows whom and how closely it is watched";
const PROCESS: &str = "the container runs one server in the foreground and logs to its output";
const SECURITY: &str = "it would open the server to more than its users need";
const TLS: &str = "TLS is not available yet";
const USERS: &str = "users and passwords are in Secrets";

const YES_NO: Kind = Kind::YesNo;
const COUNT: Kind = Kind::Integer(0, i64::MAX);
const SIGNED: Kind = Kind::Integer(i64::MIN, i64::MAX);
const PERCENT: Kind = Kind::Integer(0, 100);
const LEVELS: Kind = Kind::Choice(&["debug", "verbose", "notice", "warning", "nothing"]);
const EVENTS: Kind = Kind::Letters("AKEg$lshzxetdmn");
const EVICTION: Kind = Kind::Choice(&[
    "allkeys-lfu",
    "allkeys-lru",
    "allkeys-random",
    "noeviction",
    "volatile-lfu",
    "volatile-lru",
    "volatile-random",
    "volatile-ttl",
]);

/// Every known directive, sorted by name.
pub const DIRECTIVES: &[Directive] = &[
    user("acl-pubsub-default", Kind::Choice(&["allchannels", "resetchannels"])).live("resetchannels"),
    owned("aclfile", USERS),
    user("acllog-max-len", COUNT).live("128"),
    user("active-defrag-cycle-max", Kind::Integer(1, 99)).live("25"),
    user("active-defrag-cycle-min", Kind::Integer(1, 99)).live("1"),
    user("active-defrag-cycle-us", Kind::Integer(0, 100_000)).since(8, 1).live("500"),
    user("active-defrag-ignore-bytes", Kind::Bytes).live("104857600"),
    user("active-defrag-max-scan-fields", Kind::Integer(1, i64::MAX)).live("1000"),
    user("active-defrag-threshold-lower", Kind::Integer(0, 1000)).live("10"),
    user("active-defrag-threshold-upper", Kind::Integer(0, 1000)).live("100"),
    user("active-expire-effort", Kind::Integer(1, 10)).live("1"),
    user("activedefrag", YES_NO).live("no"),
    user("activerehashing", YES_NO).live("yes"),
    user("always-show-logo", YES_NO),
    user("aof-disable-auto-gc", YES_NO).live("no"),
    user("aof-load-truncated", YES_NO).live("yes"),
    user("aof-rewrite-cpulist", Kind::Text),
    user("aof-rewrite-incremental-fsync", YES_NO).live("yes"),
    user("aof-timestamp-enabled", YES_NO).live("no"),
    user("aof-use-rdb-preamble", YES_NO).live("yes"),
    owned("appenddirname", FILES),
    owned("appendfilename", FILES),
    user("appendfsync", Kind::Choice(&["always", "everysec", "no"])).live("everysec"),
    owned("appendonly", FILES),
    user("auto-aof-rewrite-min-size", Kind::Bytes).live("67108864"),
    user("auto-aof-rewrite-percentage", COUNT).live("100"),
    user("availability-zone", Kind::Text).live(""),
    user("bgsave-cpulist", Kind::Text),
    owned("bind", ADDRESS),
    owned("bind-source-addr", ADDRESS),
    user("bio-cpulist", Kind::Text),
    user("busy-reply-threshold", COUNT).live("5000"),
    user("client-output-buffer-limit", Kind::Words)
        .live("normal 0 0 0 replica 268435456 67108864 60 pubsub 33554432 8388608 60"),
    user("client-query-buffer-limit", Kind::Bytes).live("1073741824"),
    user("cluster-allow-pubsubshard-when-down", YES_NO).live("yes"),
    user("cluster-allow-reads-when-down", YES_NO).live("no"),
    owned("cluster-allow-replica-migration", CLUSTER),
    owned("cluster-announce-bus-port", CLUSTER),
    owned("cluster-announce-client-ipv4", CLUSTER),
    owned("cluster-announce-client-ipv6", CLUSTER),
    owned("cluster-announce-hostname", CLUSTER),
    owned("cluster-announce-human-nodename", CLUSTER),
    owned("cluster-announce-ip", CLUSTER),
    owned("cluster-announce-port", CLUSTER),
    owned("cluster-announce-tls-port", CLUSTER),
    owned("cluster-blacklist-ttl", CLUSTER),
    owned("cluster-config-file", CLUSTER),
    owned("cluster-config-save-behavior", CLUSTER).since(9, 1),
    owned("cluster-databases", CLUSTER).since(9, 0),
    owned("cluster-enabled", CLUSTER),
    user("cluster-link-sendbuf-limit", Kind::Bytes).live("0"),
    owned("cluster-manual-failover-timeout", CLUSTER).since(8, 1),
    owned("cluster-migration-barrier", CLUSTER),
    owned("cluster-node-timeout", CLUSTER),
    owned("cluster-ping-interval", CLUSTER),
    owned("cluster-port", CLUSTER),
    owned("cluster-preferred-endpoint-type", CLUSTER),
    owned("cluster-replica-no-failover", CLUSTER),
    owned("cluster-replica-validity-factor", CLUSTER),
    owned("cluster-require-full-coverage", CLUSTER),
    owned("cluster-slot-migration-log-max-len", CLUSTER).since(9, 0),
    user("cluster-slot-stats-enabled", YES_NO).live("no"),
    user("commandlog-execution-slower-than", SIGNED).since(8, 1),
    user("commandlog-large-reply-max-len", COUNT).since(8, 1).live("128"),
    user("commandlog-large-request-max-len", COUNT).since(8, 1).live("128"),
    user("commandlog-reply-larger-than", SIGNED).since(8, 1).live("1048576"),
    user("commandlog-request-larger-than", SIGNED).since(8, 1).live("1048576"),
    user("commandlog-slow-execution-max-len", COUNT).since(8, 1),
    user("crash-log-enabled", YES_NO).live("yes"),
    user("crash-memcheck-enabled", YES_NO).live("yes"),
    owned("daemonize", PROCESS),
    user("databases", Kind::Integer(1, i32::MAX as i64)),
    owned("dbfilename", FILES),
    owned("dir", FILES),
    user("disable-thp", YES_NO),
    user("dual-channel-replication-enabled", YES_NO).live("no"),
    user("dynamic-hz", YES_NO).until(8, 0).live("yes"),
    owned("enable-debug-command", SECURITY),
    owned("enable-module-command", SECURITY),
    owned("enable-protected-configs", SECURITY),
    user("events-per-io-thread", COUNT).until(9, 0).live("2"),
    user("extended-redis-compatibility", YES_NO).live("no"),
    user("hash-max-listpack-entries", COUNT).live("512"),
    user("hash-max-listpack-value", Kind::Bytes).live("64"),
    user("hash-seed", Kind::Text).since(9, 1),
    owned("hide-user-data-from-log", SECURITY),
    user("hll-sparse-max-bytes", Kind::Bytes).live("3000"),
    user("hz", Kind::Integer(1, 500)).live("10"),
    owned("ignore-warnings", PROCESS),
    owned("import-mode", LINK).since(8, 1),
    owned("include", "the file is written by the operator alone"),
    user("io-threads", Kind::Integer(1, 128)),
    user("io-threads-do-reads", YES_NO).until(8, 0),
    user("jemalloc-bg-thread", YES_NO).live("yes"),
    user("latency-monitor-threshold", COUNT).live("0"),
    user("latency-tracking", YES_NO).live("yes"),
    user("latency-tracking-info-percentiles", Kind::Words).live("50 99 99.9"),
    user("lazyfree-lazy-eviction", YES_NO).live("yes"),
    user("lazyfree-lazy-expire", YES_NO).live("yes"),
    user("lazyfree-lazy-server-del", YES_NO).live("yes"),
    user("lazyfree-lazy-user-del", YES_NO).live("yes"),
    user("lazyfree-lazy-user-flush", YES_NO).live("yes"),
    user("lfu-decay-time", COUNT).live("1"),
    user("lfu-log-factor", COUNT).live("10"),
    user("list-compress-depth", COUNT).live("0"),
    user("list-max-listpack-size", SIGNED).live("-2"),
    owned("loadmodule", SECURITY),
    user("locale-collate", Kind::Text).live(""),
    user("log-format", Kind::Choice(&["legacy", "logfmt"])).since(8, 1).live("legacy"),
    user("log-timestamp-format", Kind::Choice(&["iso8601", "legacy", "milliseconds"]))
        .since(8, 1)
        .live("legacy"),
    owned("logfile", PROCESS),
    user("loglevel", LEVELS).live("notice"),
    user("lua-time-limit", COUNT),
    owned("masterauth", USERS),
    owned("masteruser", USERS),
    user("max-new-connections-per-cycle", Kind::Integer(1, 1000)).live("10"),
    owned("max-new-tls-connections-per-cycle", TLS),
    // The operator needs a connection of its own, and so do replicas and probes.
    user("maxclients", Kind::Integer(64, u32::MAX as i64)).live("10000"),
    user("maxmemory", Kind::Bytes).live("0"),
    user("maxmemory-clients", Kind::BytesOrPercent).live("0"),
    user("maxmemory-eviction-tenacity", PERCENT).live("10"),
    user("maxmemory-policy", EVICTION).live("noeviction"),
    user("maxmemory-samples", Kind::Integer(1, 64)).live("5"),
    user("min-replicas-max-lag", COUNT),
    user("min-replicas-to-write", COUNT),
    user("no-appendfsync-on-rewrite", YES_NO).live("no"),
    user("notify-keyspace-events", EVENTS).live(""),
    owned("oom-score-adj", PROCESS),
    owned("oom-score-adj-values", PROCESS),
    owned("pidfile", PROCESS),
    owned("port", ADDRESS),
    user("prefetch-batch-max-size", Kind::Integer(0, 128)).live("16"),
    owned("primaryauth", USERS),
    owned("primaryuser", USERS),
    owned("proc-title-template", PROCESS),
    user("propagation-error-behavior", Kind::Choice(&["ignore", "panic", "panic-on-replicas"]))
        .live("ignore"),
    owned("protected-mode", SECURITY),
    user("proto-max-bulk-len", Kind::Bytes).live("536870912"),
    user("rdb-del-sync-files", YES_NO).live("no"),
    user("rdb-save-incremental-fsync", YES_NO).live("yes"),
    user("rdb-version-check", Kind::Choice(&["relaxed", "strict"])).since(8, 1).live("strict"),
    user("rdbchecksum", YES_NO),
    user("rdbcompression", YES_NO).live("yes"),
    owned("rename-command", "the operator needs every command under its name; take commands away by ACL"),
    user("repl-backlog-size", Kind::Bytes).live("10485760"),
    user("repl-backlog-ttl", COUNT).live("3600"),
    user("repl-disable-tcp-nodelay", YES_NO).live("no"),
    user("repl-diskless-load", Kind::Choice(&["disabled", "on-empty-db", "swapdb"])).live("disabled"),
    user("repl-diskless-sync", YES_NO).live("yes"),
    owned("repl-diskless-sync-delay", LINK),
    user("repl-diskless-sync-max-replicas", COUNT).live("0"),
    user("repl-mptcp", YES_NO).since(9, 0),
    owned("repl-ping-replica-period", LINK),
    // Shorter than the operator's own timeouts, a busy primary would lose its replicas for nothing.
    user("repl-timeout", Kind::Integer(10, i32::MAX as i64)).live("60"),
    owned("replica-announce-ip", ADDRESS),
    owned("replica-announce-port", ADDRESS),
    owned("replica-announced", ADDRESS),
    user("replica-ignore-disk-write-errors", YES_NO).live("no"),
    user("replica-ignore-maxmemory", YES_NO).live("yes"),
    user("replica-lazy-flush", YES_NO).live("yes"),
    owned("replica-priority", LINK),
    owned("replica-read-only", LINK),
    owned("replica-serve-stale-data", LINK),
    owned("replicaof", LINK),
    owned("requirepass", USERS),
    user("sanitize-dump-payload", Kind::Choice(&["clients", "no", "yes"])).until(9, 0).live("no"),
    owned("save", FILES),
    user("server-cpulist", Kind::Text),
    user("set-max-intset-entries", COUNT).live("512"),
    user("set-max-listpack-entries", COUNT).live("128"),
    user("set-max-listpack-value", COUNT).live("64"),
    owned("set-proc-title", PROCESS),
    owned("shutdown-on-sigint", PROCESS),
    owned("shutdown-on-sigterm", PROCESS),
    owned("shutdown-timeout", PROCESS),
    owned("slaveof", LINK),
    owned("slot-migration-max-failover-repl-bytes", CLUSTER).since(9, 0),
    user("slowlog-log-slower-than", SIGNED).live("10000"),
    user("slowlog-max-len", COUNT).live("128"),
    owned("socket-mark-id", ADDRESS),
    user("stop-writes-on-bgsave-error", YES_NO).live("yes"),
    user("stream-node-max-bytes", Kind::Bytes).live("4096"),
    user("stream-node-max-entries", COUNT).live("100"),
    owned("supervised", PROCESS),
    owned("syslog-enabled", PROCESS),
    owned("syslog-facility", PROCESS),
    owned("syslog-ident", PROCESS),
    user("tcp-backlog", COUNT),
    user("tcp-keepalive", COUNT).live("300"),
    user("timeout", COUNT).live("0"),
    owned("tls-auth-clients", TLS),
    owned("tls-auth-clients-user", TLS).since(9, 0),
    owned("tls-auto-reload-interval", TLS).since(9, 1),
    owned("tls-ca-cert-dir", TLS),
    owned("tls-ca-cert-file", TLS),
    owned("tls-cert-file", TLS),
    owned("tls-ciphers", TLS),
    owned("tls-ciphersuites", TLS),
    owned("tls-client-cert-file", TLS),
    owned("tls-client-key-file", TLS),
    owned("tls-client-key-file-pass", TLS),
    owned("tls-cluster", TLS),
    owned("tls-dh-params-file", TLS),
    owned("tls-key-file", TLS),
    owned("tls-key-file-pass", TLS),
    owned("tls-port", TLS),
    owned("tls-prefer-server-ciphers", TLS),
    owned("tls-protocols", TLS),
    owned("tls-replication", TLS),
    owned("tls-session-cache-size", TLS),
    owned("tls-session-cache-timeout", TLS),
    owned("tls-session-caching", TLS),
    user("tracking-table-max-keys", COUNT).live("1000000"),
    owned("unixsocket", ADDRESS),
    owned("unixsocketgroup", ADDRESS),
    owned("unixsocketperm", ADDRESS),
    owned("use-exit-on-panic", PROCESS),
    owned("user", USERS),
    owned("watchdog-period", PROCESS),
    user("zset-max-listpack-entries", COUNT).live("128"),
    user("zset-max-listpack-value", Kind::Bytes).live("64"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_names_are_unique() {
        for pair in DIRECTIVES.windows(2) {
            assert!(pair[0].name < pair[1].name, "{} before {}", pair[0].name, pair[1].name);
        }
    }
}

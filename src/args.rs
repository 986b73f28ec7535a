//! The command line. Everything has a default that is right in a cluster; nothing secret is ever given here.

use crate::{
    api::parse::{AGENT_IMAGE_DEFAULT, IMAGE_DEFAULT},
    objects::OPERATOR_PORT,
    pki::{LEAF_LIFETIME_MAX, LEAF_LIFETIME_MIN},
};
use clap::{Parser, Subcommand};
use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};
use valkeeper_journal::record::{LEVEL_FIRST, LEVEL_MAX};

/// Event-sourced operator for Valkey.
#[derive(Debug, Parser)]
#[command(name = "valkeeper", version, about)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs the operator.
    Run(Box<RunArgs>),
    /// Prints the CustomResourceDefinition as YAML.
    Crd,
}

/// Settings of `valkeeper run`.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    /// Namespace of the operator: its Lease and the journals. Default: that of the service account or of the kubeconfig.
    #[arg(long)]
    pub namespace: Option<String>,
    /// Watch clusters of this namespace only. Default: all.
    #[arg(long)]
    pub watch_namespace: Option<String>,
    /// Where journals are kept: `configmap`, `tiered:DIR` (ConfigMaps with a mirror in DIR), `sled:DIR` or `memory` (lost at exit, for
    /// trials).
    #[arg(long, default_value = "configmap")]
    pub journal: JournalStore,
    /// How much of the journals is kept, and where the rest goes.
    #[command(flatten)]
    pub keep: KeepArgs,
    /// Image of members whose spec names none.
    #[arg(long, default_value = IMAGE_DEFAULT)]
    pub default_image: String,
    /// Image that the agent of every member comes from: the operator's own. Another one is another pod template, so every
    /// cluster is rolled when it changes.
    #[arg(long, default_value = AGENT_IMAGE_DEFAULT)]
    pub agent_image: String,
    /// Address at which agents' news are taken, over TLS. Default: every address, of IPv4 only where there is no IPv6.
    #[arg(long, default_value_t = SocketAddr::from((Ipv6Addr::UNSPECIFIED, OPERATOR_PORT)))]
    pub listen_news: SocketAddr,
    /// Address of this process as agents reach it. Without it they bring no news, and are only asked.
    #[arg(long, env = "POD_IP")]
    pub pod_ip: Option<IpAddr>,
    /// Life of members' certificates: a number with s, m, h or d. They are renewed at half of it.
    #[arg(long, default_value = "336h", value_parser = lifetime)]
    pub certificate_lifetime: Duration,
    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// Log lines as text or as JSON.
    #[arg(long, default_value = "json")]
    pub log_format: LogFormat,
}

/// How much of the journals is kept, and where the rest goes.
#[derive(Clone, Debug, clap::Args)]
pub struct KeepArgs {
    /// How much of each journal is kept before its oldest records go: a size with Ki or Mi. At most 768Ki in ConfigMaps
    /// (`configmap`, `tiered`), 48Mi with `sled`. Default: 64Ki in ConfigMaps with an archive, 512Ki without one; 48Mi with `sled`, either
    /// way.
    #[arg(long, value_parser = size)]
    pub journal_keep: Option<usize>,
    /// Age at which records go although there is room: a number with s, m, h or d. Default: they go by size only.
    #[arg(long, value_parser = age)]
    pub journal_keep_age: Option<Duration>,
    /// How long the journal of a deleted cluster is kept: a number with s, m, h or d, or `forever`. Then all of it is carried to the archive, if there is
    /// one, and removed. Default: 30d with an archive, forever without one.
    #[arg(long, value_parser = keep_deleted)]
    pub journal_keep_deleted: Option<KeepDeleted>,
    /// Where records are put before they go: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or file:///DIR. Default: the
    /// oldest go, and what they fold to takes their place.
    #[arg(long)]
    pub archive: Option<String>,
    /// Directory with the archive's credentials: one file per setting, named as the setting.
    #[arg(long, requires = "archive")]
    pub archive_credentials: Option<PathBuf>,
    /// Lets journals hold what only programs of this level can read. There is no way back to a version that does not know the level.
    #[arg(long, value_parser = level)]
    pub finalize: Option<u32>,
}

/// A number with a unit of time.
fn duration(text: &str) -> Option<Duration> {
    let units = [("s", 1), ("m", 60), ("h", 3_600), ("d", 86_400)];
    units.iter().find_map(|(unit, seconds)| {
        let count: u64 = text.strip_suffix(unit)?.parse().ok()?;
        count.checked_mul(*seconds).map(Duration::from_secs)
    })
}

/// Reads the age at which records go.
fn age(text: &str) -> Result<Duration, String> {
    let expected = || format!("expected a time of at least {}h, such as 90d", AGE_MIN.as_secs() / 3_600);
    duration(text).filter(|age| *age >= AGE_MIN).ok_or_else(expected)
}

/// How long the journal of a deleted cluster is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepDeleted {
    /// For ever.
    Forever,
    /// So long.
    For(Duration),
}

impl KeepDeleted {
    /// The time, `None` for ever.
    pub fn time(self) -> Option<Duration> {
        match self {
            KeepDeleted::Forever => None,
            KeepDeleted::For(time) => Some(time),
        }
    }
}

/// Reads how long the journal of a deleted cluster is kept.
fn keep_deleted(text: &str) -> Result<KeepDeleted, String> {
    if text == "forever" {
        return Ok(KeepDeleted::Forever);
    }
    let expected =
        || format!("expected a time of at least {}m, such as 30d, or forever", DELETED_MIN.as_secs() / 60);
    duration(text).filter(|time| *time >= DELETED_MIN).map(KeepDeleted::For).ok_or_else(expected)
}

/// Reads a size in bytes.
fn size(text: &str) -> Result<usize, String> {
    let found = [("Ki", 1024), ("Mi", 1024 * 1024)].iter().find_map(|(unit, bytes)| {
        let count: usize = text.strip_suffix(unit)?.parse().ok()?;
        count.checked_mul(*bytes)
    });
    let expected = || format!("expected a size from {}Ki to {}Mi", KEEP_MIN / 1024, KEEP_MAX / 1024 / 1024);
    found.filter(|bytes| (KEEP_MIN..=KEEP_MAX).contains(bytes)).ok_or_else(expected)
}

/// Reads a level.
fn level(text: &str) -> Result<u32, String> {
    let expected = || format!("this version knows the levels {LEVEL_FIRST} to {LEVEL_MAX}");
    text.parse().ok().filter(|level| (LEVEL_FIRST..=LEVEL_MAX).contains(level)).ok_or_else(expected)
}

/// Reads the life of a certificate.
fn lifetime(text: &str) -> Result<Duration, String> {
    let least = LEAF_LIFETIME_MIN.as_secs();
    duration(text)
        .filter(|life| *life >= LEAF_LIFETIME_MIN && *life <= LEAF_LIFETIME_MAX)
        .ok_or_else(|| format!("expected a time from {least}s to 365d, such as 24h"))
}

/// Least that is kept of a journal, in bytes: an open tail of a ConfigMap, and packed some hundred records more, which is several
/// failovers.
const KEEP_MIN: usize = 16 * 1024;
/// Most that is kept of a journal, in bytes: what one stream may have in a directory, less a quarter, so that it is trimmed in quiet
/// moments and not when it is full. It is read in half a second.
const KEEP_MAX: usize = 48 * 1024 * 1024;
/// Least age at which records go: nobody looks into an incident sooner than that.
const AGE_MIN: Duration = Duration::from_secs(3_600);

/// Least time for which the journal of a deleted cluster is kept: long enough that whoever deleted the wrong one can still read it.
const DELETED_MIN: Duration = Duration::from_secs(600);

/// How long it is kept where there is an archive, if nobody says.
pub const KEEP_DELETED_ARCHIVED: KeepDeleted = KeepDeleted::For(Duration::from_secs(30 * 86_400));

/// Form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// Where journals are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JournalStore {
    /// ConfigMaps in the operator's namespace.
    ConfigMap,
    /// The same, mirrored in a directory.
    Tiered(PathBuf),
    /// The process's memory.
    Memory,
    /// sled in a directory of its own.
    Sled(PathBuf),
}

/// A text that names no store.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no journal store: expected configmap, tiered:DIR, sled:DIR or memory")]
pub struct NoStore(String);

impl FromStr for JournalStore {
    type Err = NoStore;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "configmap" => Ok(JournalStore::ConfigMap),
            None if text == "memory" => Ok(JournalStore::Memory),
            Some(("tiered", dir)) if !dir.is_empty() => Ok(JournalStore::Tiered(PathBuf::from(dir))),
            Some(("sled", dir)) if !dir.is_empty() => Ok(JournalStore::Sled(PathBuf::from(dir))),
            None | Some(_) => Err(NoStore(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::LEAF_LIFETIME_DEFAULT;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_life_is_a_number_with_a_unit_and_within_bounds() {
        assert_eq!(lifetime("336h"), Ok(LEAF_LIFETIME_DEFAULT));
        assert_eq!(lifetime("10m"), Ok(LEAF_LIFETIME_MIN));
        for wrong in ["", "7", "599s", "1w", "-1h", "366d", "99999999999999999999d"] {
            assert!(lifetime(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_kept_has_a_size_an_age_and_a_level_within_bounds() {
        assert_eq!((size("16Ki"), size("48Mi")), (Ok(KEEP_MIN), Ok(KEEP_MAX)));
        assert_eq!(age("90d"), Ok(Duration::from_secs(90 * 86_400)));
        assert_eq!(level("1"), Ok(LEVEL_MAX));
        assert_eq!(keep_deleted("30d"), Ok(KeepDeleted::For(Duration::from_secs(30 * 86_400))));
        assert_eq!(keep_deleted("forever").map(KeepDeleted::time), Ok(None));
        for wrong in ["", "9m", "never", "0"] {
            assert!(keep_deleted(wrong).unwrap_err().contains("at least 10m"), "{wrong}");
        }
        for wrong in ["", "65536", "15Ki", "49Mi", "1Gi", "-1Mi"] {
            assert!(size(wrong).unwrap_err().contains("16Ki to 48Mi"), "{wrong}");
        }
        for wrong in ["", "59m", "7", "1w"] {
            assert!(age(wrong).is_err(), "{wrong}");
        }
        for wrong in ["0", "2", "one"] {
            assert!(level(wrong).unwrap_err().contains("1 to 1"), "{wrong}");
        }
    }

    #[test]
    fn the_chart_has_the_same_bounds() {
        let chart = include_str!("../charts/valkeeper/templates/_journal.tpl");
        let least: Vec<&str> =
            chart.split("{{- $least := \"").skip(1).filter_map(|l| l.split('"').next()).collect();
        assert_eq!(least.len(), 2, "{least:?}");
        assert_eq!((size(least[0]), age(least[1])), (Ok(KEEP_MIN), Ok(AGE_MIN)));
        let shortest = chart.split("{{- $shortest := \"").nth(1).and_then(|l| l.split('"').next()).unwrap();
        assert_eq!(keep_deleted(shortest), Ok(KeepDeleted::For(DELETED_MIN)));
    }

    #[test]
    fn a_store_is_named_by_its_kind_and_a_directory() {
        assert_eq!("configmap".parse::<JournalStore>().unwrap(), JournalStore::ConfigMap);
        assert_eq!("sled:/var/j".parse::<JournalStore>().unwrap(), JournalStore::Sled("/var/j".into()));
        assert_eq!("tiered:/var/j".parse::<JournalStore>().unwrap(), JournalStore::Tiered("/var/j".into()));
        for wrong in ["", "sled", "sled:", "tiered:", "etcd:/x"] {
            assert!(wrong.parse::<JournalStore>().is_err(), "{wrong}");
        }
    }
}

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
    /// Where journals are kept: `configmap`, `memory` (lost at exit, for trials) or `sled:DIR`.
    #[arg(long, default_value = "configmap")]
    pub journal: JournalStore,
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
    /// Life of members' certificates: a number with s, m, h or d. They are renewed at two thirds of it.
    #[arg(long, default_value = "168h", value_parser = lifetime)]
    pub certificate_lifetime: Duration,
    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// Log lines as text or as JSON.
    #[arg(long, default_value = "json")]
    pub log_format: LogFormat,
}

/// Reads the life of a certificate.
fn lifetime(text: &str) -> Result<Duration, String> {
    let units = [("s", 1), ("m", 60), ("h", 3_600), ("d", 86_400)];
    let found = units.iter().find_map(|(unit, seconds)| {
        let count: u64 = text.strip_suffix(unit)?.parse().ok()?;
        count.checked_mul(*seconds).map(Duration::from_secs)
    });
    let least = LEAF_LIFETIME_MIN.as_secs();
    found
        .filter(|life| *life >= LEAF_LIFETIME_MIN && *life <= LEAF_LIFETIME_MAX)
        .ok_or_else(|| format!("expected a time from {least}s to 365d, such as 24h"))
}

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
    /// The process's memory.
    Memory,
    /// sled in a directory of its own.
    Sled(PathBuf),
}

/// A text that names no store.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no journal store: expected configmap, memory or sled:DIR")]
pub struct NoStore(String);

impl FromStr for JournalStore {
    type Err = NoStore;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "configmap" => Ok(JournalStore::ConfigMap),
            None if text == "memory" => Ok(JournalStore::Memory),
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
        assert_eq!(lifetime("168h"), Ok(LEAF_LIFETIME_DEFAULT));
        assert_eq!(lifetime("10m"), Ok(LEAF_LIFETIME_MIN));
        for wrong in ["", "7", "599s", "1w", "-1h", "366d", "99999999999999999999d"] {
            assert!(lifetime(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_store_is_named_by_its_kind_and_a_directory() {
        assert_eq!("configmap".parse::<JournalStore>().unwrap(), JournalStore::ConfigMap);
        assert_eq!("sled:/var/j".parse::<JournalStore>().unwrap(), JournalStore::Sled("/var/j".into()));
        for wrong in ["", "sled", "sled:", "etcd:/x"] {
            assert!(wrong.parse::<JournalStore>().is_err(), "{wrong}");
        }
    }
}

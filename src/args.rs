//! The command line. Everything has a default that is right in a cluster; nothing secret is ever given here.

use crate::api::parse::IMAGE_DEFAULT;
use clap::{Parser, Subcommand};
use std::{net::SocketAddr, path::PathBuf, str::FromStr};

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
    Run(RunArgs),
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
    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// Log lines as text or as JSON.
    #[arg(long, default_value = "json")]
    pub log_format: LogFormat,
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
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
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

//! What the end-to-end tests, the demo and the benchmarks share: a cluster, the operator in it, a ValkeyCluster under
//! load, faults, and the questions asked afterwards. Nothing here knows how the operator works inside.

#![allow(dead_code, reason = "each of the programs uses its part")]

pub mod audit_log;
pub mod breakdown;
pub mod clients;
pub mod faults;
pub mod journal;
pub mod keys;
pub mod load;
pub mod net;
pub mod nodes;
pub mod operator;
pub mod process;
pub mod resp;
pub mod secrets;
pub mod slots;
pub mod stock;
pub mod subject;
pub mod tunnel;
pub mod wait;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;
use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

/// Field manager of everything the tests apply.
pub const MANAGER: &str = "valkeeper-tests";

/// Bound on the end of a namespace that an earlier run has removed.
const NAMESPACE_PATIENCE: Duration = Duration::from_secs(120);

/// Where the tests run: the cluster that `tests/cluster` makes, or one that the user names by KUBECONFIG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nodes are processes of this machine: pids, the audit log and pod addresses are within reach.
    Local,
    /// Only the API server is within reach.
    Existing,
}

impl Place {
    /// From VALKEEPER_CLUSTER, as `make demo` and the tests understand it.
    pub fn of_environment() -> anyhow::Result<Place> {
        match std::env::var("VALKEEPER_CLUSTER").as_deref() {
            Ok("existing") => {
                if std::env::var_os("VALKEEPER_IMAGE").is_none() {
                    bail!(
                        "VALKEEPER_CLUSTER=existing needs VALKEEPER_IMAGE, an operator image its nodes can pull"
                    );
                }
                Ok(Place::Existing)
            }
            Ok("" | "local") | Err(_) => Ok(Place::Local),
            Ok(other) => {
                bail!("VALKEEPER_CLUSTER={other:?}: expected existing, or nothing for the local cluster")
            }
        }
    }
}

/// The repository.
pub fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A program that `tests/e2e/setup` built: beside this one, in its profile or in the other.
pub fn built(name: &str) -> anyhow::Result<PathBuf> {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| checkout().join("target"), PathBuf::from);
    let places = ["release", "debug"].map(|profile| target.join(profile).join(name));
    let found = places.iter().find(|path| path.exists());
    found.cloned().with_context(|| format!("{name} is not built: run tests/e2e/setup"))
}

/// Folder of Valkey's programs on this machine.
pub fn valkey_binaries() -> anyhow::Result<PathBuf> {
    let output = Command::new(checkout().join("tests/cluster/cluster")).arg("valkey-bin").output()?;
    let text = String::from_utf8(output.stdout)?;
    let last = text.lines().last().context("tests/cluster/cluster valkey-bin names no folder")?;
    Ok(PathBuf::from(last.trim()))
}

/// How a benchmark ends: what went wrong is its last line.
pub fn ended(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A client of the API server that KUBECONFIG names.
pub async fn client() -> anyhow::Result<Client> {
    let client = Client::try_default().await.context("KUBECONFIG cannot be used")?;
    client.apiserver_version().await.context("the API server does not answer")?;
    Ok(client)
}

/// Makes a namespace whose pods must meet Pod Security `restricted`. One that is still being removed is waited for.
pub async fn restricted_namespace(client: &Client, name: &str) -> anyhow::Result<()> {
    let namespace = json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": { "name": name, "labels": { "pod-security.kubernetes.io/enforce": "restricted" } },
    });
    let api: Api<Namespace> = Api::all(client.clone());
    wait::until(&format!("namespace {name}"), NAMESPACE_PATIENCE, || async {
        let made = api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&namespace)).await?;
        if made.metadata.deletion_timestamp.is_some() {
            bail!("the former one is still being removed")
        } else {
            Ok(())
        }
    })
    .await
    .map(|_| ())
}

/// Removes a namespace and everything in it, without waiting.
pub async fn delete_namespace(client: &Client, name: &str) -> anyhow::Result<()> {
    let api: Api<Namespace> = Api::all(client.clone());
    api.delete(name, &DeleteParams::default()).await?;
    Ok(())
}

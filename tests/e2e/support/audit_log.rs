//! What the operator asks of the API server, counted from the API server's own audit log.

use super::{Place, operator, wait::until};
use anyhow::{Context, bail};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::PathBuf,
    time::{Duration, Instant},
};

/// How long a steady cluster is watched after each scenario: five turns of the operator, and more than one heartbeat of every agent.
pub const STEADY: Duration = Duration::from_secs(5);
/// The same once, after the last scenario: several times every period of operator and agents that is no hour long (the Lease aside; the
/// longest is the greeting of an agent that said nothing for 12 s).
pub const STEADY_AT_LAST: Duration = Duration::from_secs(45);
/// Without a write for this long, what a scenario began has ended.
const SETTLED: Duration = Duration::from_secs(4);

/// Verbs that change something.
const WRITES: [&str; 5] = ["create", "update", "patch", "delete", "deletecollection"];

/// The audit log of the local cluster.
pub struct AuditLog {
    path: PathBuf,
}

/// A change that an operator asked for. Times are RFC 3339 to the microsecond, so they compare as texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Pod of the operator; empty for one that runs outside of the cluster.
    pub by: String,
    /// When the API server received it.
    pub received: String,
    /// When it had answered.
    pub answered: String,
    /// `verb resource/name subresource`.
    pub what: String,
    /// True for the Lease.
    pub is_lease: bool,
    /// Status of the answer.
    pub code: u64,
}

impl Asked {
    /// True if it changed something.
    pub fn is_done(&self) -> bool {
        self.code < 300
    }

    /// True if it is a write of a journal's head object.
    pub fn is_of_head(&self, uid: &str) -> bool {
        self.what.ends_with(&format!(" configmaps/{}", super::journal::head_name(uid)))
    }
}

impl AuditLog {
    /// `None` on a cluster whose log is out of reach.
    pub fn of(place: Place) -> anyhow::Result<Option<AuditLog>> {
        match place {
            Place::Existing => Ok(None),
            Place::Local => {
                let path = std::env::var_os("AUDIT_LOG")
                    .context("AUDIT_LOG is not set: start by tests/cluster/cluster exec")?;
                Ok(Some(AuditLog { path: path.into() }))
            }
        }
    }

    /// Where it ends now.
    pub fn end(&self) -> anyhow::Result<u64> {
        Ok(std::fs::metadata(&self.path)?.len())
    }

    /// What was written behind a position.
    pub fn text_since(&self, position: u64) -> anyhow::Result<String> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(position))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Every change that operators have asked for behind a position, in the order of the answers.
    pub fn asked_since(&self, position: u64) -> anyhow::Result<Vec<Asked>> {
        let text = self.text_since(position)?;
        // The last line may be half written.
        let entries = text.lines().filter_map(|line| serde_json::from_str(line).ok());
        let mut asked: Vec<Asked> = entries.filter_map(|entry| asked(&entry)).collect();
        asked.sort_by(|a, b| a.answered.cmp(&b.answered));
        Ok(asked)
    }

    /// How many reads of single Secrets operators have asked for behind a position.
    pub fn secrets_read_since(&self, position: u64) -> anyhow::Result<usize> {
        let text = self.text_since(position)?;
        let entries = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let is_read = |entry: &Value| {
            let says = |at: &str, what: &str| entry.pointer(at).and_then(Value::as_str) == Some(what);
            is_ours(entry)
                && says("/verb", "get")
                && says("/objectRef/resource", "secrets")
                && says("/stage", "ResponseComplete")
        };
        Ok(entries.filter(is_read).count())
    }

    /// Writes of the operator behind a position, Lease renewals aside: what, and how often.
    fn writes_since(&self, position: u64) -> anyhow::Result<BTreeMap<String, usize>> {
        let mut writes = BTreeMap::new();
        for Asked { what, .. } in self.asked_since(position)?.into_iter().filter(|asked| !asked.is_lease) {
            *writes.entry(what).or_default() += 1;
        }
        Ok(writes)
    }

    /// Waits until the operator has stopped writing, watches it for so long, and fails on any write.
    pub async fn quiet(&self, steady: Duration) -> anyhow::Result<()> {
        let mut position = self.end()?;
        let mut since = Instant::now();
        until("the operator to have nothing more to write", Duration::from_secs(60), || {
            let writes = self.writes_since(position);
            let result = match writes {
                Ok(writes) if writes.is_empty() => Ok(()),
                Ok(writes) => {
                    (position, since) = (self.end().unwrap_or(position), Instant::now());
                    Err(anyhow::anyhow!("{writes:?}"))
                }
                Err(error) => Err(error),
            };
            let quiet_for = since.elapsed();
            async move {
                result?;
                if quiet_for < SETTLED { bail!("quiet for {} ms", quiet_for.as_millis()) } else { Ok(()) }
            }
        })
        .await?;
        let position = self.end()?;
        tokio::time::sleep(steady).await;
        let writes = self.writes_since(position)?;
        if writes.is_empty() {
            Ok(())
        } else {
            bail!("{} s of a steady cluster saw writes: {writes:?}", steady.as_secs())
        }
    }
}

/// An operator is known by its service account, or, outside of the cluster, by how it introduces itself.
fn is_ours(entry: &Value) -> bool {
    let text = |at: &str| entry.pointer(at).and_then(Value::as_str).unwrap_or_default();
    let in_cluster =
        text("/user/username").starts_with(&format!("system:serviceaccount:{}:", operator::NAMESPACE));
    in_cluster || text("/userAgent").starts_with("valkeeper/")
}

fn asked(entry: &Value) -> Option<Asked> {
    let text = |at: &str| entry.pointer(at).and_then(Value::as_str).unwrap_or_default();
    let is_ours = is_ours(entry);
    let (verb, resource) = (text("/verb"), text("/objectRef/resource"));
    if !is_ours || !WRITES.contains(&verb) || resource.is_empty() || text("/stage") != "ResponseComplete" {
        return None;
    }
    let (name, part) = (text("/objectRef/name"), text("/objectRef/subresource"));
    Some(Asked {
        by: text("/user/extra/authentication.kubernetes.io~1pod-name/0").to_owned(),
        received: text("/requestReceivedTimestamp").to_owned(),
        answered: text("/stageTimestamp").to_owned(),
        what: format!("{verb} {resource}/{name} {part}").trim_end().to_owned(),
        is_lease: resource == "leases",
        code: entry.pointer("/responseStatus/code")?.as_u64()?,
    })
}

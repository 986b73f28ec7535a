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

/// How long a steady cluster is watched: longer than every period of operator and agents that is no hour long (the Lease aside; the
/// longest is the greeting of an agent that said nothing for 12 s), and it is watched after every scenario.
pub const STEADY: Duration = Duration::from_secs(15);
/// Without a write for this long, what a scenario began has ended.
const SETTLED: Duration = Duration::from_secs(4);

/// The audit log of the local cluster.
pub struct AuditLog {
    path: PathBuf,
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

    fn end(&self) -> anyhow::Result<u64> {
        Ok(std::fs::metadata(&self.path)?.len())
    }

    /// Writes of the operator behind a position, Lease renewals aside: what, and how often.
    fn writes_since(&self, position: u64) -> anyhow::Result<BTreeMap<String, usize>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(position))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let mut writes = BTreeMap::new();
        for line in String::from_utf8_lossy(&bytes).lines() {
            // The last line may be half written.
            if let Some(what) = serde_json::from_str(line).ok().as_ref().and_then(write_of_operator) {
                *writes.entry(what).or_default() += 1;
            }
        }
        Ok(writes)
    }

    /// Waits until the operator has stopped writing, watches it for [`STEADY`], and fails on any write.
    pub async fn quiet(&self) -> anyhow::Result<()> {
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
        tokio::time::sleep(STEADY).await;
        let writes = self.writes_since(position)?;
        if writes.is_empty() {
            Ok(())
        } else {
            bail!("{} s of a steady cluster saw writes: {writes:?}", STEADY.as_secs())
        }
    }
}

fn write_of_operator(entry: &Value) -> Option<String> {
    let user = entry.pointer("/user/username")?.as_str()?;
    let verb = entry.get("verb")?.as_str()?;
    let resource = entry.pointer("/objectRef/resource")?.as_str()?;
    let ours = user.starts_with(&format!("system:serviceaccount:{}:", operator::NAMESPACE));
    let writes = ["create", "update", "patch", "delete", "deletecollection"].contains(&verb);
    let name = entry.pointer("/objectRef/name").and_then(Value::as_str).unwrap_or_default();
    let part = entry.pointer("/objectRef/subresource").and_then(Value::as_str).unwrap_or_default();
    (ours && writes && resource != "leases")
        .then(|| format!("{verb} {resource}/{name} {part}").trim_end().to_owned())
}

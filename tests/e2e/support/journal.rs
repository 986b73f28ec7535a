//! The journals as they are in the cluster, and what `valkeeper-replay` says of them.

use super::{built, operator, subject::Subject};
use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    process::{Command, Output},
};

/// A dump of every journal in the operator's namespace, as `kubectl get configmaps -o json` prints it, and one cluster
/// in it.
pub struct Journal {
    /// The file.
    pub path: PathBuf,
    cluster: String,
    /// A folder of this journal's own, if it is not the one file.
    scratch: Option<PathBuf>,
}

impl Drop for Journal {
    fn drop(&mut self) {
        let _ = match &self.scratch {
            Some(folder) => std::fs::remove_dir_all(folder),
            None => std::fs::remove_file(&self.path),
        };
    }
}

/// Exit code of `verify` and `diverge` that means: found something.
const EXIT_FOUND: i32 = 3;
/// The key of a journal's objects under which its lines are.
const KEY: &str = "records.jsonl";
/// How often an edit is tried: a cluster that has just become Ready has a few records a second.
const EDITS_MAX: usize = 20;

/// Name of the object with the head of a journal.
pub fn head_name(uid: &str) -> String {
    format!("journal-{uid}-head")
}

/// The objects of all journals.
pub fn maps(client: &Client) -> Api<ConfigMap> {
    Api::namespaced(client.clone(), operator::NAMESPACE)
}

/// The text of a journal's head object: a line about the stream, then the lines of its newest records.
pub async fn head(client: &Client, uid: &str) -> anyhow::Result<String> {
    let map = maps(client).get(&head_name(uid)).await?;
    map.data.and_then(|mut data| data.remove(KEY)).with_context(|| format!("{} has no text", head_name(uid)))
}

/// Edits the text of a journal's head object as `kubectl edit` does: never over what the operator has written meanwhile.
/// The text that was there.
pub async fn edit_head(
    client: &Client,
    uid: &str,
    edit: impl Fn(&str) -> anyhow::Result<String>,
) -> anyhow::Result<String> {
    let mut found = None;
    for _ in 0..EDITS_MAX {
        let mut map = maps(client).get(&head_name(uid)).await?;
        let data = map.data.get_or_insert_default();
        let right = data.get(KEY).cloned().with_context(|| format!("{} has no text", head_name(uid)))?;
        data.insert(KEY.to_owned(), edit(&right)?);
        match maps(client).replace(&head_name(uid), &PostParams::default(), &map).await {
            Ok(_) => return Ok(right),
            Err(kube::Error::Api(status)) if status.is_conflict() => found = Some(status),
            Err(other) => return Err(other.into()),
        }
    }
    bail!("the head was written meanwhile {EDITS_MAX} times: {found:?}")
}

/// Writes the text of a journal's head object over whatever is there, as a restored backup does.
pub async fn overwrite_head(client: &Client, uid: &str, text: &str) -> anyhow::Result<()> {
    let patch = Patch::Merge(json!({ "data": { KEY: text } }));
    maps(client).patch(&head_name(uid), &PatchParams::default(), &patch).await?;
    Ok(())
}

/// The newest records, as far as the head object holds them.
pub async fn newest(client: &Client, uid: &str) -> anyhow::Result<Vec<Value>> {
    records_in(&head(client, uid).await?)
}

/// The records in the text of a head object.
pub fn records_in(text: &str) -> anyhow::Result<Vec<Value>> {
    text.lines().skip(1).map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// A number of a record: `seq`, `epoch` or `time`.
pub fn number(record: &Value, field: &str) -> i64 {
    record.get(field).and_then(Value::as_i64).unwrap_or_default()
}

/// Who claimed a journal, in order: epoch and name of each writer.
pub fn claims(records: &[Value]) -> Vec<(i64, String)> {
    let claim = |record: &Value| {
        let writer = record.pointer("/event/EpochStarted/writer")?.as_str()?;
        Some((number(record, "epoch"), writer.to_owned()))
    };
    records.iter().filter_map(claim).collect()
}

/// Each record has the epoch of the last claim before it, each claim has a higher one, and times never fall. Not asked of the program's
/// own verifier: a mistake there must not hide here.
pub fn one_writer_at_a_time(records: &[Value]) -> anyhow::Result<()> {
    let (mut epoch, mut time) = (0, i64::MIN);
    for record in records {
        let (seq, its) = (number(record, "seq"), number(record, "epoch"));
        let claims = record.pointer("/event/EpochStarted").is_some();
        // It comes with the first claim, in the same write.
        let begins = record.pointer("/event/Baseline").is_some();
        if !begins && (its < epoch || (its > epoch) != claims) {
            bail!("record {seq} has epoch {its} after {epoch}");
        }
        if number(record, "time") < time {
            bail!("record {seq} is older than the one before");
        }
        (epoch, time) = (if begins { its - 1 } else { its }, number(record, "time"));
    }
    Ok(())
}

impl Journal {
    /// Copies the volume with the operator's sled store as it is at this moment, as after a crash.
    pub fn of_sled(operator_pid: u32, uid: &str) -> anyhow::Result<Journal> {
        let scratch = std::env::temp_dir().join(format!("valkeeper-sled-{}", std::process::id()));
        let volume = format!("/proc/{operator_pid}/root{}", operator::SLED_VOLUME);
        let _ = std::fs::remove_dir_all(&scratch);
        let copied = Command::new("cp").args(["-r", &volume]).arg(&scratch).output().context("cp")?;
        let path = scratch.join(operator::SLED_STORE);
        let journal = Journal { path, cluster: uid.to_owned(), scratch: Some(scratch) };
        if !copied.status.success() {
            bail!("cp: {}", String::from_utf8_lossy(&copied.stderr).trim());
        }
        Ok(journal)
    }

    /// Reads the journals and chooses that of the subject, which exists.
    pub async fn of(subject: &Subject) -> anyhow::Result<Journal> {
        let uid = subject.get().await?.uid().context("a resource without UID")?;
        Journal::of_uid(&subject.client, &uid).await
    }

    /// Reads the journals and chooses that of a resource that may be gone.
    pub async fn of_uid(client: &Client, uid: &str) -> anyhow::Result<Journal> {
        let maps = maps(client).list(&ListParams::default().labels("valkeeper.io/journal")).await?;
        let mut items = Vec::new();
        for map in maps.items {
            let mut item = serde_json::to_value(map)?;
            item["apiVersion"] = json!("v1");
            item["kind"] = json!("ConfigMap");
            items.push(item);
        }
        let path = std::env::temp_dir().join(format!("valkeeper-journals-{}.json", std::process::id()));
        std::fs::write(&path, json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string())?;
        Ok(Journal { path, cluster: uid.to_owned(), scratch: None })
    }

    fn run(&self, verb: &[&str]) -> anyhow::Result<Output> {
        let program = built("valkeeper-replay")?;
        let mut command = Command::new(&program);
        command.arg("-j").arg(&self.path).args(["--cluster", &self.cluster]).args(verb);
        command.output().with_context(|| program.display().to_string())
    }

    /// What a verb prints. Anything but exit code 0 is an error.
    pub fn ask(&self, verb: &[&str]) -> anyhow::Result<String> {
        let output = self.run(verb)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("valkeeper-replay {}: {}\n{text}{error}", verb.join(" "), output.status)
    }

    /// The timeline's lines that match a pattern.
    pub fn lines(&self, pattern: &str) -> anyhow::Result<Vec<String>> {
        let text = self.ask(&["log", "-g", pattern])?;
        Ok(text.lines().filter(|line| line.contains(pattern)).map(str::to_owned).collect())
    }

    /// Every record, oldest first.
    pub fn records(&self) -> anyhow::Result<Vec<Value>> {
        let text = self.ask(&["export"])?;
        text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
    }

    /// Failovers that the audit knows.
    pub fn failovers(&self) -> anyhow::Result<usize> {
        let text = self.ask(&["audit", "failover", "-o", "json"])?;
        let found: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        found.as_array().map(Vec::len).with_context(|| format!("not a list: {text}"))
    }

    /// What the audit knows of each reshard.
    pub fn reshards(&self) -> anyhow::Result<Vec<Value>> {
        let text = self.ask(&["audit", "reshard", "-o", "json"])?;
        serde_json::from_str(&text).with_context(|| text.clone())
    }

    /// The journal is what was written, holds every invariant, and today's rules decide the same; wrong rules do not.
    pub fn holds(&self) -> anyhow::Result<()> {
        self.ask(&["verify"])?;
        self.ask(&["diverge"])?;
        self.ask(&["audit", "reshard"])?;
        // Rules that never promote can only differ where something was promoted.
        if self.failovers()? == 0 {
            return Ok(());
        }
        let mutated = self.run(&["diverge", "--mutate", "never-fail-over"])?;
        match mutated.status.code() {
            Some(EXIT_FOUND) => Ok(()),
            other => bail!(
                "diverge with a wrong policy ended with {other:?}: it must find what it would not have done"
            ),
        }
    }
}

//! Faults of processes: the server of a pod is a process of this machine, known by its pod's UID in its control group.

use super::{Place, subject::Member};
use anyhow::{Context, bail};
use std::{
    fs,
    io::{Read, Write},
    process::{Command, Stdio},
    time::Instant,
};

/// Where a member's volume is mounted.
const DATA_DIR: &str = "/data";
/// A member's snapshot.
const RDB_FILE: &str = "dump.rdb";
/// A member's append-only files.
const AOF_DIR: &str = "appendonlydir";
/// What a member's agent remembers.
const LEDGER: &str = "valkeeper/agent.json";

/// The pid of a pod's process, by the process's name.
pub fn pid_in_pod(pod_uid: &str, name: &str) -> anyhow::Result<u32> {
    let found = pids_in_pod(pod_uid)?.into_iter().find(|pid| proc_text(*pid, "comm").trim_end() == name);
    found.with_context(|| format!("pod {pod_uid} has no process {name}"))
}

/// The pids of all processes of a pod.
pub fn pids_in_pod(pod_uid: &str) -> anyhow::Result<Vec<u32>> {
    let written = [pod_uid.to_owned(), pod_uid.replace('-', "_")];
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|text| text.parse::<u32>().ok()) else {
            continue;
        };
        let group = proc_text(pid, "cgroup");
        if written.iter().any(|uid| group.contains(uid.as_str())) {
            pids.push(pid);
        }
    }
    Ok(pids)
}

/// A file of a process, such as `cmdline`; empty if it has ended.
pub fn proc_text(pid: u32, file: &str) -> String {
    let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// True if a process stands still.
pub fn is_stopped(pid: u32) -> bool {
    // The name before the state is in parentheses, and may hold anything.
    let stat = proc_text(pid, "stat");
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
}

/// The highest writer epoch that a member's agent has written down.
pub fn epoch_in_ledger(member: &Member) -> anyhow::Result<i64> {
    let pid = pid_in_pod(&member.uid, "valkeeper-agent")?;
    let file = format!("/proc/{pid}/root{DATA_DIR}/{LEDGER}");
    let text = fs::read_to_string(&file).with_context(|| file.clone())?;
    // Two slots, written in turn.
    let slots = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line.trim()).ok());
    let newest = slots.max_by_key(|slot| slot.get("number").and_then(serde_json::Value::as_u64));
    let epoch = newest.as_ref().and_then(|slot| slot.pointer("/ledger/epoch")?.as_i64());
    epoch.with_context(|| format!("{file}: {text}"))
}

/// Sends a signal by its name; the time just before. A shell is made ready first, so that its start is in no figure.
pub fn signal(pid: u32, name: &str) -> anyhow::Result<Instant> {
    let mut shell = Command::new("sh")
        .args(["-c", "echo; read -r _; kill -s \"$1\" \"$2\"", "sh", name, &pid.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("sh")?;
    let (mut ready, mut go) =
        (shell.stdout.take().context("no pipe")?, shell.stdin.take().context("no pipe")?);
    ready.read_exact(&mut [0])?;
    let at = Instant::now();
    go.write_all(b"\n")?;
    let sent = shell.wait_with_output()?;
    if sent.status.success() { Ok(at) } else { bail!("{}", String::from_utf8_lossy(&sent.stderr).trim()) }
}

/// Ends a member's server at once, without a word to anyone; the time just before.
pub fn kill_server(place: Place, namespace: &str, member: &Member) -> anyhow::Result<Instant> {
    match place {
        Place::Local => signal(pid_in_pod(&member.uid, "valkey-server")?, "KILL"),
        Place::Existing => {
            // Not a signal, since the node is out of reach, but as sudden: no handover, no snapshot.
            let at = Instant::now();
            let script = "valkey-cli --no-auth-warning shutdown nosave now force";
            let mut command = Command::new("kubectl");
            command.args(["exec", "-i", "-n", namespace, &member.name, "-c", "valkey", "--", "sh", "-c"]);
            command.arg(format!("read -r REDISCLI_AUTH; export REDISCLI_AUTH; {script}"));
            let mut child =
                command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
            if let Some(stdin) = &mut child.stdin {
                writeln!(stdin, "{}", member.password)?;
            }
            child.wait()?;
            Ok(at)
        }
    }
}

/// Stops a member's server where it stands; it can be woken by CONT.
pub fn freeze_server(place: Place, member: &Member) -> anyhow::Result<(u32, Instant)> {
    if place == Place::Existing {
        bail!("freezing a process needs the nodes of the local cluster");
    }
    let pid = pid_in_pod(&member.uid, "valkey-server")?;
    Ok((pid, signal(pid, "STOP")?))
}

/// Removes a member's data files under its running server; `all`: with everything else on its volume.
pub fn wipe_data(member: &Member, all: bool) -> anyhow::Result<()> {
    let pid = pid_in_pod(&member.uid, "valkey-server")?;
    let folder = format!("/proc/{pid}/root{DATA_DIR}");
    for entry in fs::read_dir(&folder).with_context(|| folder.clone())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !all && ![RDB_FILE, AOF_DIR].contains(&name.as_str()) {
            continue;
        }
        if path.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
    }
    Ok(())
}

/// Makes an empty file on a member's volume, which one of its processes sees.
pub fn touch(member: &Member, process: &str, file: &str) -> anyhow::Result<()> {
    let pid = pid_in_pod(&member.uid, process)?;
    let path = format!("/proc/{pid}/root{DATA_DIR}/{file}");
    fs::write(&path, "").with_context(|| path.clone())
}

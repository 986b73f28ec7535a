//! Links of real pods, cut in the pod's own network namespace: its process keeps running and its client may keep its link.

use super::{process::pid_in_pod, subject::Member};
use anyhow::{Context, bail};
use std::{
    fs::File,
    net::IpAddr,
    os::fd::AsRawFd,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Name of the table of rules, of which a pod has no other.
const TABLE: &str = "inet valkeeper_tests";
/// A cut ends by itself after this long, in the kernel: a test that is killed leaves nothing behind for longer.
const CUT_MAX: Duration = Duration::from_secs(300);

/// Whom a member does not hear and does not reach.
#[derive(Clone, Debug)]
pub enum From {
    /// Everyone but those kept and its own node.
    Everyone,
    /// These addresses.
    These(Vec<IpAddr>),
}

/// A link that is cut until this is healed or dropped.
#[derive(Debug)]
pub struct Cut {
    /// The pod's network namespace. Held open, so that a server that ends meanwhile does not take the way back with it.
    namespace: File,
    /// The time just before the link was cut.
    pub since: Instant,
    /// The port to which nothing is sent, if that is all.
    port: Option<u16>,
    healed: bool,
}

/// Cuts a member's links, except those with the addresses to keep. Packets are dropped in both directions, as by a broken
/// switch: nobody is refused, connections do not end.
pub fn cut(member: &Member, from: &From, keep: &[IpAddr]) -> anyhow::Result<Cut> {
    let pid = pid_in_pod(&member.uid, "valkey-server")?;
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    let since = Instant::now();
    let mut cut = Cut { namespace, since, port: None, healed: true };
    let blocked = match from {
        From::Everyone => vec!["0.0.0.0/0".to_owned()],
        From::These(list) if list.is_empty() => bail!("nobody to be cut from"),
        From::These(list) => list.iter().map(IpAddr::to_string).collect(),
    };
    let mut kept = vec!["127.0.0.0/8".to_owned()];
    // kubelet is on the same side of a broken switch: its probes go on.
    kept.extend(cut.node()?.map(|node| node.to_string()));
    kept.extend(keep.iter().map(IpAddr::to_string));
    cut.nft(&rules(&blocked, &kept))?;
    cut.healed = false;
    Ok(cut)
}

/// Drops what a process sends to a port of these addresses. What is under way waits in the kernel, and is sent again when the
/// cut is healed, whether the process runs or not.
pub fn cut_calls(pid: u32, to: &[IpAddr], port: u16) -> anyhow::Result<Cut> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    let mut cut = Cut { namespace, since: Instant::now(), port: Some(port), healed: true };
    let (to, seconds): (Vec<String>, u64) = (to.iter().map(IpAddr::to_string).collect(), CUT_MAX.as_secs());
    cut.nft(&format!(
        "table {TABLE} {{\n\
         set blocked {{ type ipv4_addr; flags timeout; timeout {seconds}s; elements = {{ {to} }}; }}\n\
         chain outgoing {{ type filter hook output priority 0; ip daddr @blocked tcp dport {port} drop; }}\n\
         }}\n",
        to = to.join(", "),
    ))?;
    cut.healed = false;
    Ok(cut)
}

/// The same over the connections that are there. New ones are not cut: by those an operator goes on to look at servers while its commands
/// do not arrive.
pub fn cut_held_calls(pid: u32, port: u16) -> anyhow::Result<Cut> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    let mut cut = Cut { namespace, since: Instant::now(), port: Some(port), healed: true };
    let held = cut.lines(port)?;
    // State, bytes to be read, bytes to be sent, own address, the other's.
    let own = |line: &String| Some(line.split_whitespace().nth(3)?.rsplit(':').next()?.to_owned());
    let ports: Vec<String> = held.iter().filter(|line| line.starts_with("ESTAB")).filter_map(own).collect();
    if ports.is_empty() {
        bail!("nobody is connected to port {port}");
    }
    cut.nft(&format!(
        "table {TABLE} {{\n\
         chain outgoing {{ type filter hook output priority 0; tcp dport {port} tcp sport {{ {ports} }} drop; }}\n\
         }}\n",
        ports = ports.join(", "),
    ))?;
    cut.healed = false;
    Ok(cut)
}

/// Drops what comes for a port of a member, and what it sends to that port of anybody. Packets are dropped as by a wrong rule of a firewall:
/// all else goes on.
pub fn cut_port(member: &Member, port: u16) -> anyhow::Result<Cut> {
    let pid = pid_in_pod(&member.uid, "valkey-server")?;
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    let mut cut = Cut { namespace, since: Instant::now(), port: Some(port), healed: true };
    let seconds = CUT_MAX.as_secs();
    cut.nft(&format!(
        "table {TABLE} {{\n\
         set blocked {{ type ipv4_addr; flags interval, timeout; timeout {seconds}s; elements = {{ 0.0.0.0/0 }}; }}\n\
         chain incoming {{ type filter hook input priority 0; ip saddr @blocked tcp dport {port} drop; }}\n\
         chain outgoing {{ type filter hook output priority 0; ip daddr @blocked tcp dport {port} drop; }}\n\
         }}\n",
    ))?;
    cut.healed = false;
    Ok(cut)
}

fn rules(blocked: &[String], kept: &[String]) -> String {
    let seconds = CUT_MAX.as_secs();
    format!(
        "table {TABLE} {{\n\
         set kept {{ type ipv4_addr; flags interval; elements = {{ {kept} }}; }}\n\
         set blocked {{ type ipv4_addr; flags interval, timeout; timeout {seconds}s; elements = {{ {blocked} }}; }}\n\
         chain incoming {{ type filter hook input priority 0; ip saddr @kept accept; ip saddr @blocked drop; }}\n\
         chain outgoing {{ type filter hook output priority 0; ip daddr @kept accept; ip daddr @blocked drop; }}\n\
         }}\n",
        kept = kept.join(", "),
        blocked = blocked.join(", "),
    )
}

impl Cut {
    fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        // By the open file, not by a pid: the process may be gone by now.
        command.arg(format!("--net=/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd()));
        command.arg(program);
        command
    }

    /// The address of its node as the pod sees it: its gateway.
    fn node(&self) -> anyhow::Result<Option<IpAddr>> {
        let output =
            self.inside("ip").args(["-4", "route", "show", "default"]).output().context("ip route")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut words = text.split_whitespace().skip_while(|word| *word != "via").skip(1);
        Ok(words.next().and_then(|word| word.parse().ok()))
    }

    fn nft(&self, script: &str) -> anyhow::Result<()> {
        let mut child = self
            .inside("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("nsenter")?;
        if let Some(mut stdin) = child.stdin.take() {
            std::io::Write::write_all(&mut stdin, script.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if output.status.success() {
            Ok(())
        } else {
            bail!("nft: {}\n{script}", String::from_utf8_lossy(&output.stderr).trim())
        }
    }

    /// Makes the links whole again; the time just after.
    pub fn heal(mut self) -> anyhow::Result<Instant> {
        self.mend()?;
        Ok(Instant::now())
    }

    /// Makes the links whole again, and keeps the way into the namespace.
    pub fn mend(&mut self) -> anyhow::Result<()> {
        self.undo()
    }

    /// Bytes that were written to the connections that are cut and that nobody has received yet.
    pub fn unsent(&self) -> anyhow::Result<u64> {
        let port = self.port.context("everything is cut, not a port")?;
        // State, bytes to be read, bytes to be sent, addresses.
        let queued = |line: String| line.split_whitespace().nth(2)?.parse::<u64>().ok();
        Ok(self.lines(port)?.into_iter().filter_map(queued).sum())
    }

    /// The connections to this port, as `ss` shows them.
    fn lines(&self, port: u16) -> anyhow::Result<Vec<String>> {
        let output = self.inside("ss").args(["-Htan", &format!("dport = :{port}")]).output().context("ss")?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
    }

    fn undo(&mut self) -> anyhow::Result<()> {
        if !self.healed {
            self.nft(&format!("delete table {TABLE}\n"))?;
            self.healed = true;
        }
        Ok(())
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            println!("     a cut link could not be healed: {error:#}");
        }
    }
}

//! The server's process: started, read and reaped. As PID 1 the agent also gets every orphan of the container; one
//! place waits for all children, so that nobody's status is lost.

use rustix::process::{Pid, Signal, WaitOptions, kill_process, kill_process_group, wait};
use std::{
    collections::BTreeMap,
    fmt, io,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::{ChildStderr, ChildStdout},
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// Longest line that is passed on whole, in bytes: Valkey's own are below 1 KiB; a crash report has longer ones.
const LINE_BYTES_MAX: usize = 8 << 10;
/// A lost SIGCHLD costs this long.
const REAP_PERIOD: Duration = Duration::from_secs(1);

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this status.
    Exit(i32),
    /// By this signal.
    Signal(i32),
}

impl Ended {
    /// As a shell gives it.
    pub fn status(self) -> u8 {
        let code = match self {
            Ended::Exit(code) => code,
            Ended::Signal(number) => number.saturating_add(128),
        };
        u8::try_from(code).unwrap_or(u8::MAX)
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ended::Exit(code) => write!(f, "exit {code}"),
            Ended::Signal(number) => write!(f, "signal {number}"),
        }
    }
}

type Waiting = Arc<Mutex<BTreeMap<i32, oneshot::Sender<Ended>>>>;

/// Starts and reaps.
#[derive(Clone, Default)]
pub struct Supervisor(Waiting);

/// A started server.
pub struct Child {
    pub process: Process,
    pub ended: oneshot::Receiver<Ended>,
}

/// A process that may be signalled. Its group is its own: what it has forked ends with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process(Pid);

impl Process {
    /// Asks it to end.
    pub fn terminate(self) {
        let _ = kill_process(self.0, Signal::TERM);
    }

    /// Ends it and what it has forked.
    pub fn kill(self) {
        let _ = kill_process_group(self.0, Signal::KILL);
        let _ = kill_process(self.0, Signal::KILL);
    }

    /// Its number.
    pub fn id(self) -> i32 {
        self.0.as_raw_nonzero().get()
    }
}

impl Supervisor {
    /// Begins to reap. Runs for as long as the runtime.
    pub fn start() -> io::Result<Supervisor> {
        let supervisor = Supervisor::default();
        let mut children = signal(SignalKind::child())?;
        let reaper = supervisor.clone();
        tokio::spawn(async move {
            loop {
                reaper.reap();
                // Either a child ended or the period is over: both mean to look.
                let _ = tokio::time::timeout(REAP_PERIOD, children.recv()).await;
            }
        });
        Ok(supervisor)
    }

    /// Starts a program; its lines go to `line`.
    pub fn spawn(&self, command: &mut Command, line: fn(&str)) -> io::Result<Child> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        // Held until the process is known: it must not be reaped before.
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut child = command.spawn()?;
        let number = i32::try_from(child.id()).map_err(io::Error::other)?;
        let pid = Pid::from_raw(number).ok_or_else(|| io::Error::other("no process id"))?;
        let (sender, ended) = oneshot::channel();
        waiting.insert(number, sender);
        drop(waiting);
        if let Some(out) = child.stdout.take() {
            tokio::spawn(pass_on(ChildStdout::from_std(out)?, line));
        }
        if let Some(err) = child.stderr.take() {
            tokio::spawn(pass_on(ChildStderr::from_std(err)?, line));
        }
        Ok(Child { process: Process(pid), ended })
    }

    fn reap(&self) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let ended = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Ended::Exit(code),
                (None, Some(number)) => Ended::Signal(number),
                // Stopped or continued: it lives.
                (None, None) => continue,
            };
            // What it had forked must not write into the directory of the next one.
            let _ = kill_process_group(pid, Signal::KILL);
            match waiting.remove(&pid.as_raw_nonzero().get()) {
                Some(waiter) => drop(waiter.send(ended)),
                None => tracing::debug!(pid = pid.as_raw_nonzero().get(), %ended, "orphan reaped"),
            }
        }
    }
}

/// Reads lines until the end, cutting those that are too long.
async fn pass_on(from: impl AsyncRead + Unpin, line: fn(&str)) {
    let mut from = BufReader::with_capacity(LINE_BYTES_MAX, from);
    let mut whole: Vec<u8> = Vec::new();
    loop {
        let Ok(bytes) = from.fill_buf().await else { return };
        if bytes.is_empty() {
            if !whole.is_empty() {
                line(&String::from_utf8_lossy(&whole));
            }
            return;
        }
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let taken = end.unwrap_or(bytes.len());
        whole.extend_from_slice(bytes.get(..taken).unwrap_or_default());
        from.consume(taken + usize::from(end.is_some()));
        if end.is_some() || whole.len() >= LINE_BYTES_MAX {
            line(String::from_utf8_lossy(&whole).trim_end());
            whole.clear();
        }
    }
}

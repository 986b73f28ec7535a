//! A power cut: a copy of the image under a filesystem while a writer works, which has what reached the disk and nothing
//! else. By hand only: it needs root and a loop device.

use crate::{
    check::{check, is_all, row},
    child::{Fault, Plan, Said, command, fail, last},
    common::Scratch,
};
use std::{
    fs::File,
    io::{BufRead, BufReader},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    time::Duration,
};
use valkeeper_core::event::Record;

const ROUNDS: usize = 24;
const CONTROL_ROUNDS: usize = 4;

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, at: PathBuf) -> Mounted {
        std::fs::create_dir_all(&at).unwrap();
        run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(&at));
        Mounted(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Where the anchors are.
enum Anchors {
    Beside,
    Elsewhere,
}

/// Lets a writer append so often, copies the image, and opens the copy.
async fn cut(lie: Option<Fault>, anchors: Anchors, appends: usize) -> (Vec<Record>, Result<(), String>) {
    let scratch = Scratch::new("power");
    let (image, copy) = (scratch.path("image"), scratch.path("copy"));
    File::create(&image).unwrap().set_len(256 << 20).unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image));
    let mounted = Mounted::new(&image, scratch.path("mount"));
    if let Anchors::Elsewhere = anchors {
        // On a disk that has power: what is lost now is behind its anchor.
        std::fs::create_dir(scratch.path("anchors")).unwrap();
        symlink(scratch.path("anchors"), mounted.0.join("journal.anchor")).unwrap();
    }
    let mut command = command(&mounted.0.join("journal"), Plan::Endless);
    if let Some(fault) = lie {
        fail(&mut command, fault);
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let stdout = child.stdout.take().unwrap();
    let (reached, has_reached) = mpsc::channel();
    let reading = std::thread::spawn(move || {
        let (mut text, mut line) = (Vec::new(), Vec::new());
        let mut lines = BufReader::new(stdout);
        let mut acked = 0;
        while lines.read_until(b'\n', &mut line).unwrap() > 0 {
            acked += usize::from(line.starts_with(b"acked "));
            if acked == appends {
                let _ = reached.send(());
            }
            text.append(&mut line);
        }
        text
    });
    has_reached.recv_timeout(Duration::from_secs(60)).unwrap();
    run(Command::new("kill").args(["-STOP", &child.id().to_string()]));
    run(Command::new("cp").arg("--sparse=always").arg(&image).arg(&copy));
    child.kill().unwrap();
    child.wait().unwrap();
    let said = Said::of(&reading.join().unwrap());
    drop(mounted);
    let mounted = Mounted::new(&copy, scratch.path("mounted"));
    let checked = check(&mounted.0.join("journal"), &said.acked).await;
    (said.acked, checked)
}

#[tokio::test]
async fn a_power_cut_loses_nothing_and_would_with_a_disk_that_lies() {
    if !is_all() {
        return;
    }
    let mut failures = Vec::new();
    for round in 0..ROUNDS {
        let anchors = if round % 2 == 0 { Anchors::Beside } else { Anchors::Elsewhere };
        let (acked, checked) = cut(None, anchors, 3 + round * 41).await;
        if let Err(why) = checked {
            failures.push(format!("round {round}, acknowledged up to {}: {why}", last(&acked)));
        }
    }
    row("power cut: copy of a loop-mounted ext4 image under load", ROUNDS, &failures);
    let mut lost = 0;
    let lying = Fault { calls: "fdatasync,fsync,sync_file_range,", at: 1, count: 0, how: "lie" };
    for round in 0..CONTROL_ROUNDS {
        let (_, checked) = cut(Some(lying), Anchors::Beside, 50 + round * 20).await;
        lost += usize::from(checked.is_err());
    }
    let seen =
        if lost > 0 { vec![] } else { vec!["no round lost anything: the test sees nothing".to_owned()] };
    row(
        &format!("  control: the same with syncs that lie ({lost} rounds lost records)"),
        CONTROL_ROUNDS,
        &seen,
    );
}

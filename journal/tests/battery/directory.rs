//! A directory that is not there, not ours, not writable, or in use.

use crate::{
    check::{check, row},
    common::Scratch,
    damage::made,
};
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::Path,
    process::Command,
};
use valkeeper_journal::{Backend, BackendError, Sled};

const OPEN_DIR: &str = "VALKEEPER_BATTERY_OPEN_DIR";

/// Says how the opening went. Without the variable, a test that has nothing to do.
#[tokio::test]
async fn child_opens() {
    let Ok(dir) = std::env::var(OPEN_DIR) else { return };
    let said = match Sled::open(Path::new(&dir)) {
        Ok(sled) => format!("opened {}", sled.streams().await.unwrap().len()),
        Err(error) => format!("refused {error:?}"),
    };
    std::io::Write::write_all(&mut std::io::stdout(), format!("\nsaid {said}\n").as_bytes()).unwrap();
}

/// Opens as somebody who may only do what the files' modes say: root may do everything.
fn opened_by_nobody(dir: &Path) -> String {
    let exe = std::env::current_exe().unwrap();
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    // The program may lie where nobody else can read it.
    let program = dir.with_file_name("program");
    fs::copy(&exe, &program).unwrap();
    let mut command = if is_root {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&program);
        command
    } else {
        Command::new(&program)
    };
    let output = command
        .args(["--exact", "directory::child_opens", "--nocapture"])
        .env(OPEN_DIR, dir)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = text.lines().find_map(|line| line.strip_prefix("said ")).map(str::to_owned);
    said.unwrap_or_else(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

fn give(path: &Path, uid: u32) {
    // Not root: everything is ours already, and stays so.
    let _ = chown(path, Some(uid), Some(uid));
    if path.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| give(&entry.unwrap().path(), uid));
    }
}

fn protect(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[tokio::test]
async fn a_directory_that_cannot_be_used_is_refused_with_the_reason_and_left_as_it_is() {
    let scratch = Scratch::new("directory");
    let base = scratch.path("base");
    fs::create_dir(&base).unwrap();
    protect(&base, 0o777);
    let dir = base.join("journal");
    let acked = made(&base).await;
    let (mut rounds, mut failures) = (0, Vec::new());
    let mut expect = |name: &str, said: String, wanted: &[&str]| {
        rounds += 1;
        if !wanted.iter().all(|part| said.contains(part)) {
            failures.push(format!("{name}: {said}"));
        }
    };
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    if is_root {
        expect("wrong owner", opened_by_nobody(&dir), &["refused", "PermissionDenied"]);
    }
    give(&base, 65534);
    for name in ["journal/db", "journal.anchor/slots"] {
        protect(&base.join(name), 0o400);
        expect(name, opened_by_nobody(&dir), &["refused", "PermissionDenied"]);
        protect(&base.join(name), 0o600);
    }
    expect("ours again", opened_by_nobody(&dir), &["opened 1"]);
    give(&base, if is_root { 0 } else { fs::metadata("/proc/self").unwrap().uid() });
    let away = base.join("away");
    fs::rename(&dir, &away).unwrap();
    expect("missing", format!("{:?}", Sled::open(&dir).err()), &["StoreMissing"]);
    fs::rename(&away, &dir).unwrap();
    let held = Sled::open(&dir).unwrap();
    expect("opened twice", format!("{:?}", Sled::open(&dir).err()), &["Locked"]);
    expect("opened by two processes", opened_by_the_same(&dir), &["refused", "Locked"]);
    drop(held);
    let nowhere = Sled::open(&base.join("no/such/parent")).err();
    expect("no parent", format!("{nowhere:?}"), &["Io"]);
    assert!(nowhere.is_some_and(|error| !error.is_broken() && matches!(error, BackendError::Io { .. })));
    failures.extend(check(&dir, &acked).await.err());
    row("directory missing, read-only, wrong owner, open twice", rounds, &failures);
}

fn opened_by_the_same(dir: &Path) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "directory::child_opens", "--nocapture"])
        .env(OPEN_DIR, dir)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

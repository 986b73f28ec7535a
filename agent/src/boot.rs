//! How a server is started: always as a replica of an address where nobody answers, so that it serves nobody and feeds
//! nobody until it is said what it is.

use crate::args::Config;
use rand::{Rng, distr::Alphanumeric};
use sha2::{Digest, Sha256};
use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Command,
};
use valkeeper_core::config::{AOF_DIR, GATE_ADDRESS, GATE_PORT_BLANK, GATE_PORT_HISTORY, RDB_FILE};

/// The agent's user at its server: what it needs and no key.
const USER_RULES: &str = "+ping +info +auth +config|get +config|set +replicaof +client +acl|users";
/// The agent's user.
pub const USER: &str = "valkeeper-agent";
/// Length of its password: 62^32 is about 190 bits.
const PASSWORD_LENGTH: usize = 32;
/// Where a snapshot says which history it is of: among the first auxiliary fields.
const RDB_HEAD_BYTES: u64 = 1024;

/// What a server was started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// Nothing.
    Blank,
    /// A snapshot that says which history it is of.
    RdbWithHistory,
    /// A snapshot that does not.
    Rdb,
    /// The append-only file, which never says.
    Aof,
}

/// How to start it, this time.
pub struct Start {
    pub command: Command,
    pub files: Files,
    /// The append-only file is configured and was left off, so that the snapshot is loaded.
    pub aof_left_off: bool,
}

/// A password for one life of the agent, kept in memory only.
pub fn password() -> String {
    rand::rng().sample_iter(Alphanumeric).take(PASSWORD_LENGTH).map(char::from).collect()
}

/// The socket that the server listens on for its agent.
pub fn socket(config: &Config) -> PathBuf {
    config.args.run_dir.join("valkeeper.sock")
}

/// Writes the copy of the users with the agent's own and prepares the command.
///
/// A server that was `blank` begins so again: what files it has made since are no data of anybody's.
pub fn prepare(config: &Config, password: &str, blank: bool) -> io::Result<Start> {
    let args = &config.args;
    let users = args.run_dir.join("valkeeper-users.acl");
    write_users(&args.aclfile, &users, password)?;
    let found = files(&args.data)?;
    let aof_left_off = matches!(found, Files::Rdb | Files::RdbWithHistory) && wants_aof(&args.command)?;
    let files = if blank { Files::Blank } else { found };
    let port = if files == Files::Blank { GATE_PORT_BLANK } else { GATE_PORT_HISTORY };
    let (program, given) = args.command.split_first().ok_or_else(|| io::Error::other("no command"))?;
    let mut command = Command::new(program);
    command.args(given);
    command.args(["--replicaof", GATE_ADDRESS, &port.to_string()]);
    command.args(["--replica-announce-ip", &config.pod_ip]);
    command.arg("--unixsocket").arg(socket(config)).args(["--unixsocketperm", "700"]);
    command.arg("--aclfile").arg(&users);
    if aof_left_off {
        // With the append-only file on, a server does not look at a snapshot that stands alone: it would start empty.
        command.args(["--appendonly", "no"]);
    }
    Ok(Start { command, files, aof_left_off })
}

fn write_users(from: &Path, to: &Path, password: &str) -> io::Result<()> {
    let text =
        fs::read_to_string(from).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", from.display())))?;
    let hash: String = Sha256::digest(password.as_bytes()).iter().map(|b| format!("{b:02x}")).collect();
    let own = format!("user {USER} ");
    let others: String =
        text.lines().filter(|line| !line.starts_with(&own)).map(|l| format!("{l}\n")).collect();
    let _ = fs::remove_file(to);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    writeln!(file, "{others}user {USER} on #{hash} resetkeys resetchannels -@all {USER_RULES}")
}

fn files(data: &Path) -> io::Result<Files> {
    if has_manifest(&data.join(AOF_DIR))? {
        return Ok(Files::Aof);
    }
    match fs::File::open(data.join(RDB_FILE)) {
        Ok(file) => {
            let mut head = Vec::new();
            file.take(RDB_HEAD_BYTES).read_to_end(&mut head)?;
            let says = head.windows(7).any(|window| window == b"repl-id");
            Ok(if says { Files::RdbWithHistory } else { Files::Rdb })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Files::Blank),
        Err(error) => Err(error),
    }
}

/// Whether the append-only file is there: without its manifest a server sees none of its parts.
fn has_manifest(dir: &Path) -> io::Result<bool> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(false);
        }
        Err(error) => return Err(error),
    };
    for entry in entries {
        let name = entry?.file_name();
        // One that was being written has another name until it is whole.
        let name = name.to_string_lossy();
        if name.ends_with(".manifest") && !name.starts_with("temp-") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the configuration file turns the append-only file on.
fn wants_aof(command: &[String]) -> io::Result<bool> {
    let Some(conf) = command.iter().skip(1).find(|arg| arg.ends_with(".conf")) else {
        return Ok(false);
    };
    let text = fs::read_to_string(conf)?;
    let last = text.lines().filter_map(|line| line.trim().strip_prefix("appendonly ")).next_back();
    Ok(last.is_some_and(|value| value.trim() == "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_disk_says_how_the_server_begins() {
        let dir = std::env::temp_dir().join(format!("valkeeper-boot-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        assert_eq!(files(&dir).unwrap(), Files::Blank);
        fs::write(dir.join(RDB_FILE), b"VALKEY080\xfa\x0avalkey-ver\x059.1.2").unwrap();
        assert_eq!(files(&dir).unwrap(), Files::Rdb);
        fs::write(dir.join(RDB_FILE), b"VALKEY080\xfa\x07repl-id\x28").unwrap();
        assert_eq!(files(&dir).unwrap(), Files::RdbWithHistory);
        fs::create_dir(dir.join(AOF_DIR)).unwrap();
        fs::write(dir.join(AOF_DIR).join("temp-appendonly.aof.manifest"), "").unwrap();
        assert_eq!(files(&dir).unwrap(), Files::RdbWithHistory);
        fs::write(dir.join(AOF_DIR).join("appendonly.aof.manifest"), "").unwrap();
        assert_eq!(files(&dir).unwrap(), Files::Aof);

        let (from, to) = (dir.join("users"), dir.join("copy"));
        fs::write(&from, "user default off\nuser valkeeper-agent on nopass ~* +@all").unwrap();
        write_users(&from, &to, "secret").unwrap();
        let copy = fs::read_to_string(&to).unwrap();
        assert!(copy.starts_with("user default off\nuser valkeeper-agent on #"), "{copy}");
        assert!(!copy.contains("nopass") && !copy.contains("secret"), "{copy}");
        fs::remove_dir_all(&dir).unwrap();
    }
}

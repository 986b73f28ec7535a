//! How a server is started: always with its port closed, and as a replica of an address where nobody answers, so that it serves nobody and
//! feeds nobody until it is said what it is. In Cluster mode, where a server refuses to follow an address, the closed port is the gate.

mod users;

pub use users::{Login, Users};

use crate::args::{Announce, Config};
use rand::{Rng, distr::Alphanumeric};
use std::{
    fs,
    io::{self, Read},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};
use valkeeper_core::{
    config::{
        AOF_DIR, BUS_PORT, GATE_ADDRESS, GATE_PORT_BLANK, GATE_PORT_HISTORY, GATE_SOCKET_BLANK,
        GATE_SOCKET_HISTORY, NODES_FILE, PORT, RDB_FILE,
    },
    spec::Topology,
};

/// The agent's user.
pub const USER: &str = "valkeeper-agent";
/// Length of its password: 62^32 is about 190 bits.
const PASSWORD_LENGTH: usize = 32;
/// What a replica at the gate of Cluster mode logs in at its primary with: nobody's password, so that it cannot be synchronised.
pub const PRIMARYAUTH_NOBODYS: &str = "valkeeper-gate";
/// The socket's file, where its name need not say anything.
const SOCKET: &str = "valkeeper.sock";
/// Ending of a data file that is put aside.
const ASIDE: &str = ".aside";
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

/// The socket at which the agent finds its server.
pub fn socket(config: &Config) -> PathBuf {
    config.args.run_dir.join(SOCKET)
}

/// Where the server listens for its agent. In Cluster mode the name tells those who look what the server began with, and the agent's path
/// leads there. What the last server left is removed.
fn lay_socket(run_dir: &Path, topology: Topology, mark: &str) -> io::Result<PathBuf> {
    for name in [SOCKET, GATE_SOCKET_BLANK, GATE_SOCKET_HISTORY] {
        match fs::remove_file(run_dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    match topology {
        Topology::Replication => Ok(run_dir.join(SOCKET)),
        Topology::Cluster => {
            symlink(mark, run_dir.join(SOCKET))?;
            Ok(run_dir.join(mark))
        }
    }
}

/// Writes the copy of the users with the agent's own and prepares the command.
///
/// A server that was `blank` begins so again: what files it has made since are no data of anybody's.
pub fn prepare(config: &Config, users: &Users, blank: bool) -> io::Result<Start> {
    let args = &config.args;
    let found = match config.topology {
        Topology::Replication => files(&args.data)?,
        Topology::Cluster => files_of_node(&args.data)?,
    };
    let aof_left_off = matches!(found, Files::Rdb | Files::RdbWithHistory) && wants_aof(&args.command)?;
    let files = if blank { Files::Blank } else { found };
    let (program, given) = args.command.split_first().ok_or_else(|| io::Error::other("no command"))?;
    let mut command = Command::new(program);
    command.args(given);
    users.write()?;
    let (port, mark) = match files {
        Files::Blank => (GATE_PORT_BLANK, GATE_SOCKET_BLANK),
        Files::RdbWithHistory | Files::Rdb | Files::Aof => (GATE_PORT_HISTORY, GATE_SOCKET_HISTORY),
    };
    match config.topology {
        Topology::Replication => {
            command.args(["--replicaof", GATE_ADDRESS, &port.to_string()]);
            command.args(["--replica-announce-ip", &config.pod_ip]);
        }
        Topology::Cluster => {
            command.args(["--primaryauth", PRIMARYAUTH_NOBODYS]);
            // A primary that was away is held for dead for up to four seconds after its return: nobody shall be elected in its place.
            command.args(["--cluster-replica-no-failover", "yes"]);
            // Otherwise a node that has moved shows its own old address for ever.
            command.args(["--cluster-announce-ip", &config.pod_ip]);
            // The bus has a port of its own, which is not derived from that of clients while that is closed.
            command.args(["--cluster-announce-port", &args.server_port.to_string()]);
            command.args(["--cluster-port", &args.server_port.saturating_add(BUS_PORT - PORT).to_string()]);
            let name = format!("{}-{}", args.cluster, config.me);
            command.args(["--cluster-announce-human-nodename", &name]);
            // Whatever clients are told: a node that names others by hostname says `?` of one that announces none, and in a rollout that
            // turns to hostnames nodes of both kinds are there.
            command.args(["--cluster-announce-hostname", &config.announced()]);
            match args.announce {
                Announce::Address => {}
                Announce::Hostname => {
                    command.args(["--cluster-preferred-endpoint-type", "hostname"]);
                }
            }
        }
    }
    // Clients, replicas and whoever brings keys are refused until the server has left the gate.
    command.args(["--port", "0"]);
    // Otherwise a replica says of itself that it is at the port which it had when it connected.
    command.args(["--replica-announce-port", &args.server_port.to_string()]);
    let socket = lay_socket(&args.run_dir, config.topology, mark)?;
    command.arg("--unixsocket").arg(socket).args(["--unixsocketperm", "700"]);
    command.arg("--aclfile").arg(users.file());
    if aof_left_off {
        // With the append-only file on, a server does not look at a snapshot that stands alone: it would start empty.
        command.args(["--appendonly", "no"]);
    }
    Ok(Start { command, files, aof_left_off })
}

/// Has the server read a copy of its configuration file that stays as it is for the life of the pod. What is mounted becomes that of
/// the next revision before the pod does, and a server of an older version does not start with a directive that it does not know.
pub fn keep_configuration(command: &mut [String], run_dir: &Path) -> io::Result<()> {
    let Some(conf) = command.iter_mut().skip(1).find(|arg| arg.ends_with(".conf")) else {
        return Ok(());
    };
    let (copy, unfinished) = (run_dir.join("valkey.conf"), run_dir.join(".valkey.conf"));
    if !copy.try_exists()? {
        let whole = fs::copy(&*conf, &unfinished).and_then(|_| fs::rename(&unfinished, &copy));
        whole.map_err(|error| io::Error::new(error.kind(), format!("{conf}: {error}")))?;
    }
    *conf = copy.display().to_string();
    Ok(())
}

/// The configuration file in the server's command.
pub fn configuration(command: &[String]) -> Option<&String> {
    command.iter().skip(1).find(|arg| arg.ends_with(".conf"))
}

/// Which topology the server is of, by its configuration file.
pub fn topology(command: &[String]) -> io::Result<Topology> {
    let enabled = configured(command, "cluster-enabled")?.as_deref() == Some("yes");
    Ok(if enabled { Topology::Cluster } else { Topology::Replication })
}

/// The files that a node starts from. Without its id it would be a stranger that takes slots for the keys it has: data that is not
/// known to be anybody's is put aside, and the member begins as a new one.
fn files_of_node(data: &Path) -> io::Result<Files> {
    let known = match fs::metadata(data.join(NODES_FILE)) {
        Ok(found) => found.len() > 0,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    let found = files(data)?;
    if known || found == Files::Blank {
        return Ok(found);
    }
    for name in [RDB_FILE, AOF_DIR] {
        put_aside(data, name)?;
    }
    tracing::warn!("nodes.conf is lost: the data is put aside, and the member begins without any");
    files(data)
}

/// Renames it; what was put aside before makes place.
fn put_aside(data: &Path, name: &str) -> io::Result<()> {
    let (from, to) = (data.join(name), data.join(format!("{name}{ASIDE}")));
    if !from.try_exists()? {
        return Ok(());
    }
    match if to.is_dir() { fs::remove_dir_all(&to) } else { fs::remove_file(&to) } {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    fs::rename(&from, &to)
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
    Ok(configured(command, "appendonly")?.as_deref() == Some("yes"))
}

/// What the configuration file says of a directive last.
fn configured(command: &[String], directive: &str) -> io::Result<Option<String>> {
    let Some(conf) = configuration(command) else {
        return Ok(None);
    };
    let text =
        fs::read_to_string(conf).map_err(|error| io::Error::new(error.kind(), format!("{conf}: {error}")))?;
    let words =
        |line: &str| line.trim().split_once(' ').map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut values = text.lines().filter_map(words).filter(|(name, _)| name == directive);
    Ok(values.next_back().map(|(_, value)| value.trim().to_owned()))
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
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn the_name_of_a_nodes_socket_says_what_it_began_with_and_the_agents_path_leads_there() {
        let dir = std::env::temp_dir().join(format!("valkeeper-socket-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let names = || {
            let names = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name());
            let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
            names.sort();
            names
        };
        for mark in [GATE_SOCKET_BLANK, GATE_SOCKET_HISTORY, GATE_SOCKET_BLANK] {
            let path = lay_socket(&dir, Topology::Cluster, mark).unwrap();
            assert_eq!(
                (path, names()),
                (dir.join(mark), vec![SOCKET.to_owned()]),
                "of the last one nothing is left"
            );
            fs::write(dir.join(mark), mark).unwrap();
            assert_eq!(fs::read_to_string(dir.join(SOCKET)).unwrap(), mark);
        }
        let path = lay_socket(&dir, Topology::Replication, GATE_SOCKET_BLANK).unwrap();
        assert_eq!((path, names()), (dir.join(SOCKET), Vec::new()));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn data_without_a_node_that_it_is_of_is_put_aside_and_one_generation_of_it_kept() {
        let dir = std::env::temp_dir().join(format!("valkeeper-aside-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let read = |name: &str| fs::read_to_string(dir.join(name)).ok();
        for (text, nodes) in [("first", None), ("second", Some(""))] {
            fs::write(dir.join(RDB_FILE), text).unwrap();
            fs::create_dir(dir.join(AOF_DIR)).unwrap();
            fs::write(dir.join(AOF_DIR).join("appendonly.aof.manifest"), text).unwrap();
            if let Some(nodes) = nodes {
                fs::write(dir.join(NODES_FILE), nodes).unwrap();
            }
            assert_eq!(files_of_node(&dir).unwrap(), Files::Blank);
            assert_eq!(read("dump.rdb.aside").as_deref(), Some(text));
            assert_eq!(read("appendonlydir.aside/appendonly.aof.manifest").as_deref(), Some(text));
        }
        fs::write(dir.join(RDB_FILE), "third").unwrap();
        fs::write(dir.join(NODES_FILE), "a node").unwrap();
        assert_eq!(files_of_node(&dir).unwrap(), Files::Rdb);
        assert_eq!(read("dump.rdb.aside").as_deref(), Some("second"));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_a_pod_began_with_stays_its_configuration() {
        let dir = std::env::temp_dir().join(format!("valkeeper-kept-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let mounted = dir.join("mounted.conf");
        fs::write(&mounted, "port 1\n").unwrap();
        let kept = || {
            let mut command =
                ["valkey-server", &mounted.display().to_string(), "--port", "2"].map(str::to_owned);
            keep_configuration(&mut command, &dir).unwrap();
            assert_eq!(
                (command[0].as_str(), &command[2..]),
                ("valkey-server", &["--port".to_owned(), "2".to_owned()][..])
            );
            fs::read_to_string(&command[1]).unwrap()
        };
        assert_eq!(kept(), "port 1\n");
        fs::write(&mounted, "a-directive-of-tomorrow yes\n").unwrap();
        assert_eq!(kept(), "port 1\n");
        let mut command = ["valkey-server".to_owned()];
        keep_configuration(&mut command, &dir).unwrap();
        assert_eq!(command, ["valkey-server"]);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn the_last_word_of_the_configuration_file_counts() {
        let conf = std::env::temp_dir().join(format!("valkeeper-mode-{}.conf", std::process::id()));
        let command = ["valkey-server".to_owned(), conf.display().to_string()];
        for (text, expected) in [
            ("port 1\n", Topology::Replication),
            ("cluster-enabled yes\n", Topology::Cluster),
            ("  cluster-enabled  yes \nport 1\n", Topology::Cluster),
            ("cluster-enabled yes\ncluster-enabled no\n", Topology::Replication),
            ("# cluster-enabled yes\n", Topology::Replication),
        ] {
            fs::write(&conf, text).unwrap();
            assert_eq!(topology(&command).unwrap(), expected, "{text}");
        }
        fs::remove_file(&conf).unwrap();
    }
}

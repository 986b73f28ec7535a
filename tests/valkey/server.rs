//! Real valkey-servers for tests: a process each, with its own directory and port, which ends with its guard.

use redis::{AsyncConnectionConfig, Client, ConnectionInfo, IntoConnectionInfo, aio::MultiplexedConnection};
use sha2::{Digest, Sha256};
use std::{
    env, fs,
    net::{IpAddr, Ipv4Addr, TcpListener},
    ops::Deref,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};
use tokio::sync::Notify;
use valkeeper::valkey::{Credentials, Direct, Look, MemberLink, Secret, Target, Wake, Way};
use valkeeper_core::{
    config::{BUS_PORT, PORT},
    ids::MemberId,
    observation::Observed,
    spec::Topology,
};

/// Longest wait for anything a test expects. Only a failing test waits that long.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two checks of an expected condition.
const PAUSE: Duration = Duration::from_millis(2);
/// Other processes take ports too: how often another one is tried.
const PORT_TRIES: u32 = 5;

/// The operator's user.
pub const OPERATOR: &str = "valkeeper";
pub const OPERATOR_PASSWORD: &str = "operator-password-for-tests";
const APP_PASSWORD: &str = "app-password-for-tests";
const REPLICATION_PASSWORD: &str = "replication-password-for-tests";

/// A local valkey-server as its users see it.
#[derive(Clone, Copy, Debug)]
pub struct Instance {
    pub port: u16,
    /// Where tests talk to it if its port may be closed, or be another's.
    pub socket: Option<&'static Path>,
}

/// A running valkey-server.
pub struct Server {
    instance: Instance,
    dir: PathBuf,
    child: Child,
}

impl Deref for Server {
    type Target = Instance;

    fn deref(&self) -> &Instance {
        &self.instance
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Server {
    /// Starts a server with extra lines of configuration and waits until it answers.
    pub async fn start(extra: &str) -> Server {
        let server = Server::spawn(extra).await;
        server.answers().await;
        server
    }

    /// As [`Server::start`], following `primary`, and waits until it is in sync.
    pub async fn replica_of(primary: &Server) -> Server {
        let server = Server::start(&format!("replicaof 127.0.0.1 {}", primary.port)).await;
        server.in_sync().await;
        server
    }

    /// Starts a server and waits until it listens, not until it has loaded.
    pub async fn spawn(extra: &str) -> Server {
        for _ in 0..PORT_TRIES {
            let (port, dir) = place();
            let mut server =
                Server { instance: Instance { port, socket: None }, child: launch(&dir, port, extra), dir };
            if server.listens().await {
                return server;
            }
        }
        panic!("valkey-server did not start on any of {PORT_TRIES} ports");
    }

    /// Starts a server that has no port, at a socket of this name, and waits until it answers.
    pub async fn at_socket(name: &str, extra: &str) -> Server {
        let (port, dir) = place();
        let socket: &'static Path = Box::leak(dir.join(name).into_boxed_path());
        let child = launch(&dir, port, &format!("port 0\nunixsocket {}\n{extra}", socket.display()));
        let server = Server { instance: Instance { port, socket: Some(socket) }, child, dir };
        server.answers().await;
        server
    }

    /// Starts the server again at its port, in its directory.
    pub async fn restart(&mut self, extra: &str) {
        self.kill();
        self.child = launch(&self.dir, self.port, extra);
        assert!(self.listens().await, "{}", self.log());
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGKILL without waiting; the time just before it was sent.
    pub fn kill_now(&mut self) -> Instant {
        let at = Instant::now();
        self.child.kill().unwrap();
        at
    }

    /// Sends a signal by name, e.g. `STOP`.
    pub fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// False if the process ended instead.
    async fn listens(&mut self) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await.is_ok() {
                return true;
            }
            tokio::time::sleep(PAUSE).await;
        }
        false
    }

    async fn answers(&self) {
        self.run::<String>("PING").await.unwrap_or_else(|error| panic!("{error}: {}", self.log()));
    }
}

impl Instance {
    /// A connection as the application's user.
    pub async fn app(&self) -> MultiplexedConnection {
        eventually("a connection of the application", || async { self.try_app().await.ok() }).await
    }

    async fn try_app(&self) -> redis::RedisResult<MultiplexedConnection> {
        let url = match self.socket {
            Some(socket) => format!("redis+unix://{}?user=app&pass={APP_PASSWORD}", socket.display()),
            None => format!("redis://app:{APP_PASSWORD}@127.0.0.1:{}", self.port),
        };
        let info: ConnectionInfo = url.into_connection_info()?;
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(5)));
        Client::open(info)?.get_multiplexed_async_connection_with_config(&config).await
    }

    /// Runs a command given as words, as the application's user.
    pub async fn run<T: redis::FromRedisValue>(&self, words: &str) -> redis::RedisResult<T> {
        let mut command = redis::Cmd::new();
        words.split_whitespace().for_each(|word| {
            command.arg(word);
        });
        command.query_async(&mut self.app().await).await
    }

    pub async fn dbsize(&self) -> u64 {
        self.run("DBSIZE").await.unwrap()
    }

    pub async fn field(&self, name: &str) -> String {
        let info: String = self.run("INFO everything").await.unwrap();
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().to_owned()
    }

    /// Waits until its link is up and it has all its primary has.
    pub async fn in_sync(&self) {
        eventually("a link that is up", || async {
            (self.field("master_link_status").await == "up").then_some(())
        })
        .await;
    }

    pub fn target(&self) -> Target {
        target_at(self.port)
    }

    /// A link that has not looked yet, with what it wakes.
    pub fn link(&self) -> (MemberLink, Wake) {
        link_to(self.target(), OPERATOR_PASSWORD)
    }

    /// A link that holds a connection, and its first look.
    pub async fn linked(&self) -> (MemberLink, Look) {
        let (link, _) = self.link();
        let look = present(&link).await;
        (link, look)
    }
}

/// A server that is in no Valkey Cluster.
pub fn target_at(port: u16) -> Target {
    let (member, address) = (MemberId::new(0, 0), IpAddr::V4(Ipv4Addr::LOCALHOST));
    Target { member, address, port, topology: Topology::Replication }
}

pub fn link_to(target: Target, password: &str) -> (MemberLink, Wake) {
    link_by(Arc::new(Direct), target, password)
}

pub fn link_by(way: Arc<dyn Way>, target: Target, password: &str) -> (MemberLink, Wake) {
    let credentials = Credentials::new(OPERATOR, Secret::new(password));
    let wake: Wake = Arc::new(Notify::new());
    (MemberLink::connect(target, way, credentials, wake.clone()), wake)
}

/// Looks, and the answer must be there.
pub async fn present(link: &MemberLink) -> Look {
    match link.look().await {
        Observed::Present(look) => look,
        other @ (Observed::Absent | Observed::Unknown(_)) => panic!("{other:?}: {:?}", link.trouble()),
    }
}

/// Awaits a condition.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut check: impl FnMut() -> F) -> T {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if let Some(found) = check().await {
            return found;
        }
        tokio::time::sleep(PAUSE).await;
    }
    panic!("waited {PATIENCE:?} for {what}");
}

/// Sends a process a signal by name, e.g. `STOP`.
pub fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap().success());
}

/// A port that nobody uses, below those that the system gives to outgoing connections: one of theirs could be taken between
/// this answer and the server's start. No two calls of a process give the same one.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + (std::process::id() % 200) as u16 * 100;
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    let next = || first + NEXT.fetch_add(1, Ordering::Relaxed) % 2_000;
    std::iter::repeat_with(next).take(2_000).find(is_free).expect("a free port")
}

/// A port whose bus port is free as well, and below those that the system gives to outgoing connections, too.
pub fn node_port() -> u16 {
    let below = |port: u16| 10_000 + (port - 10_000) % 12_000;
    let is_free = |port: &u16| {
        [*port, port + (BUS_PORT - PORT)]
            .map(|p| TcpListener::bind((Ipv4Addr::LOCALHOST, p)))
            .iter()
            .all(Result::is_ok)
    };
    std::iter::repeat_with(|| below(free_port())).take(2_000).find(is_free).expect("two free ports")
}

/// Awaits a wake-up.
pub async fn woken(wake: &Wake) {
    tokio::time::timeout(PATIENCE, wake.notified()).await.expect("a wake-up");
}

/// users.acl: the operator's user may look, as in a cluster.
pub fn users() -> String {
    let hash = |password: &str| -> String {
        Sha256::digest(password.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
    };
    format!(
        "user default off\n\
         user {OPERATOR} on #{operator} resetchannels -@all +ping +info +role\n\
         user app on #{app} ~* &* +@all\n\
         user replication on #{replication} resetchannels -@all +psync +replconf +ping\n",
        operator = hash(OPERATOR_PASSWORD),
        app = hash(APP_PASSWORD),
        replication = hash(REPLICATION_PASSWORD),
    )
}

/// valkey.conf of a server that keeps its files in `dir`.
pub fn conf(dir: &Path, port: u16) -> String {
    format!(
        "port {port}\nbind 127.0.0.1\ndir {dir}\nsave \"\"\nrepl-diskless-sync-delay 0\n\
         enable-debug-command local\nprimaryuser replication\nprimaryauth {REPLICATION_PASSWORD}\n",
        dir = dir.display(),
    )
}

/// A free port, and a directory for the server there.
fn place() -> (u16, PathBuf) {
    let port = free_port();
    let dir = env::temp_dir().join(format!("valkeeper-test-{}-{port}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    (port, dir)
}

fn launch(dir: &Path, port: u16, extra: &str) -> Child {
    fs::write(dir.join("users.acl"), users()).unwrap();
    let (log, acl) = (dir.join("log"), dir.join("users.acl"));
    let conf = format!("{}logfile {}\naclfile {}\n{extra}\n", conf(dir, port), log.display(), acl.display());
    fs::write(dir.join("valkey.conf"), conf).unwrap();
    let binary = binaries().join("valkey-server");
    let started = Command::new(&binary)
        .arg(dir.join("valkey.conf"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    started.unwrap_or_else(|error| panic!("{}: {error}", binary.display()))
}

/// The directory with the server's binaries.
pub fn binaries() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = env::var_os("VALKEY_BIN_DIR").map_or_else(prepared_binaries, PathBuf::from);
        let hint = "set VALKEY_BIN_DIR to a directory that has it";
        assert!(dir.join("valkey-server").exists(), "no valkey-server in {}: {hint}", dir.display());
        dir
    })
}

fn prepared_binaries() -> PathBuf {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/cluster");
    let hint = "its message says what is missing; or set VALKEY_BIN_DIR to a directory with valkey-server";
    let output = Command::new(&tool).arg("valkey-bin").stderr(Stdio::inherit()).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}; {hint}", tool.display()));
    assert!(output.status.success(), "{} valkey-bin failed: {hint}", tool.display());
    let text = String::from_utf8(output.stdout).unwrap();
    PathBuf::from(text.lines().last().unwrap_or_default().trim())
}

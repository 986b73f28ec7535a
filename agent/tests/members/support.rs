//! Real agents with real valkey-servers: a process each, at an address of its own on loopback, which end with their guards.

use super::pki::Pki;
use redis::aio::MultiplexedConnection;
use std::{
    env, fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};
use tonic::transport::Channel;
use valkeeper_agent::{
    link,
    proto::{self, agent_client::AgentClient},
    tls::{Accept, Live, Peer},
};
use valkeeper_core::ids::MemberId;

/// Longest wait for anything a test expects. Only a failing test waits that long.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Between two checks of an expected condition.
const PAUSE: Duration = Duration::from_millis(5);
pub const CLUSTER: &str = "orders";

/// Awaits a condition.
pub async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if let Some(found) = check().await {
            return found;
        }
        tokio::time::sleep(PAUSE).await;
    }
    panic!("waited {PATIENCE:?} for {what}");
}

/// The members of one shard, and the operator's side.
pub struct Shard {
    pub pki: Pki,
    pub operator: Live,
    pub members: Vec<Member>,
    dir: PathBuf,
}

/// A member: its directory outlives its agent.
pub struct Member {
    pub ip: IpAddr,
    pub port: u16,
    pub dir: PathBuf,
    ordinal: u16,
    arguments: Vec<String>,
    agent: Option<Child>,
}

impl Drop for Shard {
    fn drop(&mut self) {
        self.members.iter_mut().for_each(Member::kill);
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

impl Shard {
    /// Starts `count` members whose servers have these lines of configuration.
    pub fn start(count: u16, conf: &str) -> Shard {
        let (a, b, port) =
            (rand::random_range(2..250), rand::random_range(2..250), rand::random_range(20_000..30_000));
        let dir = env::temp_dir().join(format!("vk-{}-{a}-{b}", std::process::id()));
        let pki = Pki::new(CLUSTER);
        pki.write(&dir.join("identity"), CLUSTER, 0, count);
        let ip = |ordinal: u16| IpAddr::V4(Ipv4Addr::new(127, a, b, u8::try_from(ordinal).unwrap() + 1));
        let peers: Vec<String> =
            (0..count).map(|n| format!("--peer=0-{n}={}", SocketAddr::new(ip(n), port + 1))).collect();
        let members = (0..count)
            .map(|ordinal| {
                let mut member = Member {
                    ip: ip(ordinal),
                    port,
                    dir: dir.join(ordinal.to_string()),
                    ordinal,
                    arguments: peers.clone(),
                    agent: None,
                };
                member.prepare(&dir, conf);
                member.start();
                member
            })
            .collect();
        Shard { operator: pki.operator(), pki, members, dir }
    }

    /// New certificates of the same root.
    pub fn renew(&self) {
        let count = u16::try_from(self.members.len()).unwrap();
        self.pki.write(&self.dir.join("identity"), CLUSTER, 0, count);
    }

    pub fn roster(&self) -> Vec<String> {
        (0..self.members.len()).map(|n| format!("0-{n}")).collect()
    }

    pub fn brief(&self, grant: u64, holder: u16, isolation_ms: i64) -> proto::Brief {
        proto::Brief { grant, holder: format!("0-{holder}"), roster: self.roster(), isolation_ms }
    }

    /// The operator's connection to an agent.
    pub async fn agent(&self, ordinal: u16) -> AgentClient<Channel> {
        eventually("an agent that answers", || self.try_agent(&self.operator, ordinal)).await
    }

    pub async fn try_agent(&self, as_whom: &Live, ordinal: u16) -> Option<AgentClient<Channel>> {
        let member = &self.members[usize::from(ordinal)];
        let address = SocketAddr::new(member.ip, member.port + 1);
        let peer = Peer::Member {
            namespace: "test".to_owned(),
            cluster: CLUSTER.to_owned(),
            member: MemberId::new(0, ordinal),
        };
        let channel = link::connect(as_whom, Accept::Exactly(peer), address, Duration::from_secs(2)).await;
        channel.ok().map(AgentClient::new)
    }

    /// Greets; what the agent says.
    pub async fn greet(&self, ordinal: u16, epoch: u64, news_address: &str) -> proto::AgentState {
        let request = proto::GreetRequest { epoch, news_address: news_address.to_owned() };
        self.agent(ordinal).await.greet(request).await.unwrap().into_inner()
    }

    /// Greets until the agent's server has loaded at the gate.
    pub async fn at_gate(&self, ordinal: u16, epoch: u64) -> proto::AgentState {
        eventually("a server at the gate", || async {
            let state = self.greet(ordinal, epoch, "").await;
            let holds =
                state.gate == "holding" && state.hold_reason != "Starting" && !state.run_id.is_empty();
            holds.then_some(state)
        })
        .await
    }

    /// The promotion that everything speaks for.
    pub async fn promotion(
        &self,
        ordinal: u16,
        epoch: u64,
        grant: u64,
        isolation_ms: i64,
    ) -> proto::PromoteRequest {
        let state = self.greet(ordinal, epoch, "").await;
        let member = &self.members[usize::from(ordinal)];
        proto::PromoteRequest {
            epoch,
            brief: Some(self.brief(grant, ordinal, isolation_ms)),
            run_id: member.field("run_id").await,
            replid: member.field("master_replid").await,
            offset: member.offset().await,
            consents: state.consents,
            by: proto::Promotion::Unspecified.into(),
        }
    }

    pub async fn promote(&self, ordinal: u16, epoch: u64, grant: u64, isolation_ms: i64) {
        let request = self.promotion(ordinal, epoch, grant, isolation_ms).await;
        self.agent(ordinal).await.promote(request).await.unwrap();
    }

    /// Attaches a member and waits until its link is up.
    pub async fn attach(&self, ordinal: u16, to: u16, epoch: u64, grant: u64, isolation_ms: i64) {
        self.have_follow(ordinal, to, epoch, grant, isolation_ms).await;
        self.members[usize::from(ordinal)].linked().await;
    }

    /// Attaches a member.
    pub async fn have_follow(&self, ordinal: u16, to: u16, epoch: u64, grant: u64, isolation_ms: i64) {
        let (member, source) = (&self.members[usize::from(ordinal)], &self.members[usize::from(to)]);
        let request = proto::AttachRequest {
            epoch,
            brief: Some(self.brief(grant, to, isolation_ms)),
            run_id: member.field("run_id").await,
            host: source.ip.to_string(),
            port: u32::from(source.port),
            node_id: String::new(),
        };
        self.agent(ordinal).await.attach(request).await.unwrap();
    }

    /// Promotes the first and attaches the others.
    pub async fn serve(&self, epoch: u64, grant: u64, isolation_ms: i64) {
        for ordinal in 0..self.members.len() {
            self.at_gate(u16::try_from(ordinal).unwrap(), epoch).await;
        }
        self.promote(0, epoch, grant, isolation_ms).await;
        for ordinal in 1..self.members.len() {
            self.attach(u16::try_from(ordinal).unwrap(), 0, epoch, grant, isolation_ms).await;
        }
    }
}

impl Member {
    fn prepare(&mut self, shared: &Path, conf: &str) {
        let Member { ip, port, dir, ordinal, .. } = self;
        let (data, run) = (dir.join("data"), dir.join("run"));
        fs::create_dir_all(&data).unwrap();
        fs::create_dir_all(&run).unwrap();
        let text = format!(
            "port {port}\nbind {ip}\nbind-source-addr {ip}\ndir {}\nprotected-mode no\nrepl-diskless-sync-delay 0\n\
             repl-ping-replica-period 1\ninclude {}\n{conf}\n",
            data.display(),
            dir.join("auth.conf").display()
        );
        fs::write(dir.join("valkey.conf"), text).unwrap();
        fs::write(dir.join("auth.conf"), "primaryuser replica\nprimaryauth of-replicas\n").unwrap();
        fs::write(
            dir.join("users.acl"),
            "user default on nopass ~* &* +@all\n\
             user valkeeper on nopass +ping +info +role +cluster|nodes\n\
             user replica on >of-replicas +ping +psync +replconf\n",
        )
        .unwrap();
        let path = |path: PathBuf| path.display().to_string();
        self.arguments.extend([
            format!("--cluster={CLUSTER}"),
            format!("--data={}", path(data)),
            format!("--identity={}", path(shared.join("identity"))),
            format!("--aclfile={}", path(dir.join("users.acl"))),
            format!("--run-dir={}", path(run)),
            format!("--grpc-listen={}", SocketAddr::new(*ip, *port + 1)),
            format!("--http-listen={}", SocketAddr::new(*ip, *port + 2)),
            format!("--server-port={port}"),
            "--".to_owned(),
            path(binaries().join("valkey-server")),
            path(dir.join("valkey.conf")),
        ]);
        debug_assert!(*ordinal < 200);
    }

    /// Clients shall be told names from the next start on.
    pub fn announce_names(&mut self) {
        self.arguments.insert(0, "--announce=hostname".to_owned());
    }

    /// Starts the agent.
    pub fn start(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_valkeeper-agent"));
        command.arg("run").args(&self.arguments).env_clear();
        command
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .env("VALKEEPER_LOG", "debug,h2=info,hyper=info");
        command.env("POD_NAME", format!("{CLUSTER}-0-{}", self.ordinal)).env("POD_NAMESPACE", "test");
        command.env("POD_IP", self.ip.to_string());
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).process_group(0);
        self.agent = Some(command.spawn().unwrap());
    }

    pub fn pid(&self) -> u32 {
        self.agent.as_ref().unwrap().id()
    }

    /// Whether the agent is the process it was.
    pub fn lives(&mut self) -> bool {
        self.agent.as_mut().is_some_and(|agent| agent.try_wait().unwrap().is_none())
    }

    /// Asks the agent to end.
    pub fn terminate(&self) {
        signal(self.pid(), "TERM");
    }

    /// How the agent ended.
    pub async fn ended(&mut self) -> ExitStatus {
        let begun = Instant::now();
        let agent = self.agent.as_mut().unwrap();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = agent.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(PAUSE).await;
        }
        panic!("the agent did not end: {}", self.log());
    }

    /// Ends agent and server.
    pub fn kill(&mut self) {
        let Some(mut agent) = self.agent.take() else { return };
        let _ = agent.kill();
        let _ = agent.wait();
        // Without its PID 1 a server would live on here, other than in a container.
        for started in self.log().lines().filter(|line| line.contains("the server is started at the gate")) {
            if let Some(pid) = number(started, "\"pid\":") {
                let own = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                if own.contains(&self.dir.display().to_string()) {
                    signal(pid, "KILL");
                }
            }
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// The ledger as it is on disk.
    pub fn ledger(&self) -> valkeeper_core::agent::Ledger {
        let text = fs::read_to_string(self.dir.join("data/valkeeper/agent.json")).unwrap();
        let slots =
            text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line.trim()).ok());
        let newest = slots.max_by_key(|slot| slot["number"].as_u64()).unwrap();
        serde_json::from_value(newest["ledger"].clone()).unwrap()
    }

    /// Loses the data and keeps the ledger.
    pub fn lose_data(&self) {
        let _ = fs::remove_file(self.dir.join("data/dump.rdb"));
        let _ = fs::remove_dir_all(self.dir.join("data/appendonlydir"));
    }

    /// A held connection of this user.
    pub async fn connect(&self, user: &str) -> MultiplexedConnection {
        eventually("a server that answers", || self.connection(user)).await
    }

    /// At the server's socket, whatever becomes of its port.
    pub async fn connection(&self, user: &str) -> Option<MultiplexedConnection> {
        let socket = self.dir.join("run/valkeeper.sock");
        self.connected(&format!("redis+unix://{}?user={user}&pass=any", socket.display())).await
    }

    /// At the port of clients, whoever serves there.
    pub async fn client(&self) -> Option<MultiplexedConnection> {
        self.connected(&format!("redis://default:any@{}:{}", self.ip, self.port)).await
    }

    async fn connected(&self, url: &str) -> Option<MultiplexedConnection> {
        let client = redis::Client::open(url).unwrap();
        let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(2)));
        client.get_multiplexed_async_connection_with_config(&config).await.ok()
    }

    /// Runs a command given as words.
    pub async fn run<T: redis::FromRedisValue>(&self, words: &str) -> redis::RedisResult<T> {
        self.run_as("default", words).await
    }

    pub async fn run_as<T: redis::FromRedisValue>(&self, user: &str, words: &str) -> redis::RedisResult<T> {
        let mut connection = self.connect(user).await;
        let mut command = redis::Cmd::new();
        words.split_whitespace().for_each(|word| {
            command.arg(word);
        });
        command.query_async(&mut connection).await
    }

    /// A field of INFO.
    pub async fn field(&self, name: &str) -> String {
        let info: String = self.run_as("valkeeper", "INFO everything").await.unwrap();
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().to_owned()
    }

    /// Its replication offset, whatever its role.
    async fn offset(&self) -> i64 {
        let (replica, primary) =
            (self.field("slave_repl_offset").await, self.field("master_repl_offset").await);
        if replica.is_empty() { primary } else { replica }.parse().unwrap()
    }

    /// Waits until its link is up.
    pub async fn linked(&self) {
        eventually("a link that is up", || async {
            (self.field("master_link_status").await == "up").then_some(())
        })
        .await;
    }

    /// The number of the server's process.
    pub async fn server_pid(&self) -> u32 {
        self.field("process_id").await.parse().unwrap()
    }

    /// Status and body of one of the agent's pages.
    pub async fn page(&self, path: &str) -> Option<(u16, String)> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect((self.ip, self.port + 2)).await.ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.ok()?;
        let status = text.split(' ').nth(1)?.parse().ok()?;
        Some((status, text.split_once("\r\n\r\n")?.1.to_owned()))
    }
}

fn number(line: &str, after: &str) -> Option<u32> {
    let rest = line.split(after).nth(1)?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Sends a signal by name, e.g. `STOP`.
pub fn signal(pid: u32, name: &str) {
    let _ = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
}

/// The directory with the server's binaries.
fn binaries() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let hint =
            "set VALKEY_BIN_DIR to a directory that has it (tests/cluster/cluster valkey-bin prints one)";
        let dir = env::var_os("VALKEY_BIN_DIR")
            .map(PathBuf::from)
            .unwrap_or_else(|| panic!("no valkey-server: {hint}"));
        assert!(dir.join("valkey-server").exists(), "no valkey-server in {}: {hint}", dir.display());
        dir
    })
}

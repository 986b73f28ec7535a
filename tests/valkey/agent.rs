//! Real agents for tests: a process each, with the server it looks after, reached as the operator reaches them.

use crate::server::{
    Instance, OPERATOR_PASSWORD, binaries, conf, eventually, free_port, link_by, node_port, present, signal,
    users,
};
use std::{
    env, fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Notify;
use valkeeper::{
    agents::{AgentLink, Board, Dial, Endpoint, Paused, Place, Tunnel},
    clock::Clock,
    command::{Side, handover},
    pki::{Certified, LEAF_LIFETIME_DEFAULT, cluster_uri, operator_uri},
    valkey::{Look, MemberLink, Target, Wake, Way},
};
use valkeeper_agent::tls::{Identity, Live, Peer};
use valkeeper_core::{
    agent::Brief,
    effect::{Outcome, Server},
    ids::{MemberId, Seq, WriterEpoch},
    observation::AgentFacts,
    spec::Topology,
};

/// Namespace and name of the cluster in all tests.
pub const OWNER: (&str, &str) = ("shop", "orders");
/// Longest wait for an agent to end with its server.
const END_MAX: Duration = Duration::from_secs(15);
/// Between two looks whether it has.
const END_PAUSE: Duration = Duration::from_millis(10);

/// A root with what hangs on it.
pub struct Pki {
    root: Certified,
    cluster: Certified,
}

impl Pki {
    pub fn new() -> Pki {
        let now = Clock::start().now();
        let root = Certified::root(now).unwrap();
        let cluster = root.intermediate(&cluster_uri(OWNER.0, OWNER.1), now).unwrap();
        Pki { root, cluster }
    }

    /// An operator's identity.
    pub fn operator(&self) -> Live {
        let now = Clock::start().now();
        let issuer = self.root.intermediate(&operator_uri(), now).unwrap();
        let own = issuer.leaf("test", LEAF_LIFETIME_DEFAULT, now).unwrap();
        let [roots, chain, key] = [&self.root.chain, &own.chain, own.key.expose()].map(str::as_bytes);
        Live::new(Identity::from_pem(roots, chain, key).unwrap())
    }

    /// A member's identity.
    pub fn member(&self, member: MemberId) -> Live {
        let own = self.leaf(member);
        let [roots, chain, key] = [&self.root.chain, &own.chain, own.key.expose()].map(str::as_bytes);
        Live::new(Identity::from_pem(roots, chain, key).unwrap())
    }

    fn leaf(&self, member: MemberId) -> Certified {
        self.cluster.leaf(&member.to_string(), LEAF_LIFETIME_DEFAULT, Clock::start().now()).unwrap()
    }

    fn write(&self, member: MemberId, dir: &Path) {
        let leaf = self.leaf(member);
        fs::write(dir.join("ca.crt"), &self.root.chain).unwrap();
        fs::write(dir.join(format!("{}.crt", member.ordinal)), &leaf.chain).unwrap();
        fs::write(dir.join(format!("{}.key", member.ordinal)), leaf.key.expose()).unwrap();
    }
}

/// An operator as far as agents notice: an epoch, an identity, and what was said to it.
pub struct Operator {
    dial: Dial,
    pub urgent: Arc<Notify>,
}

impl Operator {
    pub fn new(pki: &Pki, epoch: u64) -> Operator {
        Operator::with_news(pki, epoch, String::new())
    }

    /// One that says where it takes news.
    pub fn with_news(pki: &Pki, epoch: u64, news_address: String) -> Operator {
        let urgent = Arc::new(Notify::new());
        let board = Board::new(WriterEpoch(epoch), Clock::start(), urgent.clone(), Arc::default());
        Operator { dial: Dial { live: pki.operator(), news_address, board: Arc::new(board) }, urgent }
    }

    pub fn board(&self) -> &Arc<Board> {
        &self.dial.board
    }

    /// A link that has heard from the agent.
    pub async fn reach(&self, member: &Member) -> AgentLink {
        let link = self.dial(member);
        link.settled().await;
        eventually("an agent that answers", || async { self.facts(member) }).await;
        link
    }

    /// A link that may never hear from it.
    pub fn dial(&self, member: &Member) -> AgentLink {
        self.dial_to(member.place())
    }

    /// The same to whoever is there.
    pub fn dial_to(&self, place: Place) -> AgentLink {
        AgentLink::open(place, self.dial.clone())
    }

    pub fn facts(&self, member: &Member) -> Option<AgentFacts> {
        self.board().facts(member.id).present().cloned()
    }
}

/// Where a member's agent is expected.
pub fn place(member: MemberId, port: u16) -> Place {
    let (namespace, cluster) = (OWNER.0.to_owned(), OWNER.1.to_owned());
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    Place { member, address, peer: Peer::Member { namespace, cluster, member } }
}

/// A member: an agent with its server.
pub struct Member {
    pub id: MemberId,
    instance: Instance,
    grpc_port: u16,
    /// As its operator reaches the server.
    tunnel: Arc<dyn Way>,
    dir: PathBuf,
    child: Child,
}

impl std::ops::Deref for Member {
    type Target = Instance;

    fn deref(&self) -> &Instance {
        &self.instance
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // A stopped server would not hear the end.
        if let Some(pid) = self.last_pid() {
            let _ = Command::new("kill").args(["-CONT", &pid.to_string()]).stderr(Stdio::null()).status();
        }
        signal(self.child.id(), "TERM");
        let begun = Instant::now();
        while begun.elapsed() < END_MAX && self.child.try_wait().unwrap().is_none() {
            let _ = Command::new("sleep").arg(END_PAUSE.as_secs_f32().to_string()).status();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Member {
    /// Starts an agent whose server answers, at the gate.
    pub async fn start(pki: &Pki, ordinal: u16) -> Member {
        let member = Member::begin(pki, ordinal, free_port(), "", &users());
        member.app().await;
        member
    }

    /// The same of a server that is a node of a Valkey Cluster: at the gate it lets in nobody but the operator.
    pub async fn start_node(pki: &Pki, ordinal: u16) -> (Member, MemberLink) {
        let more = "cluster-enabled yes\ncluster-config-file nodes.conf\ncluster-require-full-coverage no\n\
                    cluster-node-timeout 2000\ncluster-allow-replica-migration no";
        let looks = "+ping +info +role +cluster|nodes +cluster|getslotmigrations";
        // What is handed over to a server is written there as the user of replication.
        let writes = "+psync +replconf +ping ~* +@write +pfcount +select +cluster|syncslots";
        let users = users().replace("+ping +info +role", looks).replace("+psync +replconf +ping", writes);
        let member = Member::begin(pki, ordinal, node_port(), more, &users);
        let target = Target { topology: Topology::Cluster, ..member.target() };
        let (link, _) = link_by(Arc::clone(&member.tunnel), target, OPERATOR_PASSWORD);
        eventually("a node that answers", || async { link.look().await.present().map(|_| ()) }).await;
        (member, link)
    }

    fn begin(pki: &Pki, ordinal: u16, port: u16, more: &str, users: &str) -> Member {
        let id = MemberId::new(0, ordinal);
        let [grpc_port, http_port] = [free_port(), free_port()];
        let dir = memory().join(format!("valkeeper-agent-test-{}-{port}", std::process::id()));
        let [data, run, identity] = ["data", "run", "identity"].map(|name| dir.join(name));
        for each in [&data, &run, &identity] {
            fs::create_dir_all(each).unwrap();
        }
        pki.write(id, &identity);
        fs::write(dir.join("users.acl"), users).unwrap();
        let conf = format!("{}{more}\n", conf(&data, port));
        fs::write(dir.join("valkey.conf"), &conf).unwrap();
        let auth: Vec<&str> = conf.lines().filter(|line| line.starts_with("primary")).collect();
        fs::write(dir.join("auth.conf"), auth.join("\n")).unwrap();
        let log = fs::File::create(dir.join("log")).unwrap();
        let child = Command::new(program())
            .args(["run", "--cluster", OWNER.1, "--operator-user", crate::server::OPERATOR])
            .arg("--data")
            .arg(&data)
            .arg("--run-dir")
            .arg(&run)
            .arg("--identity")
            .arg(&identity)
            .arg("--aclfile")
            .arg(dir.join("users.acl"))
            .arg("--grpc-listen")
            .arg(format!("127.0.0.1:{grpc_port}"))
            .arg("--http-listen")
            .arg(format!("127.0.0.1:{http_port}"))
            .arg("--server-port")
            .arg(port.to_string())
            .arg("--")
            .arg(binaries().join("valkey-server"))
            .arg(dir.join("valkey.conf"))
            .env("POD_NAME", format!("{}-{id}", OWNER.1))
            .env("POD_NAMESPACE", OWNER.0)
            .env("POD_IP", "127.0.0.1")
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let socket: &'static Path = Box::leak(run.join("valkeeper.sock").into_boxed_path());
        let (namespace, cluster) = (OWNER.0.to_owned(), OWNER.1.to_owned());
        let tunnel = Arc::new(Tunnel { port: grpc_port, live: pki.operator(), namespace, cluster });
        Member { id, instance: Instance { port, socket: Some(socket) }, grpc_port, tunnel, dir, child }
    }

    /// Where its server is.
    pub fn target(&self) -> Target {
        Target { member: self.id, ..self.instance.target() }
    }

    /// The way to its server.
    pub fn way(&self) -> Arc<dyn Way> {
        Arc::clone(&self.tunnel)
    }

    /// A link that has not looked yet, with what it wakes.
    pub fn link(&self) -> (MemberLink, Wake) {
        link_by(Arc::clone(&self.tunnel), self.target(), OPERATOR_PASSWORD)
    }

    /// A link that holds a connection, and its first look.
    pub async fn linked(&self) -> (MemberLink, Look) {
        let (link, _) = self.link();
        let look = present(&link).await;
        (link, look)
    }

    pub fn place(&self) -> Place {
        place(self.id, self.grpc_port)
    }

    /// Gives it another certificate, as a renewed Secret would.
    pub fn renew(&self, pki: &Pki) {
        pki.write(self.id, &self.dir.join("identity"));
    }

    /// Process id of the server that answers.
    pub async fn server_pid(&self) -> u32 {
        self.field("process_id").await.parse().unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Process id of the server that was started last, as the agent logged it.
    fn last_pid(&self) -> Option<u32> {
        let log = self.log();
        let line = log.lines().rev().find(|line| line.contains("started at the gate"))?;
        let digits = line.split("\"pid\":").nth(1)?;
        digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    }

    /// The process that answers now, as effects name it.
    pub fn process(&self, look: &Look) -> Server {
        Server { member: self.id, address: "127.0.0.1".to_owned(), run_id: look.run_id.clone() }
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint { host: "127.0.0.1".to_owned(), port: self.port, node: None }
    }
}

/// A grant of this number for this member.
pub fn brief(grant: u64, holder: &Member) -> Brief {
    terms(grant, holder.id)
}

pub fn terms(grant: u64, holder: MemberId) -> Brief {
    let roster = (0..2).map(|ordinal| MemberId::new(0, ordinal)).collect();
    Brief { grant: Seq(grant), holder: Some(holder), roster, isolation_ms: 0 }
}

pub fn at(look: &Look) -> Paused {
    Paused { replid: look.replid.clone(), offset: look.offset }
}

/// A primary with a replica in sync, their links and their agents'.
pub struct Pair {
    pub pki: Pki,
    pub operator: Operator,
    pub members: [Member; 2],
    pub agents: [AgentLink; 2],
    pub links: [MemberLink; 2],
}

impl Pair {
    /// Grant 1 is the first member's.
    pub async fn start() -> Pair {
        let pki = Pki::new();
        let operator = Operator::new(&pki, 1);
        let members = [Member::start(&pki, 0).await, Member::start(&pki, 1).await];
        let [one, two] = &members;
        let agents = [operator.reach(one).await, operator.reach(two).await];
        let ((link, look), (other, other_look)) = (one.linked().await, two.linked().await);
        agents[0].promote(&one.process(&look), &brief(1, one), &at(&look), 0).await.unwrap();
        agents[1].attach(&two.process(&other_look), &brief(1, one), &one.endpoint()).await.unwrap();
        two.in_sync().await;
        Pair { pki, operator, members, agents, links: [link, other] }
    }

    /// Hands over from one to the other, under this grant.
    pub async fn hand_over(&self, grant: u64, from: usize, to: usize, timeout_ms: u32) -> Outcome {
        self.hand_over_through(&self.links[from], grant, from, to, timeout_ms).await
    }

    /// The same with another link to the old primary.
    pub async fn hand_over_through(
        &self,
        link: &MemberLink,
        grant: u64,
        from: usize,
        to: usize,
        timeout_ms: u32,
    ) -> Outcome {
        let [old, new] = [&self.members[from], &self.members[to]];
        let [old_look, new_look] = [present(link).await, present(&self.links[to]).await];
        let (old_process, new_process) = (old.process(&old_look), new.process(&new_look));
        let from = Side { agent: &self.agents[from], link, server: &old_process };
        let to = Side { agent: &self.agents[to], link: &self.links[to], server: &new_process };
        handover(&from, &to, &brief(grant, new), 0, timeout_ms).await
    }
}

/// Where files live in memory, if the system has such a place: what is tested is not how fast a disk syncs.
fn memory() -> PathBuf {
    let shared = PathBuf::from("/dev/shm");
    if shared.is_dir() { shared } else { env::temp_dir() }
}

/// The agent's program, built beside this test.
fn program() -> PathBuf {
    let here = env::current_exe().unwrap();
    let target = here.parent().and_then(Path::parent).unwrap();
    let program = target.join("valkeeper-agent");
    assert!(program.exists(), "{} is missing: run `cargo build -p valkeeper-agent`", program.display());
    program
}

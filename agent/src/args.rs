//! The command line, and what Kubernetes gives in the environment.

use crate::boot;
use anyhow::Context;
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, str::FromStr};
use valkeeper_core::{
    config::{DATA_DIR, PORT, SECRET_DIR},
    ids::MemberId,
    spec::Topology,
};

/// PID 1 of a Valkey member.
#[derive(clap::Parser, Debug)]
#[command(version, about)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Start the server at the boot gate and look after it. Reads POD_NAME, POD_NAMESPACE and POD_IP.
    Run(Box<RunArgs>),
    /// Copy this program into a directory.
    Install {
        /// The directory.
        dir: PathBuf,
    },
}

#[derive(clap::Args, Debug)]
pub struct RunArgs {
    /// Name of the cluster; the pod's name is it, `-`, and the member.
    #[arg(long)]
    pub cluster: String,
    /// Directory of the data files.
    #[arg(long, default_value = DATA_DIR)]
    pub data: PathBuf,
    /// Directory of ca.crt, ORDINAL.crt and ORDINAL.key.
    #[arg(long, default_value = "/etc/valkeeper/identity")]
    pub identity: PathBuf,
    /// The users, to which the agent adds its own in a copy.
    #[arg(long, default_value_os_t = PathBuf::from(SECRET_DIR).join("users.acl"))]
    pub aclfile: PathBuf,
    /// Where that copy, one of the server's configuration file and its socket are.
    #[arg(long, default_value = "/tmp")]
    pub run_dir: PathBuf,
    /// Address of the gRPC services; by default port 7443 of every address.
    #[arg(long)]
    pub grpc_listen: Option<SocketAddr>,
    /// Address of probes and metrics; by default port 9121 of every address.
    #[arg(long)]
    pub http_listen: Option<SocketAddr>,
    /// Port of the servers, this one's and its peers'.
    #[arg(long, default_value_t = PORT)]
    pub server_port: u16,
    /// Where a peer's agent is, MEMBER=IP:PORT, instead of asking DNS. Repeatable.
    #[arg(long)]
    pub peer: Vec<PeerAddress>,
    /// How a node of a Valkey Cluster names nodes to clients.
    #[arg(long, value_enum, default_value_t = Announce::Address)]
    pub announce: Announce,
    /// The user that the operator looks with: its connections are never ended.
    #[arg(long, default_value = "valkeeper")]
    pub operator_user: String,
    /// The container's control group.
    #[arg(long, default_value = "/sys/fs/cgroup")]
    pub cgroup: PathBuf,
    /// The server's command: the program, its configuration file and more.
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

/// How a node names nodes to clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Announce {
    /// By address.
    Address,
    /// By their pods' names in DNS.
    Hostname,
}

/// The name in DNS of a member's pod, whatever its address: for other members.
pub fn hostname(namespace: &str, cluster: &str, member: MemberId) -> String {
    format!("{cluster}-{member}.{cluster}-headless.{namespace}.svc")
}

/// MEMBER=IP:PORT
#[derive(Clone, Debug)]
pub struct PeerAddress(MemberId, SocketAddr);

impl FromStr for PeerAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (member, address) = text.split_once('=').ok_or("expected MEMBER=IP:PORT")?;
        let member = member.parse().map_err(|error| format!("{error}"))?;
        Ok(PeerAddress(member, address.parse().map_err(|error| format!("{address}: {error}"))?))
    }
}

/// Everything that is given.
#[derive(Debug)]
pub struct Config {
    pub args: RunArgs,
    pub namespace: String,
    pub pod_ip: String,
    pub me: MemberId,
    /// By the server's configuration file.
    pub topology: Topology,
}

impl Config {
    /// Adds the environment to the command line.
    pub fn read(mut args: RunArgs) -> anyhow::Result<Config> {
        let var = |name: &'static str| std::env::var(name).context(name);
        let pod = var("POD_NAME")?;
        let member = pod.strip_prefix(&args.cluster).and_then(|rest| rest.strip_prefix('-'));
        let member = member.with_context(|| format!("POD_NAME {pod} is not of cluster {}", args.cluster))?;
        let me = member.parse().with_context(|| format!("POD_NAME {pod}"))?;
        boot::keep_configuration(&mut args.command, &args.run_dir).context("keeping the configuration")?;
        let topology = boot::topology(&args.command)?;
        Ok(Config { namespace: var("POD_NAMESPACE")?, pod_ip: var("POD_IP")?, me, topology, args })
    }

    /// The name in DNS of this member's own Service: for clients. Its address stays when the pod moves.
    pub fn announced(&self) -> String {
        format!("{}-node-{}.{}.svc", self.args.cluster, self.me, self.namespace)
    }

    /// Peers whose addresses are given.
    pub fn peer_addresses(&self) -> BTreeMap<MemberId, SocketAddr> {
        self.args.peer.iter().map(|PeerAddress(member, address)| (*member, *address)).collect()
    }
}

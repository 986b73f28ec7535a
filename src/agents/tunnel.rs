//! The way to a server through its agent: over the agent's port, shown by certificates to be the member's. The server's own port may be
//! closed, or passed on to another member's server.

use crate::valkey::{Direct, Error, Opened, Target, Way, way::connected};
use async_trait::async_trait;
use std::net::SocketAddr;
use tokio::io::AsyncReadExt;
use valkeeper_agent::tls::{ALPN_H2, ALPN_SERVER, ALPN_SERVER_IN, Accept, Live, Peer, Reached};
use valkeeper_core::spec::Topology;

/// The way to the servers of one cluster.
pub struct Tunnel {
    /// Where agents listen, at the addresses of their pods.
    pub port: u16,
    /// The operator's identity.
    pub live: Live,
    /// The cluster's namespace.
    pub namespace: String,
    /// The cluster's name.
    pub cluster: String,
}

#[async_trait]
impl Way for Tunnel {
    async fn open(&self, target: Target) -> Result<Opened, Error> {
        let stream = connected(SocketAddr::new(target.address, self.port)).await?;
        let (namespace, cluster) = (self.namespace.clone(), self.cluster.clone());
        let peer = Peer::Member { namespace, cluster, member: target.member };
        // A certificate that is not accepted is somebody else's at the address, which says nothing of the server.
        let accept = Accept::Exactly(peer);
        let connecting = self.live.connect(&accept, &[ALPN_SERVER_IN, ALPN_SERVER, ALPN_H2], stream);
        let mut tunnel = connecting.await.map_err(|error| Error::of_io(&error))?;
        let logged_in = tunnel.protocol() == Some(ALPN_SERVER_IN);
        if !logged_in && tunnel.protocol() != Some(ALPN_SERVER) {
            // An agent of an earlier build.
            return match target.topology {
                // Its server has its port to itself all the time.
                Topology::Replication => Direct.open(target).await,
                // There the gate was a list of users beside an open port: nobody asks for that, so the server would look as if it served.
                Topology::Cluster => Err(Error::Refusal(
                    "its agent is of an earlier build, whose gate cannot be seen".to_owned(),
                )),
            };
        }
        let said = tunnel.read_u8().await.map_err(|error| Error::of_io(&error))?;
        match Reached::of_byte(said) {
            Reached::Server => Ok(Opened { stream: Box::new(tunnel), logged_in }),
            Reached::Nobody => Err(Error::NoServer),
            Reached::Refused => Err(Error::Unauthorized("the agent's login".to_owned())),
            Reached::Unknown => Err(Error::Silent),
        }
    }
}

//! Who speaks to whom, decided by certificates: a root of the operator's, one intermediate for each cluster and one for the
//! operator itself, and leaves that may only be what their intermediate is. Used by both sides, for what they serve
//! and for what they call. Nothing is taken from a name in DNS: an address proves nothing.

mod peer;

pub use peer::{Accept, NotAPeer, Peer};

use crate::limits::{PerKey, Place};
use peer::PeerVerifier;
use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::NoServerSessionStorage,
};
use sha2::{Digest, Sha256};
use std::{io, sync::Arc};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::watch,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// What ALPN offers for gRPC.
pub const ALPN_H2: &[u8] = b"h2";
/// What ALPN offers for plain requests.
pub const ALPN_HTTP1: &[u8] = b"http/1.1";
/// What ALPN offers for a tunnel to the agent's server.
pub const ALPN_SERVER: &[u8] = b"valkeeper-server/1";
/// The same, logged in by the agent as the user that the operator looks as.
pub const ALPN_SERVER_IN: &[u8] = b"valkeeper-server/2";

/// What an agent says first in a tunnel: whether its server is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// What follows is the server's.
    Server,
    /// Nobody serves: the process has ended, or has not begun to listen.
    Nobody,
    /// It is there, and lets nobody in as the operator's user.
    Refused,
    /// The agent cannot say.
    Unknown,
}

impl Reached {
    /// As it is sent.
    pub fn byte(self) -> u8 {
        match self {
            Reached::Server => b'+',
            Reached::Nobody => b'-',
            Reached::Refused => b'!',
            Reached::Unknown => b'?',
        }
    }

    /// As it was received.
    pub fn of_byte(byte: u8) -> Reached {
        match byte {
            b'+' => Reached::Server,
            b'-' => Reached::Nobody,
            b'!' => Reached::Refused,
            _ => Reached::Unknown,
        }
    }
}

/// Why an identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or a field is not PEM of the right kind.
    #[error("{0} cannot be read as PEM")]
    Pem(&'static str, #[source] rustls::pki_types::pem::Error),
    /// The certificates are not what the rules ask for.
    #[error("the certificates are none of a member or an operator")]
    Peer(#[from] NotAPeer),
    /// Key, roots or protocol do not fit.
    #[error("the TLS library refuses the identity")]
    Rustls(#[from] rustls::Error),
    /// A root cannot be used.
    #[error("there is no root that can be used")]
    Roots,
}

/// A leaf with its intermediate and key, and the roots to verify others by.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    verifier: Arc<PeerVerifier>,
    /// Who it says to be.
    pub peer: Peer,
    /// Hex of the SHA-256 of the leaf's DER form.
    pub thumbprint: String,
    /// End of the leaf's validity, in seconds since the Unix epoch.
    pub not_after_s: i64,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("peer", &self.peer)
            .field("thumbprint", &self.thumbprint)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads an identity: `roots` has one or more certificates, `chain` the leaf and then its intermediate.
    ///
    /// # Errors
    /// Any part that cannot be read, or a chain that is not of a peer. Whether the chain verifies against the roots is
    /// for the other side to say.
    pub fn from_pem(roots: &[u8], chain: &[u8], key: &[u8]) -> Result<Identity, Error> {
        let roots = certificates(roots, "the roots")?;
        let chain = certificates(chain, "the chain")?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| Error::Pem("the key", error))?;
        let peer = peer::of_chain(&chain)?;
        let leaf = chain.first().ok_or(NotAPeer::Chain)?;
        let (thumbprint, not_after_s) = (thumbprint(leaf), peer::not_after_s(leaf)?);
        let verifier = Arc::new(PeerVerifier::new(&roots, provider())?);
        let identity = Identity { chain, key, verifier, peer, thumbprint, not_after_s };
        // A key that is not the leaf's is found now, not at the first connection.
        identity.server_config(&Accept::Operator, &[ALPN_H2])?;
        Ok(identity)
    }

    fn server_config(&self, accept: &Accept, alpn: &[&[u8]]) -> Result<ServerConfig, rustls::Error> {
        let verifier = self.verifier.accepting(accept.clone());
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        // A resumed session would not be verified again.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    fn client_config(&self, accept: &Accept, alpn: &[&[u8]]) -> Result<ClientConfig, rustls::Error> {
        let verifier = self.verifier.accepting(accept.clone());
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        Ok(config)
    }
}

fn certificates(pem: &[u8], what: &'static str) -> Result<Vec<CertificateDer<'static>>, Error> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|error| Error::Pem(what, error))
}

/// Hex of the SHA-256 of a certificate's DER form.
pub fn thumbprint(certificate: &CertificateDer<'_>) -> String {
    Sha256::digest(certificate.as_ref()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The identity that is in force now. Clones share it; each connection takes the newest.
#[derive(Clone, Debug)]
pub struct Live(Arc<watch::Sender<Arc<Identity>>>);

impl Live {
    /// Begins with this one.
    pub fn new(identity: Identity) -> Live {
        Live(Arc::new(watch::Sender::new(Arc::new(identity))))
    }

    /// From the next connection on, this one.
    pub fn replace(&self, identity: Identity) {
        self.0.send_replace(Arc::new(identity));
    }

    /// The one in force.
    pub fn current(&self) -> Arc<Identity> {
        self.0.borrow().clone()
    }

    /// Shakes hands with who has connected, over one of these protocols. The stream says who it is, and which
    /// protocol was agreed. Unbounded: the caller has the bound.
    ///
    /// # Errors
    /// Whoever is not accepted, and a handshake that breaks.
    pub async fn accept(&self, accept: &Accept, alpn: &[&[u8]], stream: TcpStream) -> io::Result<Secured> {
        let config = self.current().server_config(accept, alpn).map_err(io::Error::other)?;
        let stream = TlsAcceptor::from(Arc::new(config)).accept(stream).await?;
        let peer = verified(stream.get_ref().1.peer_certificates())?;
        Ok(Secured { stream: stream.into(), peer, place: None })
    }

    /// Shakes hands with whom it has connected to, over one of these protocols, of which the other chooses. Unbounded: the caller has the
    /// bound.
    ///
    /// # Errors
    /// Whoever is not accepted, and a handshake that breaks.
    pub async fn connect(&self, accept: &Accept, alpn: &[&[u8]], stream: TcpStream) -> io::Result<Secured> {
        let config = self.current().client_config(accept, alpn).map_err(io::Error::other)?;
        let name = ServerName::from(stream.peer_addr()?.ip());
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        let peer = verified(stream.get_ref().1.peer_certificates())?;
        Ok(Secured { stream: stream.into(), peer, place: None })
    }
}

fn verified(chain: Option<&[CertificateDer<'static>]>) -> io::Result<Peer> {
    peer::of_chain(chain.unwrap_or_default()).map_err(io::Error::other)
}

/// A connection with a verified peer.
pub struct Secured {
    stream: TlsStream<TcpStream>,
    /// Who is at the other end.
    pub peer: Peer,
    /// What it takes of the places that its peer has.
    place: Option<Place<Peer>>,
}

impl Secured {
    /// Takes one of its peer's places, as long as it lasts. `None`: there is none.
    pub fn placed(mut self, places: &PerKey<Peer>) -> Option<Secured> {
        self.place = Some(places.enter(self.peer.clone())?);
        Some(self)
    }

    /// The protocol that both sides agreed on.
    pub fn protocol(&self) -> Option<&[u8]> {
        self.stream.get_ref().1.alpn_protocol()
    }
}

impl tonic::transport::server::Connected for Secured {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Secured {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_flush(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;

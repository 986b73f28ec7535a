//! A certificate's URI to a peer, and the rule that a peer is verified by: the chain leads to a root through exactly one
//! intermediate, and the leaf is what that intermediate may speak for.

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use std::{fmt, sync::Arc};
use valkeeper_core::ids::{MemberId, ShardId};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

/// What every name begins with.
const TRUST_DOMAIN: &str = "spiffe://valkeeper/";
/// The operator's place among the namespaces.
const OPERATOR: &str = "operator";

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// An operator, by the name of its instance.
    Operator(String),
    /// A member's agent.
    Member {
        /// Namespace of its cluster.
        namespace: String,
        /// Name of its cluster.
        cluster: String,
        /// The member.
        member: MemberId,
    },
}

impl fmt::Display for Peer {
    /// The URI of its certificate.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Operator(instance) => write!(f, "{TRUST_DOMAIN}{OPERATOR}/{instance}"),
            Peer::Member { namespace, cluster, member } => {
                write!(f, "{TRUST_DOMAIN}{namespace}/{cluster}/{member}")
            }
        }
    }
}

/// Why a chain is no peer's. Holds nothing of what was in it: it comes from a stranger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAPeer {
    /// Not exactly a leaf and an intermediate, the one issued by the other.
    #[error("not a leaf and the one intermediate that issued it")]
    Chain,
    /// A certificate cannot be read.
    #[error("a certificate cannot be read")]
    Garbled,
    /// Not exactly one URI in a certificate.
    #[error("a certificate has not exactly one URI")]
    Uri,
    /// The leaf is not what its intermediate may speak for.
    #[error("the intermediate may not speak for that leaf")]
    Intermediate,
    /// The URI is neither a member's nor an operator's.
    #[error("the URI is neither a member's nor an operator's")]
    Name,
}

/// Whom a connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accept {
    /// Any operator of this root.
    Operator,
    /// Any member of any cluster of this root.
    AnyMember,
    /// This one.
    Exactly(Peer),
    /// Any operator, and the members of one shard.
    OperatorOrShard {
        /// Namespace of the cluster.
        namespace: String,
        /// Name of the cluster.
        cluster: String,
        /// The shard.
        shard: ShardId,
    },
}

impl Accept {
    /// True if `peer` may come in.
    pub fn allows(&self, peer: &Peer) -> bool {
        match (self, peer) {
            (Accept::Operator | Accept::OperatorOrShard { .. }, Peer::Operator(_)) => true,
            (Accept::AnyMember, Peer::Member { .. }) => true,
            (Accept::Exactly(wanted), peer) => wanted == peer,
            (
                Accept::OperatorOrShard { namespace: n, cluster: c, shard },
                Peer::Member { namespace, cluster, member },
            ) => n == namespace && c == cluster && member.shard == *shard,
            (Accept::Operator, Peer::Member { .. }) | (Accept::AnyMember, Peer::Operator(_)) => false,
        }
    }
}

fn parsed<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, NotAPeer> {
    X509Certificate::from_der(der.as_ref()).map(|(_, certificate)| certificate).map_err(|_| NotAPeer::Garbled)
}

/// End of a certificate's validity, in seconds since the Unix epoch.
pub(super) fn not_after_s(der: &CertificateDer<'_>) -> Result<i64, NotAPeer> {
    Ok(parsed(der)?.validity().not_after.timestamp())
}

fn uri(certificate: &X509Certificate<'_>) -> Result<String, NotAPeer> {
    let names =
        certificate.subject_alternative_name().map_err(|_| NotAPeer::Garbled)?.ok_or(NotAPeer::Uri)?;
    let mut uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => Ok(uri.to_owned()),
        (None | Some(_), _) => Err(NotAPeer::Uri),
    }
}

/// Who a chain says to be, if its leaf is what its intermediate may speak for. Whether it leads to a root is the verifier's.
pub(super) fn of_chain(chain: &[CertificateDer<'_>]) -> Result<Peer, NotAPeer> {
    let [leaf, intermediate] = chain else {
        return Err(NotAPeer::Chain);
    };
    let (leaf, intermediate) = (parsed(leaf)?, parsed(intermediate)?);
    // So that the verified path leads through this intermediate: the root has another name.
    if leaf.issuer().as_raw() != intermediate.subject().as_raw()
        || intermediate.issuer().as_raw() == intermediate.subject().as_raw()
    {
        return Err(NotAPeer::Chain);
    }
    let (leaf, intermediate) = (uri(&leaf)?, uri(&intermediate)?);
    let rest = leaf.strip_prefix(&intermediate).and_then(|rest| rest.strip_prefix('/'));
    if rest.is_none_or(|segment| !is_segment(segment)) {
        return Err(NotAPeer::Intermediate);
    }
    of_uri(&leaf).ok_or(NotAPeer::Name)
}

fn of_uri(uri: &str) -> Option<Peer> {
    let segments: Vec<&str> = uri.strip_prefix(TRUST_DOMAIN)?.split('/').collect();
    match segments.as_slice() {
        [OPERATOR, instance] if is_segment(instance) => Some(Peer::Operator((*instance).to_owned())),
        [namespace, cluster, member] if is_segment(namespace) && is_segment(cluster) => Some(Peer::Member {
            namespace: (*namespace).to_owned(),
            cluster: (*cluster).to_owned(),
            // Only the one way of writing it: `0-1` and not `00-1`.
            member: member.parse().ok().filter(|id: &MemberId| id.to_string() == *member)?,
        }),
        _ => None,
    }
}

/// What Kubernetes allows in names, and nothing that means something in a URI.
fn is_segment(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b))
}

/// Verifies chains against roots; the same for both ends of a connection.
#[derive(Debug)]
pub(super) struct PeerVerifier {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
}

impl PeerVerifier {
    pub(super) fn new(
        roots: &[CertificateDer<'static>],
        provider: Arc<CryptoProvider>,
    ) -> Result<PeerVerifier, super::Error> {
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root.clone())?;
        }
        let roots = Arc::new(store);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|_| super::Error::Roots)?;
        Ok(PeerVerifier { provider, roots, clients })
    }

    pub(super) fn accepting(self: &Arc<Self>, accept: Accept) -> Arc<Accepting> {
        Arc::new(Accepting { verifier: self.clone(), accept })
    }
}

/// A verifier for one connection.
#[derive(Debug)]
pub(super) struct Accepting {
    verifier: Arc<PeerVerifier>,
    accept: Accept,
}

impl Accepting {
    fn check(&self, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Result<(), Error> {
        let [intermediate] = intermediates else {
            return Err(refused());
        };
        let chain = [leaf.clone(), intermediate.clone()];
        match of_chain(&chain) {
            Ok(peer) if self.accept.allows(&peer) => Ok(()),
            Ok(_) | Err(_) => Err(refused()),
        }
    }
}

fn refused() -> Error {
    Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

impl ServerCertVerifier for Accepting {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = rustls::server::ParsedCertificate::try_from(leaf)?;
        let PeerVerifier { provider, roots, clients: _ } = &*self.verifier;
        let algorithms = provider.signature_verification_algorithms.all;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &parsed,
            roots,
            intermediates,
            now,
            algorithms,
        )?;
        self.check(leaf, intermediates)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.verifier.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.verifier.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Accepting {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Each side has one identity: it needs no hint which to show.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.verifier.clients.verify_client_cert(leaf, intermediates, now)?;
        self.check(leaf, intermediates)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.clients.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.clients.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.clients.supported_verify_schemes()
    }
}

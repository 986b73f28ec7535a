//! The operator's certificates: one root, an intermediate for each cluster, a leaf for each member. Pure but for the
//! randomness of keys: what is kept where is the driver's business.
//!
//! An intermediate is named `spiffe://valkeeper/NAMESPACE/CLUSTER` and a leaf one segment more, so no cluster's intermediate can
//! speak for another cluster: whoever verifies compares the two names. The operator's own leaf is
//! `spiffe://valkeeper/operator/INSTANCE`, under an intermediate of its own.

use crate::objects::SecretText;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};
use std::{fmt, time::Duration};
use valkeeper_core::ids::Timestamp;
use x509_parser::{extensions::GeneralName, pem::Pem};

/// Trust domain, and what every name begins with.
const DOMAIN: &str = "spiffe://valkeeper";

/// Life of the root: it is what every agent trusts, so it outlives what it is used for.
const ROOT_LIFETIME: Duration = days(3_650);

/// Life of an intermediate: whoever copied one can speak for that cluster at most so long.
const INTERMEDIATE_LIFETIME: Duration = days(365);

/// Life of a leaf where no flag says otherwise: renewed at half of it, members last a week at least without any operator.
pub const LEAF_LIFETIME_DEFAULT: Duration = days(14);

/// Shortest life of a leaf: a renewal is made at half of it, and the kubelet takes a minute and more to bring a changed Secret
/// into a pod. The other half leaves it five.
pub const LEAF_LIFETIME_MIN: Duration = Duration::from_secs(600);

/// Longest life of a leaf: that of the intermediate that signs it.
pub const LEAF_LIFETIME_MAX: Duration = INTERMEDIATE_LIFETIME;

/// How long before its making a certificate is valid: clocks of nodes differ by seconds, seldom by minutes; but an operator whose clock is
/// hours ahead (a time zone taken for UTC) must still be believed by its agents, or nothing fails over.
const BACKDATED: Duration = days(1);

const fn days(count: u64) -> Duration {
    Duration::from_secs(count * 24 * 3_600)
}

/// Why a certificate cannot be made or used. Never holds a key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The library refuses; its words name no key.
    #[error("a certificate cannot be made: {0}")]
    Making(#[from] rcgen::Error),
    /// What was read is no certificate, or lacks what ours have.
    #[error("not a certificate of ours: {0}")]
    Reading(&'static str),
}

/// A certificate and its key: a root, an intermediate or a leaf.
#[derive(Clone, PartialEq, Eq)]
pub struct Certified {
    /// PEM: the certificate, and behind a leaf its intermediate; behind the root further roots that are still trusted.
    pub chain: String,
    /// PEM of the key.
    pub key: SecretText,
    /// Its name; empty for the root.
    pub uri: String,
    subject: String,
    /// Subject of who signed it.
    signed_by: String,
    /// Begin and end of its validity.
    not_before: Timestamp,
    not_after: Timestamp,
}

impl fmt::Debug for Certified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} until {}", self.uri, self.not_after)
    }
}

/// Name of a cluster's intermediate.
pub fn cluster_uri(namespace: &str, cluster: &str) -> String {
    format!("{DOMAIN}/{namespace}/{cluster}")
}

/// Name of the intermediate of operators.
pub fn operator_uri() -> String {
    format!("{DOMAIN}/operator")
}

impl Certified {
    /// A new root.
    ///
    /// # Errors
    /// [`Error::Making`].
    pub fn root(now: Timestamp) -> Result<Certified, Error> {
        let mut params =
            params(&format!("valkeeper root {:016x}", rand::random::<u64>()), now, ROOT_LIFETIME);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let chain = params.self_signed(&key)?.pem();
        Certified::read(chain, SecretText::from(key.serialize_pem().as_str()))
    }

    /// Of a root: a new intermediate of this name.
    ///
    /// # Errors
    /// [`Error::Making`].
    pub fn intermediate(&self, uri: &str, now: Timestamp) -> Result<Certified, Error> {
        let mut params = params(uri, now, INTERMEDIATE_LIFETIME);
        params.subject_alt_names = vec![name(uri)?];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        self.sign(params, "")
    }

    /// Of an intermediate: a new leaf, named as itself with one segment more.
    ///
    /// # Errors
    /// [`Error::Making`].
    pub fn leaf(&self, segment: &str, lifetime: Duration, now: Timestamp) -> Result<Certified, Error> {
        let uri = self.leaf_uri(segment);
        // It cannot outlive its issuer: the chain would end before it.
        let left = Duration::from_nanos(u64::try_from(self.not_after.0 - now.0).unwrap_or(0));
        let mut params = params(&uri, now, lifetime.min(left));
        params.subject_alt_names = vec![name(&uri)?];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, &self.chain)
    }

    /// Of an intermediate: the name of its leaf.
    pub fn leaf_uri(&self, segment: &str) -> String {
        format!("{}/{segment}", self.uri)
    }

    /// Reads a certificate that was kept, with its key.
    ///
    /// # Errors
    /// [`Error::Reading`].
    pub fn read(chain: String, key: SecretText) -> Result<Certified, Error> {
        let unreadable = |_| Error::Reading("its PEM cannot be read");
        let first = Pem::iter_from_buffer(chain.as_bytes()).next().ok_or(Error::Reading("it is empty"))?;
        let first = first.map_err(unreadable)?;
        let parsed = first.parse_x509().map_err(|_| Error::Reading("its DER cannot be read"))?;
        let pair = KeyPair::from_pem(key.expose()).map_err(|_| Error::Reading("its key cannot be read"))?;
        if parsed.public_key().subject_public_key.data.as_ref() != pair.public_key_raw() {
            return Err(Error::Reading("its key is another's"));
        }
        let validity = parsed.validity();
        let at = |seconds: i64| Timestamp(seconds.saturating_mul(1_000_000_000));
        let (not_before, not_after) =
            (at(validity.not_before.timestamp()), at(validity.not_after.timestamp()));
        let names = parsed.subject_alternative_name().ok().flatten();
        let uri = names.and_then(|all| {
            all.value.general_names.iter().find_map(|name| {
                let GeneralName::URI(uri) = name else { return None };
                Some((*uri).to_owned())
            })
        });
        let (subject, signed_by) = (parsed.subject().to_string(), parsed.issuer().to_string());
        Ok(Certified { uri: uri.unwrap_or_default(), chain, key, subject, signed_by, not_before, not_after })
    }

    /// True from half of its life on, and before its begin: the clock by which it was made was wrong.
    pub fn is_due(&self, now: Timestamp) -> bool {
        let backdated = i64::try_from(BACKDATED.as_nanos()).unwrap_or(0);
        let made = self.not_before.0.saturating_add(backdated);
        let life = self.not_after.0.saturating_sub(made);
        now < self.not_before || now.0 >= made.saturating_add(life / 2)
    }

    /// True if nobody accepts it any more.
    pub fn is_expired(&self, now: Timestamp) -> bool {
        now >= self.not_after
    }

    /// True if this leaf was issued by that intermediate.
    pub fn is_of(&self, intermediate: &Certified) -> bool {
        self.chain.ends_with(&intermediate.chain)
    }

    /// True if that root signed this intermediate: roots have names of their own.
    pub fn is_signed_by(&self, root: &Certified) -> bool {
        self.signed_by == root.subject
    }

    fn sign(&self, params: CertificateParams, above: &str) -> Result<Certified, Error> {
        let issuer = Issuer::from_ca_cert_pem(&self.chain, KeyPair::from_pem(self.key.expose())?)?;
        let key = KeyPair::generate()?;
        let chain = params.signed_by(&key, &issuer)?.pem() + above;
        Certified::read(chain, SecretText::from(key.serialize_pem().as_str()))
    }
}

fn params(common_name: &str, now: Timestamp, lifetime: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, common_name);
    params.distinguished_name = subject;
    let now = date_time_ymd(1970, 1, 1) + Duration::from_nanos(u64::try_from(now.0).unwrap_or(0));
    params.not_before = now - BACKDATED;
    params.not_after = now + lifetime;
    params.use_authority_key_identifier_extension = true;
    params
}

fn name(uri: &str) -> Result<SanType, Error> {
    Ok(SanType::URI(uri.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_800_000_000_000_000_000);

    fn after(duration: Duration) -> Timestamp {
        NOW.plus_millis(i64::try_from(duration.as_millis()).unwrap())
    }

    #[test]
    fn a_leaf_is_named_one_segment_below_its_intermediate_and_brings_it_along() {
        let root = Certified::root(NOW).unwrap();
        let shop = root.intermediate(&cluster_uri("shop", "orders"), NOW).unwrap();
        let leaf = shop.leaf("0-2", LEAF_LIFETIME_DEFAULT, NOW).unwrap();
        assert_eq!((root.uri.as_str(), leaf.uri.as_str()), ("", "spiffe://valkeeper/shop/orders/0-2"));
        assert!(shop.is_signed_by(&root) && !shop.is_signed_by(&Certified::root(NOW).unwrap()));
        assert!(leaf.is_of(&shop) && !leaf.is_of(&root));
        assert_eq!(leaf.chain.matches("BEGIN CERTIFICATE").count(), 2);
        assert_eq!(Certified::read(leaf.chain.clone(), leaf.key.clone()).unwrap(), leaf);
    }

    #[test]
    fn a_certificate_is_due_at_half_of_its_life() {
        let issuer = Certified::root(NOW).unwrap().intermediate(&operator_uri(), NOW).unwrap();
        let leaf = issuer.leaf("a", Duration::from_secs(60), NOW).unwrap();
        assert!(!leaf.is_due(NOW) && !leaf.is_due(after(Duration::from_secs(29))));
        assert!(leaf.is_due(after(Duration::from_secs(31))));
        assert!(!leaf.is_expired(NOW) && leaf.is_expired(after(Duration::from_secs(60))));
        let days_earlier = Timestamp(NOW.0 - 2 * 24 * 3_600 * 1_000_000_000);
        assert!(leaf.is_due(days_earlier), "made by a clock that was far ahead");
        assert!(!issuer.is_due(after(days(182))) && issuer.is_due(after(days(183))));
    }

    #[test]
    fn a_leaf_never_outlives_its_issuer() {
        let issuer = Certified::root(NOW).unwrap().intermediate(&operator_uri(), NOW).unwrap();
        let leaf = issuer.leaf("a", days(7), after(days(364))).unwrap();
        assert!(leaf.not_after <= issuer.not_after);
    }

    #[test]
    fn a_key_that_is_anothers_or_damaged_is_refused() {
        let (one, two) = (Certified::root(NOW).unwrap(), Certified::root(NOW).unwrap());
        assert!(Certified::read(one.chain.clone(), one.key.clone()).is_ok());
        let refused = Certified::read(one.chain.clone(), two.key.clone()).unwrap_err().to_string();
        assert!(refused.contains("another's") && !refused.contains(two.key.expose()), "{refused}");
        assert!(Certified::read(one.chain, "damaged".into()).is_err());
    }

    #[test]
    fn neither_key_nor_garbage_is_shown() {
        let root = Certified::root(NOW).unwrap();
        assert!(!format!("{root:?}").contains(root.key.expose()));
        for wrong in ["", "garbage", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            assert!(Certified::read(wrong.to_owned(), "key".into()).is_err(), "{wrong}");
        }
    }
}

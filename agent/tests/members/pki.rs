//! Certificates for tests: one root, an intermediate for a cluster and one for the operator, leaves.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use std::{fs, path::Path};
use valkeeper_agent::tls::{Identity, Live};

type Issuer = CertifiedIssuer<'static, KeyPair>;

pub struct Pki {
    root: Issuer,
    cluster: Issuer,
    operator: Issuer,
}

fn params(name: &str, uri: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = uri.map(|uri| SanType::URI(uri.try_into().unwrap())).into_iter().collect();
    params
}

fn authority(name: &str, uri: Option<&str>) -> CertificateParams {
    let mut params = params(name, uri);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

struct Leaf {
    roots: String,
    chain: String,
    key: String,
}

impl Pki {
    pub fn new(cluster: &str) -> Pki {
        let key = || KeyPair::generate().unwrap();
        let root = CertifiedIssuer::self_signed(authority("root", None), key()).unwrap();
        let below = |uri: &str| CertifiedIssuer::signed_by(authority(uri, Some(uri)), key(), &root).unwrap();
        let cluster = below(&format!("spiffe://valkeeper/test/{cluster}"));
        let operator = below("spiffe://valkeeper/operator");
        Pki { root, cluster, operator }
    }

    fn leaf(&self, by: &Issuer, uri: &str) -> Leaf {
        let mut params = params("leaf", Some(uri));
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, by).unwrap();
        let chain = format!("{}{}", leaf.pem(), by.pem());
        Leaf { roots: self.root.pem(), chain, key: key.serialize_pem() }
    }

    fn live(leaf: &Leaf) -> Live {
        let Leaf { roots, chain, key } = leaf;
        Live::new(Identity::from_pem(roots.as_bytes(), chain.as_bytes(), key.as_bytes()).unwrap())
    }

    pub fn operator(&self) -> Live {
        Pki::live(&self.leaf(&self.operator, "spiffe://valkeeper/operator/one"))
    }

    pub fn member(&self, cluster: &str, member: &str) -> Live {
        Pki::live(&self.leaf(&self.cluster, &format!("spiffe://valkeeper/test/{cluster}/{member}")))
    }

    /// The files of a shard's Secret.
    pub fn write(&self, dir: &Path, cluster: &str, shard: u16, members: u16) {
        fs::create_dir_all(dir).unwrap();
        for ordinal in 0..members {
            let uri = format!("spiffe://valkeeper/test/{cluster}/{shard}-{ordinal}");
            let Leaf { roots, chain, key } = self.leaf(&self.cluster, &uri);
            fs::write(dir.join("ca.crt"), roots).unwrap();
            fs::write(dir.join(format!("{ordinal}.crt")), chain).unwrap();
            fs::write(dir.join(format!("{ordinal}.key")), key).unwrap();
        }
    }
}

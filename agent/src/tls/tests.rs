//! Who is let in and who is not, with certificates made on the spot.

use super::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use valkeeper_core::ids::{MemberId, ShardId};

type Issuer = CertifiedIssuer<'static, KeyPair>;

fn params(name: &str, uri: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.subject_alt_names = uri.map(|uri| SanType::URI(uri.try_into().unwrap())).into_iter().collect();
    params
}

fn authority(name: &str, uri: Option<&str>) -> CertificateParams {
    let mut params = params(name, uri);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn root(name: &str) -> Issuer {
    CertifiedIssuer::self_signed(authority(name, None), KeyPair::generate().unwrap()).unwrap()
}

fn intermediate(root: &Issuer, uri: &str) -> Issuer {
    CertifiedIssuer::signed_by(authority(uri, Some(uri)), KeyPair::generate().unwrap(), root).unwrap()
}

fn leaf_params(uri: &str) -> CertificateParams {
    let mut params = params("leaf", Some(uri));
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

fn issue(roots: &Issuer, by: &Issuer, params: CertificateParams) -> Result<Identity, Error> {
    let key = KeyPair::generate().unwrap();
    let leaf = params.signed_by(&key, by).unwrap();
    let chain = format!("{}{}", leaf.pem(), by.pem());
    Identity::from_pem(roots.pem().as_bytes(), chain.as_bytes(), key.serialize_pem().as_bytes())
}

const CLUSTER: &str = "spiffe://valkeeper/prod/orders";

fn member_of(root: &Issuer, cluster: &str, member: &str) -> Live {
    let by = intermediate(root, cluster);
    Live::new(issue(root, &by, leaf_params(&format!("{cluster}/{member}"))).unwrap())
}

fn operator_of(root: &Issuer) -> Live {
    let by = intermediate(root, "spiffe://valkeeper/operator");
    Live::new(issue(root, &by, leaf_params("spiffe://valkeeper/operator/one")).unwrap())
}

fn member(ordinal: u16) -> Peer {
    Peer::Member {
        namespace: "prod".to_owned(),
        cluster: "orders".to_owned(),
        member: MemberId::new(0, ordinal),
    }
}

fn shard() -> Accept {
    Accept::OperatorOrShard { namespace: "prod".to_owned(), cluster: "orders".to_owned(), shard: ShardId(0) }
}

/// One handshake: whom each side found at the other end.
async fn meet(
    server: &Live,
    accept: &Accept,
    client: &Live,
    wanted: &Accept,
) -> (io::Result<Peer>, io::Result<Peer>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        server.accept(accept, &[ALPN_H2], stream).await.map(|secured| secured.peer)
    };
    let call = async {
        let stream = TcpStream::connect(address).await.unwrap();
        client.connect(wanted, &[ALPN_H2], stream).await.map(|secured| secured.peer)
    };
    tokio::join!(serve, call)
}

#[tokio::test]
async fn the_right_peers_find_each_other() {
    let root = root("root");
    let (one, two, operator) =
        (member_of(&root, CLUSTER, "0-1"), member_of(&root, CLUSTER, "0-2"), operator_of(&root));
    let (seen, served) = meet(&one, &shard(), &two, &Accept::Exactly(member(1))).await;
    assert_eq!((seen.unwrap(), served.unwrap()), (member(2), member(1)));
    let (seen, served) = meet(&one, &shard(), &operator, &Accept::Exactly(member(1))).await;
    assert_eq!((seen.unwrap(), served.unwrap()), (Peer::Operator("one".to_owned()), member(1)));
    let (seen, served) = meet(&operator, &Accept::AnyMember, &one, &Accept::Operator).await;
    assert_eq!((seen.unwrap(), served.unwrap()), (member(1), Peer::Operator("one".to_owned())));
}

#[tokio::test]
async fn a_stranger_is_refused_by_both_sides() {
    let (ours, theirs) = (root("root"), root("root"));
    let one = member_of(&ours, CLUSTER, "0-1");
    for stranger in [
        member_of(&theirs, CLUSTER, "0-2"),
        operator_of(&theirs),
        member_of(&ours, "spiffe://valkeeper/prod/other", "0-2"),
        member_of(&ours, "spiffe://valkeeper/test/orders", "0-2"),
        member_of(&ours, CLUSTER, "1-2"),
    ] {
        let name = stranger.current().peer.to_string();
        let anybody = Accept::Exactly(member(1));
        assert!(meet(&one, &shard(), &stranger, &anybody).await.0.is_err(), "{name} called");
        let wanted = Accept::Exactly(member(2));
        assert!(meet(&stranger, &shard(), &one, &wanted).await.1.is_err(), "{name} was called");
    }
    let another = member_of(&ours, CLUSTER, "0-3");
    assert!(meet(&another, &shard(), &one, &Accept::Exactly(member(2))).await.1.is_err());
    assert!(meet(&another, &shard(), &one, &Accept::Operator).await.1.is_err());
}

#[tokio::test]
async fn no_intermediate_speaks_for_another_cluster() {
    let root = root("root");
    let other = intermediate(&root, "spiffe://valkeeper/prod/other");
    let forged = issue(&root, &other, leaf_params(&format!("{CLUSTER}/0-2")));
    assert!(matches!(forged, Err(Error::Peer(NotAPeer::Intermediate))));
    let nested = issue(&root, &other, leaf_params("spiffe://valkeeper/prod/other/more/0-2"));
    assert!(matches!(nested, Err(Error::Peer(NotAPeer::Intermediate))));

    // And if the forger does not check itself, the other side does.
    let honest = member_of(&root, CLUSTER, "0-1");
    let key = KeyPair::generate().unwrap();
    let leaf = leaf_params(&format!("{CLUSTER}/0-2")).signed_by(&key, &other).unwrap();
    let forged = Live::new(Identity {
        chain: vec![leaf.der().clone(), other.der().clone()],
        key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        verifier: honest.current().verifier.clone(),
        peer: member(2),
        thumbprint: String::new(),
        not_after_s: 0,
    });
    assert!(meet(&honest, &shard(), &forged, &Accept::Exactly(member(1))).await.0.is_err());
    assert!(meet(&forged, &shard(), &honest, &Accept::Exactly(member(2))).await.1.is_err());
}

#[tokio::test]
async fn an_intermediate_below_an_intermediate_is_refused() {
    let root = root("root");
    let honest = member_of(&root, CLUSTER, "0-1");
    let other = intermediate(&root, "spiffe://valkeeper/prod/other");
    let below = intermediate(&other, CLUSTER);
    let forged = Live::new(issue(&root, &below, leaf_params(&format!("{CLUSTER}/0-2"))).unwrap());
    assert!(meet(&honest, &shard(), &forged, &Accept::Exactly(member(1))).await.0.is_err());
    let direct = issue(&root, &root, leaf_params(&format!("{CLUSTER}/0-2")));
    assert!(matches!(direct, Err(Error::Peer(NotAPeer::Chain))));
}

#[tokio::test]
async fn an_expired_leaf_is_refused() {
    let root = root("root");
    let by = intermediate(&root, CLUSTER);
    let mut old = leaf_params(&format!("{CLUSTER}/0-2"));
    (old.not_before, old.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
    let old = Live::new(issue(&root, &by, old).unwrap());
    assert_eq!(old.current().not_after_s, 1_609_459_200);
    let one = member_of(&root, CLUSTER, "0-1");
    assert!(meet(&one, &shard(), &old, &Accept::Exactly(member(1))).await.0.is_err());
    assert!(meet(&old, &shard(), &one, &Accept::Exactly(member(2))).await.1.is_err());
}

#[tokio::test]
async fn the_next_connection_has_the_newest_identity() {
    let (old, new) = (root("old"), root("new"));
    let server = member_of(&old, CLUSTER, "0-1");
    let client = member_of(&old, CLUSTER, "0-2");
    let wanted = Accept::Exactly(member(1));
    assert!(meet(&server, &shard(), &client, &wanted).await.0.is_ok());
    let before = server.current().thumbprint.clone();
    // A new leaf of the new root, and for a while both roots count.
    let both = format!("{}{}", old.pem(), new.pem());
    let renewed = |root: &Issuer, ordinal: u16| {
        let by = intermediate(root, CLUSTER);
        let key = KeyPair::generate().unwrap();
        let leaf = leaf_params(&member(ordinal).to_string()).signed_by(&key, &by).unwrap();
        let chain = format!("{}{}", leaf.pem(), by.pem());
        Identity::from_pem(both.as_bytes(), chain.as_bytes(), key.serialize_pem().as_bytes()).unwrap()
    };
    server.replace(renewed(&new, 1));
    assert_ne!(server.current().thumbprint, before);
    assert!(
        meet(&server, &shard(), &client, &wanted).await.1.is_err(),
        "the client does not know the new root"
    );
    client.replace(renewed(&old, 2));
    let (seen, served) = meet(&server, &shard(), &client, &wanted).await;
    assert_eq!((seen.unwrap(), served.unwrap()), (member(2), member(1)));
}

#[test]
fn a_key_of_another_leaf_is_found_when_it_is_read() {
    let root = root("root");
    let by = intermediate(&root, CLUSTER);
    let leaf = leaf_params(&format!("{CLUSTER}/0-2")).signed_by(&KeyPair::generate().unwrap(), &by).unwrap();
    let chain = format!("{}{}", leaf.pem(), by.pem());
    let key = KeyPair::generate().unwrap().serialize_pem();
    assert!(Identity::from_pem(root.pem().as_bytes(), chain.as_bytes(), key.as_bytes()).is_err());
}

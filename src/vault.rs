//! Where the operator's certificate authorities are kept: Secrets of its own namespace. The root is made once, by whoever
//! leads first; each cluster has an intermediate; the operator's own identity lives in memory only.

use crate::{
    clock,
    cluster::ClusterId,
    k8s::{self, FIELD_MANAGER, MANAGED_BY, keys::KeyStore},
    objects::SecretText,
    pki::{self, Certified, cluster_uri, operator_uri},
};
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::ResourceExt;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{task::JoinSet, time::Instant};
use valkeeper_agent::tls::{self, Identity, Live};
use valkeeper_core::ids::Timestamp;

/// Name of the Secret with the root.
const ROOT: &str = "valkeeper-pki";
const CERTIFICATE: &str = "ca.crt";
const KEY: &str = "ca.key";

/// Between the beginnings of two looks for a cluster's authority: longer than the bound of a call, so that an API server that is
/// slow is asked seldom.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// How long a turn waits for a look for an authority that it begins and has none without: a healthy API server answers a hundred times as fast, and the
/// members' servers are waiting to be looked at.
const FIRST_LOOK_WAIT: Duration = Duration::from_secs(1);

/// Why an authority cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server.
    #[error("the Secret of a certificate authority")]
    Kubernetes(#[from] k8s::Error),
    /// What is in the Secret, or what should be made.
    #[error("a certificate authority")]
    Pki(#[from] pki::Error),
    /// The operator's own identity.
    #[error("the operator's own identity")]
    Tls(#[from] tls::Error),
    /// It is being looked for, or was not found a moment ago.
    #[error("a certificate authority was not read yet")]
    NotYet,
}

/// The root and what hangs on it.
#[derive(Clone)]
struct Open {
    live: Live,
    root: Certified,
    own_issuer: Certified,
    own: Certified,
}

/// The authorities.
pub struct Vault {
    store: KeyStore,
    namespace: String,
    instance: String,
    leaf_lifetime: Duration,
    open: Mutex<Option<Arc<Open>>>,
}

impl Vault {
    /// A vault over the Secrets of the operator's namespace; `instance` is the operator's name in its certificate.
    pub fn new(store: KeyStore, namespace: &str, instance: &str, leaf_lifetime: Duration) -> Self {
        Vault {
            store,
            namespace: namespace.to_owned(),
            instance: segment(instance),
            leaf_lifetime,
            open: Mutex::default(),
        }
    }

    /// How long leaves live.
    pub fn leaf_lifetime(&self) -> Duration {
        self.leaf_lifetime
    }

    /// The operator's own identity, once the vault was opened.
    pub fn live(&self) -> Option<Live> {
        self.known().map(|open| open.live.clone())
    }

    /// Reads the root, or makes it if there is none, and makes the operator's own identity, or renews it if it is due.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn open(&self) -> Result<(), Error> {
        self.opened().await.map(drop)
    }

    /// The authority of a cluster, and the roots above it: read, made if it is not there, renewed if it is due.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn authority(&self, id: &ClusterId) -> Result<Authority, Error> {
        let root = self.opened().await?.root.clone();
        let (namespace, cluster) = &id.owner;
        let (uri, name, now) = (cluster_uri(namespace, cluster), secret_name(id), clock::wall());
        let wanted = |c: &Certified| c.uri == uri && c.is_signed_by(&root) && !c.is_due(now);
        let live = self.store.get(&name).await?;
        if let Some(kept) = live.as_ref().and_then(|s| read(s).ok()).filter(wanted) {
            return Ok(Authority { roots: root.chain, issuer: kept });
        }
        let made = root.intermediate(&uri, now)?;
        let issuer = self.keep(&name, &made, live).await?;
        Ok(Authority { roots: root.chain, issuer })
    }

    /// Forgets the authority of a cluster that is gone.
    ///
    /// # Errors
    /// [`Error::Kubernetes`].
    pub async fn forget(&self, id: &ClusterId) -> Result<(), k8s::Error> {
        self.store.delete(&secret_name(id)).await
    }

    async fn opened(&self) -> Result<Arc<Open>, Error> {
        let now = clock::wall();
        let open = match self.known() {
            Some(open) if !open.own.is_due(now) => return Ok(open),
            Some(open) => self.with_own(open.root.clone(), Some(&open), now)?,
            None => self.with_own(self.root(now).await?, None, now)?,
        };
        let open = Arc::new(open);
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&open));
        Ok(open)
    }

    fn known(&self) -> Option<Arc<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn with_own(&self, root: Certified, before: Option<&Open>, now: Timestamp) -> Result<Open, Error> {
        let own_issuer = match before.map(|open| &open.own_issuer).filter(|issuer| !issuer.is_due(now)) {
            Some(issuer) => issuer.clone(),
            None => root.intermediate(&operator_uri(), now)?,
        };
        let own = own_issuer.leaf(&self.instance, self.leaf_lifetime, now)?;
        let pem = [&root.chain, &own.chain].map(|text| text.as_bytes());
        let identity = Identity::from_pem(pem[0], pem[1], own.key.expose().as_bytes())?;
        let live = match before {
            Some(open) => {
                open.live.replace(identity);
                open.live.clone()
            }
            None => Live::new(identity),
        };
        Ok(Open { live, root, own_issuer, own })
    }

    /// The root is never made anew while a Secret is there: agents trust what they were given.
    async fn root(&self, now: Timestamp) -> Result<Certified, Error> {
        match self.store.get(ROOT).await? {
            Some(secret) => Ok(read(&secret)?),
            None => self.keep(ROOT, &Certified::root(now)?, None).await,
        }
    }

    /// Writes an authority in place of `live`. If someone else was first, theirs is the one.
    async fn keep(&self, name: &str, made: &Certified, live: Option<Secret>) -> Result<Certified, Error> {
        let secret = self.secret(name, made, live.as_ref().and_then(ResourceExt::resource_version));
        let answer = match live {
            None => self.store.create(&secret).await,
            Some(_) => self.store.replace(&secret).await,
        };
        match answer {
            Ok(_) => Ok(made.clone()),
            Err(conflict) if conflict.is_conflict() => match self.store.get(name).await? {
                Some(theirs) => Ok(read(&theirs)?),
                None => Err(conflict.into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    fn secret(&self, name: &str, certified: &Certified, resource_version: Option<String>) -> Secret {
        let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
        let mut secret = Secret::default();
        secret.metadata.name = Some(name.to_owned());
        secret.metadata.namespace = Some(self.namespace.clone());
        secret.metadata.resource_version = resource_version;
        secret.metadata.labels = Some([(MANAGED_BY.to_owned(), FIELD_MANAGER.to_owned())].into());
        secret.data = Some(BTreeMap::from([
            (CERTIFICATE.to_owned(), bytes(&certified.chain)),
            (KEY.to_owned(), bytes(certified.key.expose())),
        ]));
        secret
    }
}

/// What signs the leaves of one cluster.
#[derive(Clone)]
pub struct Authority {
    /// Roots that its members trust, as PEM.
    pub roots: String,
    /// The intermediate.
    pub issuer: Certified,
}

/// The authority of one cluster as its task uses it: what is known is used while it is valid, and renewed beside the turns.
#[derive(Default)]
pub struct Signing {
    known: Option<Authority>,
    /// The look under way: one at most.
    look: JoinSet<Result<Authority, Error>>,
    /// When to look again after one that failed.
    again_at: Option<Instant>,
}

impl Signing {
    /// The authority. A look is waited for only where nothing is known, by the turn that begins it, and not for long.
    ///
    /// # Errors
    /// [`Error`], as long as nothing is known.
    pub async fn get(
        &mut self,
        vault: &Arc<Vault>,
        id: &ClusterId,
        now: Timestamp,
    ) -> Result<Authority, Error> {
        let known = self.known.as_ref().filter(|known| !known.issuer.is_expired(now));
        if let Some(known) = known.filter(|known| !known.issuer.is_due(now)) {
            return Ok(known.clone());
        }
        let usable = known.cloned();
        let begins = self.look.is_empty() && self.again_at.is_none_or(|at| at <= Instant::now());
        if begins {
            let (vault, id) = (Arc::clone(vault), id.clone());
            self.again_at = Some(Instant::now() + LOOK_AGAIN);
            self.look.spawn(async move { vault.authority(&id).await });
        }
        let wait = if begins && usable.is_none() { FIRST_LOOK_WAIT } else { Duration::ZERO };
        let looked = tokio::time::timeout(wait, self.look.join_next()).await.ok().flatten();
        let failed = match looked {
            Some(Ok(Ok(fresh))) => {
                self.known = Some(fresh.clone());
                return Ok(fresh);
            }
            Some(Ok(Err(error))) => error,
            Some(Err(_)) | None => Error::NotYet,
        };
        if usable.is_some() && !matches!(failed, Error::NotYet) {
            tracing::warn!(error = k8s::chain(&failed), "a certificate authority could not be renewed");
        }
        usable.ok_or(failed)
    }
}

/// A name as a segment of a URI: pods have such names, hosts of people may not.
fn segment(name: &str) -> String {
    let plain =
        |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c) { c } else { '-' };
    let kept: String = name.to_ascii_lowercase().chars().map(plain).collect();
    if kept.is_empty() { "operator".to_owned() } else { kept }
}

fn secret_name(id: &ClusterId) -> String {
    format!("{ROOT}-{}", id.uid)
}

fn read(secret: &Secret) -> Result<Certified, pki::Error> {
    let text = |key: &str| {
        let ByteString(bytes) = secret.data.as_ref()?.get(key)?;
        std::str::from_utf8(bytes).ok().map(str::to_owned)
    };
    let missing = || pki::Error::Reading("the Secret lacks ca.crt or ca.key");
    let (chain, key) = (text(CERTIFICATE).ok_or_else(missing)?, text(KEY).ok_or_else(missing)?);
    Certified::read(chain, SecretText::from(key.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A vault over an API server that takes requests and never answers.
    async fn vault(asked: Arc<AtomicU32>) -> Arc<Vault> {
        let answer = move || {
            asked.fetch_add(1, Ordering::SeqCst);
            std::future::pending::<()>()
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        tokio::spawn(async { axum::serve(listener, Router::new().fallback(answer)).await });
        let client = kube::Client::try_from(kube::Config::new(url)).unwrap();
        Arc::new(Vault::new(KeyStore::new(client, "n"), "n", "one", pki::LEAF_LIFETIME_DEFAULT))
    }

    #[tokio::test]
    async fn what_is_valid_is_used_while_its_renewal_hangs() {
        let now = clock::wall();
        let id = ClusterId { owner: ("shop".into(), "orders".into()), uid: "u".into() };
        let root = Certified::root(now).unwrap();
        let issuer = root.intermediate(&cluster_uri("shop", "orders"), now).unwrap();
        let known = Authority { roots: root.chain, issuer };
        let mut signing = Signing { known: Some(known.clone()), ..Signing::default() };
        let days = |count: i64| now.plus_millis(count * 24 * 3_600_000);
        let (asked, begun) = (Arc::new(AtomicU32::new(0)), Instant::now());
        let vault = vault(asked.clone()).await;
        assert!(signing.get(&vault, &id, now).await.is_ok() && signing.look.is_empty(), "nothing is due");
        for _ in 0..50 {
            let used = signing.get(&vault, &id, days(300)).await.unwrap();
            assert_eq!((used.issuer, signing.look.len()), (known.issuer.clone(), 1));
            tokio::task::yield_now().await;
        }
        assert!(begun.elapsed() < FIRST_LOOK_WAIT, "nothing was waited for");
        let expired = signing.get(&vault, &id, days(366)).await;
        assert!(matches!(expired, Err(Error::NotYet)));
        while asked.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }
}

//! Secret `<name>-identity-<shard>`: what the agents of a shard prove themselves with, and whom they trust.

use super::{Frame, SecretText, names, secret::encoded};
use crate::pki::{self, Certified};
use k8s_openapi::{ByteString, api::core::v1::Secret};
use serde_json::{Value, json};
use std::{collections::BTreeMap, time::Duration};
use valkeeper_core::ids::{MemberId, ShardId, Timestamp};

/// Key of the trusted roots.
const ROOTS: &str = "ca.crt";

/// Certificates and keys of the agents of one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Roots they trust, as PEM.
    pub roots: String,
    /// Leaves, by ordinal.
    pub leaves: BTreeMap<u16, Certified>,
}

impl Identity {
    /// What the Secret has; whatever cannot be read is left out and will be made.
    pub fn read(secret: &Secret) -> Identity {
        let ordinals = secret.data.iter().flat_map(|data| data.keys()).filter_map(|key| ordinal(key));
        let leaf = |ordinal: u16| {
            let (chain, key) = (text(secret, &certificate(ordinal))?, text(secret, &key(ordinal))?);
            Some((ordinal, Certified::read(chain.to_owned(), SecretText::from(key)).ok()?))
        };
        let roots = text(secret, ROOTS).unwrap_or_default().to_owned();
        Identity { roots, leaves: ordinals.filter_map(leaf).collect() }
    }

    /// Keeps the leaves that are still good and makes those that are missing or due.
    ///
    /// # Errors
    /// [`pki::Error`].
    pub fn complete(
        self,
        roots: &str,
        issuer: &Certified,
        members: impl Iterator<Item = MemberId>,
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<Identity, pki::Error> {
        let mut known = self.leaves;
        let mut leaves = BTreeMap::new();
        for member in members {
            let name = member.to_string();
            let good = |leaf: &Certified| {
                leaf.is_of(issuer) && leaf.uri == issuer.leaf_uri(&name) && !leaf.is_due(now)
            };
            let leaf = match known.remove(&member.ordinal).filter(good) {
                Some(leaf) => leaf,
                None => issuer.leaf(&name, lifetime, now)?,
            };
            leaves.insert(member.ordinal, leaf);
        }
        Ok(Identity { roots: roots.to_owned(), leaves })
    }
}

/// As it was made, with every newline.
fn text<'a>(secret: &'a Secret, key: &str) -> Option<&'a str> {
    let ByteString(bytes) = secret.data.as_ref()?.get(key)?;
    std::str::from_utf8(bytes).ok()
}

fn certificate(ordinal: u16) -> String {
    format!("{ordinal}.crt")
}

fn key(ordinal: u16) -> String {
    format!("{ordinal}.key")
}

fn ordinal(key: &str) -> Option<u16> {
    key.strip_suffix(".crt")?.parse().ok()
}

/// `None` while there is no authority to sign for the shard.
pub(super) fn render(frame: &Frame<'_>, shard: ShardId) -> Option<Value> {
    let Identity { roots, leaves } = frame.context.identities.get(&shard)?;
    let mut data = json!({ ROOTS: encoded(roots) });
    for (ordinal, leaf) in leaves {
        data[certificate(*ordinal)] = encoded(&leaf.chain);
        data[key(*ordinal)] = encoded(leaf.key.expose());
    }
    Some(json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": frame.metadata(&names::identity(frame.name(), shard), Some(shard)),
        "type": "Opaque",
        "data": data,
    }))
}

//! Secrets that cannot be shown, and the operator's two ways to log in: the permanent user, who only manages users, and
//! the user of one writer epoch, as whom it looks and acts.

use sha2::{Digest as _, Sha256};
use std::{fmt, sync::Arc};
use valkeeper_core::ids::WriterEpoch;

/// Bytes of randomness in an epoch user's password: as strong as the hash the server keeps of it.
const PASSWORD_BYTES: usize = 32;

/// A text that neither `Debug` nor an error ever shows. It has no `Display` and no serde.
#[derive(Clone)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Wraps a secret text.
    pub fn new(text: &str) -> Secret {
        Secret(text.into())
    }

    /// A new random secret: hex of 32 random bytes.
    pub fn random() -> Secret {
        let bytes: [u8; PASSWORD_BYTES] = rand::random();
        Secret(hex(&bytes).into())
    }

    /// The text itself, for the one place that sends it.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }

    /// Hex of its SHA-256: the form in which the server keeps it.
    pub(super) fn sha256(&self) -> String {
        hex(&Sha256::digest(self.0.as_bytes()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How this process logs in to the servers of one cluster in one writer epoch.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Name of the permanent user.
    pub(super) manager: Arc<str>,
    /// Its password, from a Kubernetes Secret.
    pub(super) manager_password: Secret,
    /// The epoch to act in.
    pub(super) epoch: WriterEpoch,
    /// Password of `op-<epoch>`: made here, known to nobody else, never stored.
    pub(super) epoch_password: Secret,
}

impl Credentials {
    /// Credentials for `epoch`: the permanent user `manager` makes the epoch's user with a random password.
    pub fn new(manager: &str, manager_password: Secret, epoch: WriterEpoch) -> Credentials {
        Credentials { manager: manager.into(), manager_password, epoch, epoch_password: Secret::random() }
    }

    /// The epoch they act in.
    pub fn epoch(&self) -> WriterEpoch {
        self.epoch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_neither_password() {
        let credentials = Credentials::new("valkeeper", Secret::new("hunter2"), WriterEpoch(3));
        let shown = format!("{credentials:?} {:?}", credentials.manager_password);
        assert!(shown.contains("valkeeper") && shown.contains("WriterEpoch(3)"), "{shown}");
        assert!(
            !shown.contains("hunter2") && !shown.contains(credentials.epoch_password.expose()),
            "{shown}"
        );
    }

    #[test]
    fn every_process_has_its_own_epoch_password() {
        assert_ne!(Secret::random().expose(), Secret::random().expose());
        assert_eq!(Secret::random().expose().len(), 2 * PASSWORD_BYTES);
    }

    #[test]
    fn the_hash_is_the_one_valkey_keeps() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Secret::new("abc").sha256(), expected);
    }
}

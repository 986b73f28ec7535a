//! Secrets that cannot be shown, and how the operator logs in.

use std::{fmt, sync::Arc};

/// A text that neither `Debug` nor an error ever shows. It has no `Display` and no serde.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Wraps a secret text.
    pub fn new(text: &str) -> Secret {
        Secret(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// How the operator logs in to the servers of one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Name of the user.
    pub(super) user: Arc<str>,
    /// Its password, from a Kubernetes Secret.
    pub(super) password: Secret,
}

impl Credentials {
    /// Name and password of a user who may look.
    pub fn new(user: &str, password: Secret) -> Credentials {
        Credentials { user: user.into(), password }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_password() {
        let credentials = Credentials::new("valkeeper", Secret::new("hunter2"));
        let shown = format!("{credentials:?} {:?}", credentials.password);
        assert!(shown.contains("valkeeper") && !shown.contains("hunter2"), "{shown}");
    }
}

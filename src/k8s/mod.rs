//! The only home of raw `Api<>`: how the program talks to the API server, and the bounds on every such conversation.
//! Knows nothing of decisions.

pub mod apply;
pub mod cache;
pub mod client;
pub mod events;
pub mod keys;
pub mod lease;
pub mod objects;
pub mod secrets;
pub mod slice;
pub mod watch;

use std::{future::Future, time::Duration};

/// Longest wait for one answer of the API server. Well under the lease's renew deadline (10 s), so that a call that hangs never
/// outlives the leadership it was made under; far above what a healthy server needs (about 10 ms).
pub const API_CALL_MAX: Duration = Duration::from_secs(5);

/// Field manager of everything the operator writes.
pub const FIELD_MANAGER: &str = "valkeeper";

/// Label that all owned objects carry, with [`FIELD_MANAGER`] as value.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";

/// Label with the name of the cluster that an object belongs to.
pub const CLUSTER_LABEL: &str = "valkeeper.io/cluster";

/// A conversation with the API server that did not end as wanted. What matters is what is known about the change asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such object. Nothing was changed.
    #[error("{what}: not found")]
    NotFound {
        /// Verb and object.
        what: String,
    },
    /// The object is another one, or another version of it, than the precondition names. Nothing was changed.
    #[error("{what}: conflict: {message}")]
    Conflict {
        /// Verb and object.
        what: String,
        /// The server's words.
        message: String,
    },
    /// The server understood and refused. Nothing was changed.
    #[error("{what}: refused with {code}: {message}")]
    Refused {
        /// Verb and object.
        what: String,
        /// HTTP status.
        code: u16,
        /// The server's words.
        message: String,
    },
    /// The namespace is being deleted, and nothing new is made in it. Nothing was changed.
    #[error("{what}: {message}")]
    NamespaceEnds {
        /// Verb and object.
        what: String,
        /// The server's words.
        message: String,
    },
    /// No answer, or one that leaves open whether the change was made.
    #[error("{what}: no certain answer")]
    Ambiguous {
        /// Verb and object.
        what: String,
        /// Transport error or 5xx answer; `None`: no answer within [`API_CALL_MAX`].
        #[source]
        source: Option<Box<kube::Error>>,
    },
    /// An object that lacks what every object has. Nothing was changed.
    #[error("{what}: {problem}")]
    Malformed {
        /// Verb and object.
        what: String,
        /// What is missing.
        problem: &'static str,
    },
    /// Neither a kubeconfig nor a service account could be used.
    #[error("no usable connection settings for the API server")]
    Settings(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// Sorts an error of the client by what it says about the change asked for.
    pub fn of(what: impl Into<String>, error: kube::Error) -> Self {
        let what = what.into();
        let kube::Error::Api(status) = &error else {
            return Error::Ambiguous { what, source: Some(Box::new(error)) };
        };
        let message = status.message.clone();
        match status.code {
            404 => Error::NotFound { what },
            409 => Error::Conflict { what, message },
            403 if namespace_ends(status) => Error::NamespaceEnds { what, message },
            // 429 is said before a request is looked at, so nothing was changed.
            code @ 400..500 => Error::Refused { what, code, message },
            _ => Error::Ambiguous { what, source: Some(Box::new(error)) },
        }
    }

    /// True if the object is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Error::NotFound { .. })
    }

    /// True if a precondition did not hold.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Error::Conflict { .. })
    }
}

/// True of a refusal by the admission plugin `NamespaceLifecycle`, which names this cause since Kubernetes 1.21.
fn namespace_ends(status: &kube::core::Status) -> bool {
    let mut causes = status.details.iter().flat_map(|details| &details.causes);
    causes.any(|cause| cause.reason == "NamespaceTerminating")
}

/// Runs one call of the API server under [`API_CALL_MAX`].
///
/// # Errors
/// What [`Error::of`] makes of the answer; [`Error::Ambiguous`] if there is none in time.
pub async fn bounded<T>(
    what: &str,
    call: impl Future<Output = Result<T, kube::Error>> + Send,
) -> Result<T, Error> {
    match tokio::time::timeout(API_CALL_MAX, call).await {
        Ok(answer) => answer.map_err(|e| Error::of(what, e)),
        Err(_elapsed) => Err(Error::Ambiguous { what: what.to_owned(), source: None }),
    }
}

/// Text of an error with all its sources, for records and log lines. Our own errors never repeat their source in
/// Display; where a library's does, it is not said twice.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let words = source.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(code: u16) -> kube::Error {
        let mut status = kube::core::Status::failure("words", "Reason");
        status.code = code;
        kube::Error::Api(status.boxed())
    }

    #[test]
    fn a_server_error_leaves_open_whether_the_change_was_made() {
        assert!(matches!(Error::of("replace x", answer(500)), Error::Ambiguous { .. }));
        assert!(matches!(Error::of("replace x", answer(504)), Error::Ambiguous { .. }));
    }

    #[test]
    fn a_client_error_means_that_nothing_was_changed() {
        assert!(Error::of("replace x", answer(409)).is_conflict());
        assert!(Error::of("get x", answer(404)).is_not_found());
        assert!(matches!(Error::of("apply x", answer(422)), Error::Refused { code: 422, .. }));
        assert!(matches!(Error::of("apply x", answer(429)), Error::Refused { code: 429, .. }));
        assert!(matches!(Error::of("apply x", answer(403)), Error::Refused { code: 403, .. }));
        let kube::Error::Api(mut status) = answer(403) else { panic!("it is the API's") };
        let text = r#"{"causes": [{"reason": "NamespaceTerminating", "field": "metadata.namespace"}]}"#;
        status.details = serde_json::from_str(text).unwrap();
        assert!(matches!(Error::of("apply x", kube::Error::Api(status)), Error::NamespaceEnds { .. }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_without_answer_ends_as_ambiguous() {
        let silent = std::future::pending::<Result<(), kube::Error>>();
        assert!(matches!(bounded("get x", silent).await, Err(Error::Ambiguous { source: None, .. })));
    }
}

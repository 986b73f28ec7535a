//! What an archive needs of a store: named bytes that are written once. A bucket offers that, and so does a directory.

use async_trait::async_trait;

/// Names in one listing. At a MiB of text each that is 100 GiB of one installation's history; more is a wrong bucket.
pub const LISTED_MAX: usize = 100_000;

/// Why bytes could not be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlobsError {
    /// There are bytes of that name, or someone is writing them at this moment. Nothing was written.
    #[error("the name is taken")]
    AlreadyExists,
    /// There are more bytes than the reader allows.
    #[error("more than {max} bytes")]
    TooLarge {
        /// The limit in bytes.
        max: usize,
    },
    /// Nobody knows whether it was written, or will be: a timeout or a 5xx.
    #[error("the answer is not known: {0}")]
    Ambiguous(String),
    /// Nothing was read or written, for certain.
    #[error("not reachable: {0}")]
    Unavailable(String),
}

/// A store of named bytes. A name is words separated by `/`; letters, digits, `-`, `_` and `.` are in a word, and none
/// begins with a `.`. Each call ends within a bound of the implementation's choice. A write that was answered with `Ok` is
/// durable, and later reads see it.
#[async_trait]
pub trait Blobs: Send + Sync {
    /// Writes bytes under a name that must not exist yet. Never a part of them.
    async fn put_new(&self, name: &str, bytes: &[u8]) -> Result<(), BlobsError>;

    /// The bytes of that name, `None` if there are none. Never holds more than `bytes_max` of them.
    async fn get(&self, name: &str, bytes_max: usize) -> Result<Option<Vec<u8>>, BlobsError>;

    /// Names that begin with `prefix`, in order. It is empty, or ends with `/`. [`LISTED_MAX`] at most, else `Unavailable`.
    async fn list(&self, prefix: &str) -> Result<Vec<String>, BlobsError>;
}

/// True if it is a word of a name.
pub(crate) fn is_word(text: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !text.is_empty() && !text.starts_with('.') && text.chars().all(is_allowed)
}

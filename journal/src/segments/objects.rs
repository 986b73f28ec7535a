//! What the segments backend needs of a store of named texts: what ConfigMaps offer, and nothing more.

use async_trait::async_trait;

/// An object as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its text: JSON Lines.
    pub bytes: String,
    /// Changes with every change of the object, its metadata included (resourceVersion).
    pub version: String,
}

/// Why an object could not be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectsError {
    /// It has another version than the one named. Nothing was written.
    #[error("the object has another version")]
    Conflict,
    /// There is no such object. Nothing was written.
    #[error("there is no such object")]
    NotFound,
    /// There is an object of that name. Nothing was written.
    #[error("the object exists already")]
    AlreadyExists,
    /// Nobody knows whether it was written, or will be: a timeout or a 5xx.
    #[error("the answer is not known: {0}")]
    Ambiguous(String),
    /// Nothing was read or written, for certain: not connected, throttled (429), forbidden.
    #[error("not reachable: {0}")]
    Unavailable(String),
}

/// A store of named texts with compare-and-swap. Each call is one request, is never repeated by the implementation and
/// ends within a bound of the implementation's choice. Reads are never older than a write that was answered before.
#[async_trait]
pub trait Objects: Send + Sync {
    /// The object of that name, `None` if there is none.
    async fn get(&self, name: &str) -> Result<Option<Object>, ObjectsError>;

    /// Makes an object that must not exist yet; returns its version.
    async fn create(&self, name: &str, bytes: &str) -> Result<String, ObjectsError>;

    /// Replaces the text of an object that must still have `version`; returns the new version.
    async fn replace(&self, name: &str, version: &str, bytes: &str) -> Result<String, ObjectsError>;

    /// Deletes an object; `NotFound` if there is none.
    async fn delete(&self, name: &str) -> Result<(), ObjectsError>;

    /// Names that begin with `prefix`, in order, without their contents.
    async fn list(&self, prefix: &str) -> Result<Vec<String>, ObjectsError>;
}

//! What the segments backend needs of a store of named objects: what ConfigMaps offer, and nothing more.

use crate::gzip::{self, GzipError};
use async_trait::async_trait;
use std::borrow::Cow;

/// An object as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// What it holds.
    pub body: Body,
    /// Changes with every change of the object, its metadata included (resourceVersion).
    pub version: String,
}

/// What an object holds: JSON Lines. What changes is plain, so that people can read it; what is sealed is packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// As it is.
    Text(String),
    /// Packed by [`Body::pack`]; `gunzip` unpacks it.
    Packed(Vec<u8>),
}

/// Why a body has no text.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It cannot be unpacked.
    #[error("it is {0}")]
    Gzip(#[from] GzipError),
    /// What was unpacked is not UTF-8.
    #[error("it is not text")]
    NotText,
}

impl Body {
    /// A text, packed.
    pub fn pack(text: &str) -> Body {
        Body::Packed(gzip::pack(text.as_bytes()))
    }

    /// Bytes that it takes in the store.
    pub fn stored_bytes(&self) -> usize {
        match self {
            Body::Text(text) => text.len(),
            Body::Packed(bytes) => bytes.len(),
        }
    }

    /// The text, if it unpacks to no more than `bytes_max`.
    ///
    /// # Errors
    /// It was not packed by [`Body::pack`], was changed since, or is larger.
    pub fn text(&self, bytes_max: usize) -> Result<Cow<'_, str>, BodyError> {
        match self {
            Body::Text(text) => Ok(Cow::Borrowed(text)),
            Body::Packed(bytes) => {
                let plain = gzip::unpack(bytes, bytes_max)?;
                String::from_utf8(plain).map(Cow::Owned).map_err(|_| BodyError::NotText)
            }
        }
    }
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

/// A store of named objects with compare-and-swap. Each call is one change at most: the implementation repeats nothing
/// that may have been done, and ends within a bound of its choice. Reads are never older than a write that was answered before.
#[async_trait]
pub trait Objects: Send + Sync {
    /// The object of that name, `None` if there is none.
    async fn get(&self, name: &str) -> Result<Option<Object>, ObjectsError>;

    /// Makes an object that must not exist yet; returns its version.
    async fn create(&self, name: &str, body: &Body) -> Result<String, ObjectsError>;

    /// Replaces the body of an object that must still have `version`; returns the new version.
    async fn replace(&self, name: &str, version: &str, body: &Body) -> Result<String, ObjectsError>;

    /// Deletes an object; `NotFound` if there is none.
    async fn delete(&self, name: &str) -> Result<(), ObjectsError>;

    /// Names that begin with `prefix`, in order, without their contents.
    async fn list(&self, prefix: &str) -> Result<Vec<String>, ObjectsError>;
}

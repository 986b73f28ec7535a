//! Where journals are archived: a bucket (S3, Google, Azure) or a directory. The only home of `object_store`.
//!
//! What is needed to reach a bucket is a directory of files, that is a mounted Secret: a file's name is a setting of
//! `object_store` (`aws_access_key_id`, `aws_endpoint`), its content the value. `ca.crt` is ours: the authorities whom the
//! store's certificate must be signed by, instead of the system's. No value is ever part of an error. They may change while the operator
//! runs: keys are rotated.

use async_trait::async_trait;
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, path::Path as BlobPath, prefix::PrefixStore};
use renewing::Renewing;
use settings::{Files, Hidden, Settings};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::time::timeout;
use valkeeper_journal::archive::{Blobs, BlobsError, DirectoryBlobs, blobs::LISTED_MAX};

mod renewing;
mod settings;

/// How long things may take. A journal waits for its archive for days if it must; a call that hangs only hides why.
#[derive(Clone, Copy)]
struct Limits {
    connect: Duration,
    /// One request, its body included.
    request: Duration,
    retry: Duration,
    /// Any call, with all its requests and pauses.
    call: Duration,
    /// The files of the credentials are looked at no more often.
    look: Duration,
}

/// Times that are common to all stores.
const LIMITS: Limits = Limits {
    // A handshake across a continent takes a quarter of it.
    connect: Duration::from_secs(3),
    // A segment is a few hundred KiB: 10 s are enough at 1 Mbit/s.
    request: Duration::from_secs(10),
    // First pause between attempts; each one may be twice the last.
    retry: Duration::from_millis(200),
    // All attempts and their pauses, or a listing of a hundred pages.
    call: Duration::from_secs(60),
    // A carry is some ten calls within a second; a Secret takes a minute to reach its volume.
    look: Duration::from_secs(5),
};

/// Why there is no archive.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL is of another form. It is not repeated: people put keys into URLs.
    #[error("the archive's URL {0}")]
    Url(&'static str),
    /// A file or the directory of the credentials cannot be read.
    #[error("credentials of the archive: {}", .path.display())]
    Unreadable {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the credentials is not what it should be.
    #[error("credentials of the archive: {} {why}", .path.display())]
    Setting {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// The settings do not go together, or one has a wrong value.
    #[error("the archive's settings are refused: {0}")]
    Refused(String),
}

/// Opens the archive's store. Nothing is asked of it yet.
///
/// `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` and `az://CONTAINER/PREFIX` take credentials; `file:///DIRECTORY` takes none.
/// The prefix may be left out.
///
/// # Errors
/// See [`Error`].
pub fn open(url: &str, credentials: Option<&Path>) -> Result<Arc<dyn Blobs>, Error> {
    open_within(url, credentials, LIMITS)
}

fn open_within(url: &str, credentials: Option<&Path>, limits: Limits) -> Result<Arc<dyn Blobs>, Error> {
    let (scheme, rest) =
        url.split_once("://").ok_or(Error::Url("has no scheme, as in s3://BUCKET/PREFIX"))?;
    if scheme == "file" {
        return directory(rest, credentials);
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(Error::Url("names no bucket"));
    }
    // Without user, password, port and query.
    if !bucket.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
        return Err(Error::Url("has something else than a bucket's name after the scheme"));
    }
    let prefix = BlobPath::parse(prefix).map_err(|_| Error::Url("has a prefix that is no path"))?;
    let place = Place { scheme: scheme.to_owned(), bucket: bucket.to_owned(), prefix, limits };
    let files = Files::read(credentials)?;
    let opened = Arc::new(place.open(&files)?);
    Ok(match credentials {
        Some(folder) => Arc::new(Renewing::new(place, folder, files, opened)),
        None => opened,
    })
}

/// A bucket, or a part of one.
#[derive(Clone)]
struct Place {
    scheme: String,
    bucket: String,
    prefix: BlobPath,
    limits: Limits,
}

impl Place {
    /// As those credentials reach it.
    fn open(&self, files: &Files) -> Result<Bucket, Error> {
        let Place { scheme, bucket, prefix, limits } = self;
        let settings = Settings::parse(files)?;
        let store = PrefixStore::new(settings.store(scheme, bucket, *limits)?, prefix.clone());
        Ok(Bucket { store, hidden: settings.hidden(), limits: *limits })
    }
}

fn directory(path: &str, credentials: Option<&Path>) -> Result<Arc<dyn Blobs>, Error> {
    if !path.starts_with('/') {
        return Err(Error::Url("is not file:///DIRECTORY with the whole path of a directory"));
    }
    if credentials.is_some() {
        return Err(Error::Url("is a directory's, which takes no credentials"));
    }
    Ok(Arc::new(DirectoryBlobs::new(path)))
}

struct Bucket {
    store: PrefixStore<Arc<dyn ObjectStore>>,
    hidden: Hidden,
    limits: Limits,
}

impl Bucket {
    fn path(name: &str) -> Result<BlobPath, BlobsError> {
        BlobPath::parse(name).map_err(|_| BlobsError::Unavailable(format!("{name:?} is no name of a blob")))
    }

    fn unavailable(&self, e: &object_store::Error) -> BlobsError {
        BlobsError::Unavailable(self.hidden.why(&e.to_string()))
    }

    /// Any call of this store ends.
    async fn within<T>(
        &self,
        call: impl Future<Output = Result<T, BlobsError>>,
        late: fn(String) -> BlobsError,
    ) -> Result<T, BlobsError> {
        let ended = timeout(self.limits.call, call).await;
        ended.unwrap_or_else(|_| Err(late(format!("no answer within {:?}", self.limits.call))))
    }

    async fn put(&self, name: &str, bytes: &[u8]) -> Result<(), BlobsError> {
        use object_store::Error as E;
        let path = Self::path(name)?;
        let put = self.store.put_opts(&path, bytes.to_vec().into(), PutMode::Create.into());
        let Err(e) = put.await else { return Ok(()) };
        // Also a 409, which says that somebody else is writing this name.
        if matches!(e, E::AlreadyExists { .. } | E::Precondition { .. }) {
            return Err(BlobsError::AlreadyExists);
        }
        let is_refused = matches!(
            e,
            E::PermissionDenied { .. }
                | E::Unauthenticated { .. }
                | E::NotFound { .. }
                | E::NotImplemented { .. }
                | E::NotSupported { .. }
                | E::InvalidPath { .. }
        );
        // Everything else may have been the second attempt, and the first one may have been taken.
        Err(if is_refused {
            self.unavailable(&e)
        } else {
            BlobsError::Ambiguous(self.hidden.why(&e.to_string()))
        })
    }

    async fn fetch(&self, name: &str, bytes_max: usize) -> Result<Option<Vec<u8>>, BlobsError> {
        let found = match self.store.get(&Self::path(name)?).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(e) => return Err(self.unavailable(&e)),
        };
        let mut chunks = found.into_stream();
        let mut bytes = Vec::new();
        while let Some(chunk) = chunks.try_next().await.map_err(|e| self.unavailable(&e))? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > bytes_max {
                return Err(BlobsError::TooLarge { max: bytes_max });
            }
        }
        Ok(Some(bytes))
    }

    async fn names(&self, prefix: &str) -> Result<Vec<String>, BlobsError> {
        let prefix = Self::path(prefix)?;
        let mut listed = self.store.list(Some(&prefix));
        let mut names = Vec::new();
        while let Some(object) = listed.try_next().await.map_err(|e| self.unavailable(&e))? {
            names.push(object.location.to_string());
            if names.len() > LISTED_MAX {
                return Err(BlobsError::Unavailable(format!("more than {LISTED_MAX} objects")));
            }
        }
        names.sort();
        Ok(names)
    }
}

#[async_trait]
impl Blobs for Bucket {
    async fn put_new(&self, name: &str, bytes: &[u8]) -> Result<(), BlobsError> {
        self.within(self.put(name, bytes), BlobsError::Ambiguous).await
    }

    async fn get(&self, name: &str, bytes_max: usize) -> Result<Option<Vec<u8>>, BlobsError> {
        self.within(self.fetch(name, bytes_max), BlobsError::Unavailable).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, BlobsError> {
        self.within(self.names(prefix), BlobsError::Unavailable).await
    }
}

#[cfg(test)]
mod tests;

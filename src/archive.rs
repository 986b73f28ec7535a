//! Where journals are archived: a bucket (S3, Google, Azure) or a directory. The only home of `object_store`.
//!
//! What is needed to reach a bucket is a directory of files, that is a mounted Secret: a file's name is a setting of
//! `object_store` (`aws_access_key_id`, `aws_endpoint`), its content the value. `ca.crt` is ours: the authorities whom the
//! store's certificate must be signed by, instead of the system's. No value is ever part of an error.

use async_trait::async_trait;
use futures::TryStreamExt;
use object_store::{
    BackoffConfig, Certificate, ClientOptions, ObjectStore, ObjectStoreExt, PutMode, RetryConfig,
    aws::{AmazonS3Builder, S3ConditionalPut},
    azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder,
    path::Path as BlobPath,
    prefix::PrefixStore,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};
use tokio::time::timeout;
use valkeeper_journal::archive::{Blobs, BlobsError, DirectoryBlobs, blobs::LISTED_MAX};

/// Largest file of the credentials, in bytes: what a Secret may hold.
const SETTING_BYTES_MAX: u64 = 1024 * 1024;

/// File of the authorities that are trusted.
const AUTHORITIES: &str = "ca.crt";

/// Longest text of an error, in characters: stores answer with pages of XML, and this ends up in a status.
const WHY_CHARS_MAX: usize = 400;

/// Shortest part of a value that is looked for in an error, in characters. Shorter ones are words like `true`.
const SECRET_CHARS_MIN: usize = 6;

/// How long things may take. A journal waits for its archive for days if it must; a call that hangs only hides why.
#[derive(Clone, Copy)]
struct Limits {
    connect: Duration,
    /// One request, its body included.
    request: Duration,
    retry: Duration,
    /// Any call, with all its requests and pauses.
    call: Duration,
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
};

/// Further attempts after a refusal or, of a read, a timeout. The archive itself is tried again later; these are for a blink.
const RETRIES_MAX: usize = 3;

/// Longest pause between attempts, in multiples of the first: the fourth attempt comes after some two seconds.
const RETRY_PAUSES_MAX: u32 = 5;

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
    let settings = Settings::read(credentials)?;
    let store = match scheme {
        "s3" => settings.s3(bucket, limits),
        "gs" => settings.gs(bucket, limits),
        "az" => settings.az(bucket, limits),
        _ => Err(Error::Url("has an unknown scheme: s3, gs, az and file are known")),
    }?;
    Ok(Arc::new(Bucket { store: PrefixStore::new(store, prefix), hidden: settings.hidden(), limits }))
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

/// A file of the credentials. Not `Debug`: it is a secret.
struct Setting {
    path: PathBuf,
    name: String,
    value: String,
}

impl Setting {
    fn key<K: FromStr>(&self) -> Result<K, Error> {
        let refused =
            || Error::Setting { path: self.path.clone(), why: "is no setting of this kind of store" };
        self.name.parse().map_err(|_| refused())
    }
}

#[derive(Default)]
struct Settings {
    all: Vec<Setting>,
    authorities: Vec<Certificate>,
}

impl Settings {
    fn read(credentials: Option<&Path>) -> Result<Settings, Error> {
        let mut settings = Settings::default();
        let Some(folder) = credentials else { return Ok(settings) };
        let unreadable = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Unreadable { path, source }
        };
        for entry in fs::read_dir(folder).map_err(unreadable(folder))? {
            let path = entry.map_err(unreadable(folder))?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            // `..data` and the like are how Kubernetes mounts a Secret.
            if name.starts_with("..") {
                continue;
            }
            let size = fs::metadata(&path).map_err(unreadable(&path))?.len();
            if size > SETTING_BYTES_MAX {
                return Err(Error::Setting { path, why: "is too large" });
            }
            let bytes = fs::read(&path).map_err(unreadable(&path))?;
            if name == AUTHORITIES {
                let found = Certificate::from_pem_bundle(&bytes).ok().filter(|found| !found.is_empty());
                settings.authorities =
                    found.ok_or(Error::Setting { path, why: "holds no certificates in PEM" })?;
                continue;
            }
            let Ok(text) = String::from_utf8(bytes) else {
                return Err(Error::Setting { path, why: "is no text" });
            };
            let value = text.trim_end_matches(['\r', '\n']).to_owned();
            settings.all.push(Setting { path, name, value });
        }
        Ok(settings)
    }

    fn client(&self, limits: Limits) -> ClientOptions {
        let options = ClientOptions::new()
            .with_timeout(limits.request)
            .with_connect_timeout(limits.connect)
            .with_no_system_certificates(!self.authorities.is_empty());
        self.authorities.iter().cloned().fold(options, ClientOptions::with_root_certificate)
    }

    fn s3(&self, bucket: &str, limits: Limits) -> Result<Arc<dyn ObjectStore>, Error> {
        let builder =
            AmazonS3Builder::new().with_client_options(self.client(limits)).with_retry(retry(limits));
        let set = |builder: AmazonS3Builder, one: &Setting| Ok(builder.with_config(one.key()?, &one.value));
        let builder = self.all.iter().try_fold(builder, set)?;
        // If-None-Match: a name is written once, whoever else writes at the same moment.
        let builder = builder.with_conditional_put(S3ConditionalPut::ETagMatch).with_bucket_name(bucket);
        Ok(Arc::new(builder.build().map_err(|e| self.refused(&e))?))
    }

    fn gs(&self, bucket: &str, limits: Limits) -> Result<Arc<dyn ObjectStore>, Error> {
        let builder = GoogleCloudStorageBuilder::new()
            .with_client_options(self.client(limits))
            .with_retry(retry(limits));
        let set = |builder: GoogleCloudStorageBuilder, one: &Setting| {
            Ok(builder.with_config(one.key()?, &one.value))
        };
        let builder = self.all.iter().try_fold(builder, set)?.with_bucket_name(bucket);
        Ok(Arc::new(builder.build().map_err(|e| self.refused(&e))?))
    }

    fn az(&self, container: &str, limits: Limits) -> Result<Arc<dyn ObjectStore>, Error> {
        let builder =
            MicrosoftAzureBuilder::new().with_client_options(self.client(limits)).with_retry(retry(limits));
        let set =
            |builder: MicrosoftAzureBuilder, one: &Setting| Ok(builder.with_config(one.key()?, &one.value));
        let builder = self.all.iter().try_fold(builder, set)?.with_container_name(container);
        Ok(Arc::new(builder.build().map_err(|e| self.refused(&e))?))
    }

    fn refused(&self, e: &object_store::Error) -> Error {
        Error::Refused(self.hidden().why(&e.to_string()))
    }

    fn hidden(&self) -> Hidden {
        let values = self.all.iter().flat_map(|setting| {
            // A key in a JSON file is quoted as a whole or by the line.
            let parts = setting.value.split(['"', '\n']).flat_map(|part| part.split("\\n"));
            parts.chain([setting.value.as_str()]).map(str::trim)
        });
        let long = values.filter(|value| value.chars().count() >= SECRET_CHARS_MIN);
        let mut values: Vec<String> = long.map(str::to_owned).collect();
        // The longest first, so that no part of one is left.
        values.sort_by_key(|value| std::cmp::Reverse(value.len()));
        Hidden { values }
    }
}

fn retry(limits: Limits) -> RetryConfig {
    let backoff =
        BackoffConfig { init_backoff: limits.retry, max_backoff: limits.retry * RETRY_PAUSES_MAX, base: 2.0 };
    RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: limits.call }
}

/// What must not be in a text.
struct Hidden {
    values: Vec<String>,
}

impl Hidden {
    /// A text of somebody else's for our errors, without values and not too long.
    fn why(&self, text: &str) -> String {
        let text =
            self.values.iter().fold(text.to_owned(), |text, value| text.replace(value.as_str(), "***"));
        text.chars().take(WHY_CHARS_MAX).collect()
    }
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

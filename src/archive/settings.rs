//! What is needed to reach a bucket: files in a directory, and the store that they lead to.

use super::{Error, Limits};
use object_store::{
    BackoffConfig, Certificate, ClientOptions, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, S3ConditionalPut},
    azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder,
};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};
use valkeeper_core::words;

/// Largest file of the credentials, in bytes: what a Secret may hold.
pub(super) const SETTING_BYTES_MAX: u64 = 1024 * 1024;

/// File of the authorities that are trusted.
const AUTHORITIES: &str = "ca.crt";

/// Longest text of an error, in characters: stores answer with pages of XML, and this ends up in a status.
pub(super) const WHY_CHARS_MAX: usize = words::CHARS_MAX;

/// Shortest part of a value that is looked for in an error, in characters. Shorter ones are words like `true`.
pub(super) const SECRET_CHARS_MIN: usize = 6;

/// Further attempts after a refusal or, of a read, a timeout. The archive itself is tried again later; these are for a blink.
pub(super) const RETRIES_MAX: usize = 3;

/// Longest pause between attempts, in multiples of the first: the fourth attempt comes after some two seconds.
const RETRY_PAUSES_MAX: u32 = 5;

/// The files of the credentials, byte for byte. Not `Debug`: they are secrets.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Files(BTreeMap<PathBuf, Vec<u8>>);

impl Files {
    /// Those in a directory; none without one.
    pub(super) fn read(credentials: Option<&Path>) -> Result<Files, Error> {
        let mut files = BTreeMap::new();
        let Some(folder) = credentials else { return Ok(Files(files)) };
        let unreadable = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Unreadable { path, source }
        };
        let listed = fs::read_dir(folder).map_err(unreadable(folder))?;
        let paths: Result<Vec<PathBuf>, _> = listed.map(|entry| entry.map(|entry| entry.path())).collect();
        let mut paths = paths.map_err(unreadable(folder))?;
        // So that the same trouble is always told of the same file.
        paths.sort();
        for path in paths {
            // `..data` and the like are how Kubernetes mounts a Secret.
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("..")) {
                continue;
            }
            let size = fs::metadata(&path).map_err(unreadable(&path))?.len();
            if size > SETTING_BYTES_MAX {
                return Err(Error::Setting { path, why: "is too large" });
            }
            let bytes = fs::read(&path).map_err(unreadable(&path))?;
            files.insert(path, bytes);
        }
        Ok(Files(files))
    }
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

/// What the credentials say, read.
#[derive(Default)]
pub(super) struct Settings {
    all: Vec<Setting>,
    authorities: Vec<Certificate>,
}

impl Settings {
    /// What the files say.
    pub(super) fn parse(files: &Files) -> Result<Settings, Error> {
        let mut settings = Settings::default();
        for (path, bytes) in &files.0 {
            let (path, bytes) = (path.clone(), bytes.as_slice());
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if name == AUTHORITIES {
                let found = Certificate::from_pem_bundle(bytes).ok().filter(|found| !found.is_empty());
                settings.authorities =
                    found.ok_or(Error::Setting { path, why: "holds no certificates in PEM" })?;
                continue;
            }
            let Ok(text) = std::str::from_utf8(bytes) else {
                return Err(Error::Setting { path, why: "is no text" });
            };
            let value = text.trim_end_matches(['\r', '\n']).to_owned();
            settings.all.push(Setting { path, name, value });
        }
        Ok(settings)
    }

    /// The store that they lead to.
    pub(super) fn store(
        &self,
        scheme: &str,
        bucket: &str,
        limits: Limits,
    ) -> Result<Arc<dyn ObjectStore>, Error> {
        match scheme {
            "s3" => self.s3(bucket, limits),
            "gs" => self.gs(bucket, limits),
            "az" => self.az(bucket, limits),
            _ => Err(Error::Url("has an unknown scheme: s3, gs, az and file are known")),
        }
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

    /// What must not be told of them.
    pub(super) fn hidden(&self) -> Hidden {
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
pub(super) struct Hidden {
    values: Vec<String>,
}

impl Hidden {
    /// A text of somebody else's for our errors, without values and not too long.
    pub(super) fn why(&self, text: &str) -> String {
        let text =
            self.values.iter().fold(text.to_owned(), |text, value| text.replace(value.as_str(), "***"));
        words::of_others(&text, WHY_CHARS_MAX)
    }
}

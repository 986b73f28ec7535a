//! A bucket whose credentials may change: their files are looked at before a call, and if they say something else, the bucket is opened
//! anew with that. What cannot be used is said once, and the bucket stays as it was.

use super::{Bucket, Error, Files, Place};
use crate::k8s;
use async_trait::async_trait;
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::time::{Instant, timeout};
use valkeeper_journal::archive::{Blobs, BlobsError};

/// The bucket, and whence its credentials are.
pub(super) struct Renewing {
    place: Place,
    folder: PathBuf,
    now: Mutex<Now>,
}

/// What is in use.
struct Now {
    bucket: Arc<Bucket>,
    files: Files,
    /// Why other files are not, if there are any.
    complaint: Option<String>,
    look_at: Instant,
}

/// What the files were found to say.
enum Found {
    /// What is in use.
    Same,
    /// They change at this moment.
    Changing,
    /// Something else, and the bucket opened with that.
    Other(Files, Arc<Bucket>),
}

impl Renewing {
    /// A bucket that was opened with these files of that directory.
    pub(super) fn new(place: Place, folder: &Path, files: Files, bucket: Arc<Bucket>) -> Renewing {
        let look_at = Instant::now() + place.limits.look;
        let now = Mutex::new(Now { bucket, files, complaint: None, look_at });
        Renewing { place, folder: folder.to_owned(), now }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        // Each change of it is whole, so a panic of another holder does not matter.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn bucket(&self) -> Arc<Bucket> {
        if let Some(why) = self.renew().await {
            tracing::warn!(error = why, "the archive's new credentials cannot be used; the former ones are");
        }
        Arc::clone(&self.now().bucket)
    }

    /// Looks at the files, if it is time to. While one call looks, others go on with what there is. Returns what is to be said.
    pub(super) async fn renew(&self) -> Option<String> {
        let known = {
            let mut now = self.now();
            if Instant::now() < now.look_at {
                return None;
            }
            now.look_at = Instant::now() + self.place.limits.look;
            now.files.clone()
        };
        let (place, folder) = (self.place.clone(), self.folder.clone());
        let looking = tokio::task::spawn_blocking(move || look(&place, &folder, &known));
        let found = match timeout(self.place.limits.call, looking).await {
            Ok(Ok(found)) => found.map_err(|error| k8s::chain(&error)),
            Ok(Err(panicked)) => Err(panicked.to_string()),
            Err(_) => Err("their files are not read in time".to_owned()),
        };
        self.take(found)
    }

    /// Goes on with what was found; what is to be said of it, if it was not said already.
    fn take(&self, found: Result<Found, String>) -> Option<String> {
        let mut now = self.now();
        match found {
            Ok(Found::Same) => now.complaint = None,
            Ok(Found::Changing) => {}
            Ok(Found::Other(files, bucket)) => {
                tracing::info!("the archive is reached with the credentials that its files have now");
                (now.files, now.bucket, now.complaint) = (files, bucket, None);
            }
            Err(why) => {
                let before = now.complaint.replace(why.clone());
                return (before.as_ref() != Some(&why)).then_some(why);
            }
        }
        None
    }
}

fn look(place: &Place, folder: &Path, known: &Files) -> Result<Found, Error> {
    let files = Files::read(Some(folder))?;
    if files == *known {
        return Ok(Found::Same);
    }
    // Read one by one while the volume is swapped, they would be of two sets.
    if Files::read(Some(folder))? != files {
        return Ok(Found::Changing);
    }
    let bucket = Arc::new(place.open(&files)?);
    Ok(Found::Other(files, bucket))
}

#[async_trait]
impl Blobs for Renewing {
    async fn put_new(&self, name: &str, bytes: &[u8]) -> Result<(), BlobsError> {
        self.bucket().await.put_new(name, bytes).await
    }

    async fn get(&self, name: &str, bytes_max: usize) -> Result<Option<Vec<u8>>, BlobsError> {
        self.bucket().await.get(name, bytes_max).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, BlobsError> {
        self.bucket().await.list(prefix).await
    }
}

//! ConfigMaps as the journal's store of named texts. They live in the operator's namespace, without owner reference:
//! deleting a cluster or its namespace must not delete its history. Never watched: the writer knows what it wrote.

mod lanes;
mod patience;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use super::{API_CALL_MAX, Error, FIELD_MANAGER, MANAGED_BY, bounded};
use crate::lease::Leadership;
use async_trait::async_trait;
use k8s_openapi::{ByteString, api::core::v1::ConfigMap};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, PostParams},
};
use lanes::Lanes;
use std::{future::Future, time::Duration};
use valkeeper_journal::segments::{Body, Object, Objects, ObjectsError};

/// Label of a journal's ConfigMaps; its value is the UID of the cluster's resource.
pub const JOURNAL_LABEL: &str = "valkeeper.io/journal";

/// The key under which text is.
const TEXT_KEY: &str = "records.jsonl";

/// The key under which packed text is: `kubectl get cm NAME -o jsonpath='{.binaryData.records\.jsonl\.gz}' | base64 -d | gunzip`.
const PACKED_KEY: &str = "records.jsonl.gz";

/// Names per page of a list: the server's answer to one request stays below 1 MiB without contents.
const PAGE_NAMES: u32 = 500;

/// Pages of a list: a million names. Beyond it the list is refused rather than cut.
const PAGES_MAX: usize = 2_000;

/// Characters of a UID.
const UID_CHARS: usize = 36;

/// Longest wait in that line: after it the server is too slow for everyone. Nothing was sent by then, and the next turn tries again.
const LINE_WAIT_MAX: Duration = API_CALL_MAX;

/// ConfigMaps of one namespace. Writes only while the process leads.
pub struct ConfigMaps {
    api: Api<ConfigMap>,
    leadership: Leadership,
    lanes: Lanes,
}

impl ConfigMaps {
    /// The store in `namespace`, which refuses writes when `leadership` has ended.
    pub fn new(client: Client, namespace: &str, leadership: Leadership) -> Self {
        let api = Api::namespaced(patience::patient(client, namespace), namespace);
        ConfigMaps { api, leadership, lanes: Lanes::new() }
    }

    /// Waits in line, then makes one write. Until it is sent, an error is certain.
    async fn write<T>(
        &self,
        verb: &str,
        name: &str,
        call: impl Future<Output = Result<T, kube::Error>> + Send,
    ) -> Result<T, WriteError> {
        let what = &format!("{verb} ConfigMap/{name}");
        let Some(_leave) = self.lanes.enter(uid_of(name).unwrap_or(name), LINE_WAIT_MAX).await else {
            let why = format!("{what}: others were not answered in {} s", LINE_WAIT_MAX.as_secs());
            return Err(WriteError::NotSent(why));
        };
        // After the wait: leadership may have ended meanwhile.
        self.leadership.check().map_err(|e| WriteError::NotSent(e.to_string()))?;
        bounded(what, call).await.map_err(WriteError::Answered)
    }
}

/// Why a write was not made, or is not known to have been.
enum WriteError {
    /// It was not even sent.
    NotSent(String),
    Answered(Error),
}

#[async_trait]
impl Objects for ConfigMaps {
    async fn get(&self, name: &str) -> Result<Option<Object>, ObjectsError> {
        let found = bounded(&format!("get ConfigMap/{name}"), self.api.get_opt(name)).await;
        let Some(map) = found.map_err(of_read)? else { return Ok(None) };
        let version = map.resource_version().unwrap_or_default();
        Ok(Some(Object { body: body_of(map), version }))
    }

    async fn create(&self, name: &str, body: &Body) -> Result<String, ObjectsError> {
        let mut map = config_map(name, body);
        // Only the head ever changes; everything else is sealed, and the server keeps it so.
        map.immutable = (!name.ends_with("-head")).then_some(true);
        let created = self.write("create", name, self.api.create(&post(), &map)).await;
        match created {
            Ok(map) => Ok(map.resource_version().unwrap_or_default()),
            Err(WriteError::Answered(Error::Conflict { .. })) => Err(ObjectsError::AlreadyExists),
            Err(error) => Err(of_write(error)),
        }
    }

    async fn replace(&self, name: &str, version: &str, body: &Body) -> Result<String, ObjectsError> {
        if version.is_empty() {
            // Without a version the server would overwrite blindly.
            return Err(ObjectsError::Conflict);
        }
        let mut map = config_map(name, body);
        map.metadata.resource_version = Some(version.to_owned());
        let replaced = self.write("replace", name, self.api.replace(name, &post(), &map)).await;
        replaced.map(|map| map.resource_version().unwrap_or_default()).map_err(of_write)
    }

    async fn delete(&self, name: &str) -> Result<(), ObjectsError> {
        self.write("delete", name, self.api.delete(name, &DeleteParams::default()))
            .await
            .map(|_| ())
            .map_err(of_write)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, ObjectsError> {
        let selector = match uid_of(prefix) {
            Some(uid) => format!("{JOURNAL_LABEL}={uid}"),
            None => JOURNAL_LABEL.to_owned(),
        };
        let mut params = ListParams::default().labels(&selector).limit(PAGE_NAMES);
        let mut names = Vec::new();
        for _ in 0..PAGES_MAX {
            let page = bounded("list ConfigMaps", self.api.list_metadata(&params)).await.map_err(of_read)?;
            names.extend(page.items.iter().map(|m| m.name_any()).filter(|name| name.starts_with(prefix)));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => {
                    names.sort();
                    return Ok(names);
                }
            }
        }
        Err(ObjectsError::Unavailable(format!("more than {PAGES_MAX} pages of ConfigMaps")))
    }
}

fn body_of(map: ConfigMap) -> Body {
    let packed = || map.binary_data.and_then(|mut data| data.remove(PACKED_KEY));
    match map.data.and_then(|mut data| data.remove(TEXT_KEY)) {
        Some(text) => Body::Text(text),
        None => packed().map_or(Body::Text(String::new()), |ByteString(bytes)| Body::Packed(bytes)),
    }
}

fn config_map(name: &str, body: &Body) -> ConfigMap {
    let mut map = ConfigMap::default();
    match body {
        Body::Text(text) => map.data = Some([(TEXT_KEY.to_owned(), text.clone())].into()),
        Body::Packed(bytes) => {
            map.binary_data = Some([(PACKED_KEY.to_owned(), ByteString(bytes.clone()))].into());
        }
    }
    map.metadata.name = Some(name.to_owned());
    let labels = map.labels_mut();
    labels.insert(MANAGED_BY.to_owned(), FIELD_MANAGER.to_owned());
    if let Some(uid) = uid_of(name) {
        labels.insert(JOURNAL_LABEL.to_owned(), uid.to_owned());
    }
    map
}

/// The UID in a name or prefix such as `journal-<uid>-head`.
fn uid_of(name: &str) -> Option<&str> {
    name.strip_prefix("journal-")?.get(..UID_CHARS).filter(|uid| uuid::Uuid::try_parse(uid).is_ok())
}

fn post() -> PostParams {
    PostParams { dry_run: false, field_manager: Some(FIELD_MANAGER.to_owned()) }
}

fn of_read(error: Error) -> ObjectsError {
    ObjectsError::Unavailable(super::chain(&error))
}

fn of_write(error: WriteError) -> ObjectsError {
    match error {
        WriteError::NotSent(why) => ObjectsError::Unavailable(why),
        WriteError::Answered(Error::Conflict { .. }) => ObjectsError::Conflict,
        WriteError::Answered(Error::NotFound { .. }) => ObjectsError::NotFound,
        WriteError::Answered(
            error @ (Error::Refused { .. }
            | Error::NamespaceEnds { .. }
            | Error::Malformed { .. }
            | Error::Settings(_)),
        ) => ObjectsError::Unavailable(super::chain(&error)),
        WriteError::Answered(Error::Ambiguous { what, source: None }) => {
            ObjectsError::Ambiguous(format!("{what}: no answer within {} s", API_CALL_MAX.as_secs()))
        }
        WriteError::Answered(error @ Error::Ambiguous { .. }) => {
            ObjectsError::Ambiguous(super::chain(&error))
        }
    }
}

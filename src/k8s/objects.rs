//! ConfigMaps as the journal's store of named texts. They live in the operator's namespace, without owner reference:
//! deleting a cluster or its namespace must not delete its history. Never watched: the writer knows what it wrote.

use super::{API_CALL_MAX, Error, FIELD_MANAGER, MANAGED_BY, bounded};
use crate::lease::Leadership;
use async_trait::async_trait;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, PostParams},
};
use valkeeper_journal::segments::{Object, Objects, ObjectsError};

/// Label of a journal's ConfigMaps; its value is the UID of the cluster's resource.
pub const JOURNAL_LABEL: &str = "valkeeper.io/journal";

/// The key under which the text is.
const KEY: &str = "records.jsonl";

/// Names per page of a list: the server's answer to one request stays below 1 MiB without contents.
const PAGE_NAMES: u32 = 500;

/// Pages of a list: a million names. Beyond it the list is refused rather than cut.
const PAGES_MAX: usize = 2_000;

/// Characters of a UID.
const UID_CHARS: usize = 36;

/// ConfigMaps of one namespace. Writes only while the process leads.
pub struct ConfigMaps {
    api: Api<ConfigMap>,
    leadership: Leadership,
}

impl ConfigMaps {
    /// The store in `namespace`, which refuses writes when `leadership` has ended.
    pub fn new(client: Client, namespace: &str, leadership: Leadership) -> Self {
        ConfigMaps { api: Api::namespaced(client, namespace), leadership }
    }

    fn may_write(&self) -> Result<(), ObjectsError> {
        self.leadership.check().map_err(|e| ObjectsError::Unavailable(e.to_string()))
    }
}

#[async_trait]
impl Objects for ConfigMaps {
    async fn get(&self, name: &str) -> Result<Option<Object>, ObjectsError> {
        let found = bounded(&format!("get ConfigMap/{name}"), self.api.get_opt(name)).await;
        let Some(map) = found.map_err(of_read)? else { return Ok(None) };
        let version = map.resource_version().unwrap_or_default();
        let bytes = map.data.and_then(|mut data| data.remove(KEY)).unwrap_or_default();
        Ok(Some(Object { bytes, version }))
    }

    async fn create(&self, name: &str, bytes: &str) -> Result<String, ObjectsError> {
        self.may_write()?;
        let mut map = config_map(name, bytes);
        // Only the head ever changes; everything else is sealed, and the server keeps it so.
        map.immutable = (!name.ends_with("-head")).then_some(true);
        let created = bounded(&format!("create ConfigMap/{name}"), self.api.create(&post(), &map)).await;
        match created {
            Ok(map) => Ok(map.resource_version().unwrap_or_default()),
            Err(Error::Conflict { .. }) => Err(ObjectsError::AlreadyExists),
            Err(error) => Err(of_write(error)),
        }
    }

    async fn replace(&self, name: &str, version: &str, bytes: &str) -> Result<String, ObjectsError> {
        self.may_write()?;
        if version.is_empty() {
            // Without a version the server would overwrite blindly.
            return Err(ObjectsError::Conflict);
        }
        let mut map = config_map(name, bytes);
        map.metadata.resource_version = Some(version.to_owned());
        let replaced =
            bounded(&format!("replace ConfigMap/{name}"), self.api.replace(name, &post(), &map)).await;
        replaced.map(|map| map.resource_version().unwrap_or_default()).map_err(of_write)
    }

    async fn delete(&self, name: &str) -> Result<(), ObjectsError> {
        self.may_write()?;
        let what = format!("delete ConfigMap/{name}");
        bounded(&what, self.api.delete(name, &DeleteParams::default())).await.map(|_| ()).map_err(of_write)
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

fn config_map(name: &str, bytes: &str) -> ConfigMap {
    let mut map =
        ConfigMap { data: Some([(KEY.to_owned(), bytes.to_owned())].into()), ..ConfigMap::default() };
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

fn of_write(error: Error) -> ObjectsError {
    match error {
        Error::Conflict { .. } => ObjectsError::Conflict,
        Error::NotFound { .. } => ObjectsError::NotFound,
        Error::Refused { .. } | Error::Malformed { .. } | Error::Settings(_) => {
            ObjectsError::Unavailable(super::chain(&error))
        }
        Error::Ambiguous { what, source: None } => {
            ObjectsError::Ambiguous(format!("{what}: no answer within {} s", API_CALL_MAX.as_secs()))
        }
        Error::Ambiguous { .. } => ObjectsError::Ambiguous(super::chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b5f7f0e-8c2a-4f5e-9a57-0c8d5c1d2e3f";

    #[test]
    fn a_journal_is_labelled_with_its_clusters_uid() {
        let map = config_map(&format!("journal-{UID}-head"), "x");
        assert_eq!(map.labels().get(JOURNAL_LABEL).map(String::as_str), Some(UID));
        assert_eq!(map.owner_references(), [], "history must survive its cluster");
    }

    #[test]
    fn an_answer_that_is_not_known_is_never_taken_for_a_refusal() {
        let silent = Error::Ambiguous { what: "replace".into(), source: None };
        assert!(matches!(of_write(silent), ObjectsError::Ambiguous(_)));
        let full = Error::Refused { what: "replace".into(), code: 403, message: "quota".into() };
        assert!(matches!(of_write(full), ObjectsError::Unavailable(_)));
    }
}

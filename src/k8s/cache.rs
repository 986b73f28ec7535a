//! What the watches have brought, and what this process has itself written since. A read never goes back behind a write:
//! the answer of a write enters the cache at once, and a watch event that is older than it does not undo it.

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use kube::{Resource, ResourceExt, runtime::watcher::Event};
use std::{
    any::Any,
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};
use tokio::sync::watch;

/// Deleted UIDs remembered, so that the late answer of a write does not bring a deleted object back. An answer is at most
/// [`super::API_CALL_MAX`] late; this many deletions of one kind in that time is beyond what an API server does.
const TOMBSTONES_MAX: usize = 4096;

/// The cluster an object belongs to: (namespace, name of the cluster).
pub type Owner = (String, String);

type Key = (String, String);

struct Entry<K> {
    object: Arc<K>,
    /// When this process wrote it; `None` if the watch brought it.
    written_at: Option<Instant>,
}

struct Inner<K> {
    objects: HashMap<Key, Entry<K>>,
    by_owner: HashMap<Owner, BTreeSet<String>>,
    /// UID and resourceVersion of what the watch has shown to go.
    tombstones: VecDeque<(String, Option<u64>)>,
    relist: Option<(Instant, HashMap<Key, Arc<K>>)>,
}

/// All objects of one kind that are watched.
pub struct Cache<K> {
    inner: Mutex<Inner<K>>,
    ready: watch::Sender<bool>,
}

impl<K> Default for Cache<K> {
    fn default() -> Self {
        let inner = Inner {
            objects: HashMap::new(),
            by_owner: HashMap::new(),
            tombstones: VecDeque::new(),
            relist: None,
        };
        Cache { inner: Mutex::new(inner), ready: watch::Sender::new(false) }
    }
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Cache<K> {
    fn lock(&self) -> MutexGuard<'_, Inner<K>> {
        // Every change of the maps is complete before anything can panic: a poisoned lock holds good data.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the first full list is in.
    pub async fn wait_until_ready(&self) {
        // The sender lives in self, so this cannot fail.
        let _ = self.ready.subscribe().wait_for(|ready| *ready).await;
    }

    /// The object of this name. An empty namespace for objects without.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        let key = (namespace.to_owned(), name.to_owned());
        self.lock().objects.get(&key).map(|e| Arc::clone(&e.object))
    }

    /// All objects with the label of this cluster, in order of their names.
    pub fn of(&self, owner: &Owner) -> Vec<Arc<K>> {
        let inner = self.lock();
        let names = inner.by_owner.get(owner).into_iter().flatten();
        names
            .filter_map(|name| inner.objects.get(&(owner.0.clone(), name.clone())))
            .map(|e| Arc::clone(&e.object))
            .collect()
    }

    /// All objects.
    pub fn all(&self) -> Vec<Arc<K>> {
        self.lock().objects.values().map(|e| Arc::clone(&e.object)).collect()
    }

    /// Takes in the answer of a write of this process.
    pub fn written(&self, object: &K) {
        let mut inner = self.lock();
        // An object can come back under its UID, if only its label had gone: then it is later than its end.
        let (uid, at) = (object.uid(), version_of(object));
        if inner.tombstones.iter().any(|(gone, ended_at)| uid.as_ref() == Some(gone) && at <= *ended_at) {
            return;
        }
        let stale = inner.objects.get(&key_of(object)).is_some_and(|known| newer(&*known.object, object));
        if !stale {
            inner.insert(kept(object), Some(Instant::now()));
        }
    }

    /// Takes in that this process had the object of this UID deleted, and it is gone.
    pub fn deleted(&self, namespace: &str, name: &str, uid: &str) {
        let mut inner = self.lock();
        let known = inner.objects.get(&(namespace.to_owned(), name.to_owned()));
        let known = known.map(|entry| Arc::clone(&entry.object));
        if let Some(known) = known.filter(|object| object.uid().as_deref() == Some(uid)) {
            inner.delete(&known);
        }
    }

    /// Takes in an event of the watch. True if an object changed (and its owner should look).
    pub fn take_in(&self, event: &Event<K>) -> bool {
        let mut inner = self.lock();
        match event {
            Event::Apply(object) => inner.apply(object),
            Event::Delete(object) => inner.delete(object),
            Event::Init => {
                inner.relist = Some((Instant::now(), HashMap::new()));
                false
            }
            Event::InitApply(object) => {
                if let Some((_, buffer)) = &mut inner.relist {
                    buffer.insert(key_of(object), kept(object));
                }
                false
            }
            Event::InitDone => {
                inner.replace_all();
                self.ready.send_replace(true);
                true
            }
        }
    }
}

/// What is kept of an object: all but the list of fields of each of its managers, which is more than everything else and which nobody reads;
/// of a pod's spec its node, as containers and volumes would be most of what a cluster takes here.
pub fn kept<K: Resource<DynamicType = ()> + Clone + 'static>(object: &K) -> Arc<K> {
    let mut object = object.clone();
    for manager in object.meta_mut().managed_fields.iter_mut().flatten() {
        manager.fields_v1 = None;
    }
    if let Some(pod) = (&mut object as &mut dyn Any).downcast_mut::<Pod>() {
        let node_name = pod.spec.take().and_then(|spec| spec.node_name);
        pod.spec = Some(PodSpec { node_name, ..PodSpec::default() });
    }
    Arc::new(object)
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Inner<K> {
    fn apply(&mut self, object: &K) -> bool {
        let known = self.objects.get(&key_of(object));
        if known.is_some_and(|known| newer(&*known.object, object)) {
            return false;
        }
        self.insert(kept(object), None);
        true
    }

    fn delete(&mut self, object: &K) -> bool {
        if let Some(uid) = object.uid() {
            self.tombstones.push_back((uid, version_of(object)));
            if self.tombstones.len() > TOMBSTONES_MAX {
                self.tombstones.pop_front();
            }
        }
        let key = key_of(object);
        // Another object of the same name may have been written since; it has another UID.
        if self.objects.get(&key).is_some_and(|known| known.object.uid() == object.uid()) {
            self.remove(&key);
            return true;
        }
        false
    }

    /// After a full list: what is not in it is gone, unless this process wrote it after the list was asked for.
    fn replace_all(&mut self) {
        let Some((asked_at, mut listed)) = self.relist.take() else {
            return;
        };
        let gone: Vec<Key> = self
            .objects
            .iter()
            .filter(|(key, known)| {
                !listed.contains_key(*key) && known.written_at.is_none_or(|at| at < asked_at)
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            self.remove(&key);
        }
        for (_, object) in listed.drain() {
            self.apply(&object);
        }
    }

    fn insert(&mut self, object: Arc<K>, written_at: Option<Instant>) {
        let key = key_of(&*object);
        self.remove(&key);
        if let Some(owner) = owner_of(&*object) {
            self.by_owner.entry(owner).or_default().insert(key.1.clone());
        }
        self.objects.insert(key, Entry { object, written_at });
    }

    fn remove(&mut self, key: &Key) {
        let Some(old) = self.objects.remove(key) else {
            return;
        };
        let Some(owner) = owner_of(&*old.object) else {
            return;
        };
        if let Some(names) = self.by_owner.get_mut(&owner) {
            names.remove(&key.1);
            if names.is_empty() {
                self.by_owner.remove(&owner);
            }
        }
    }
}

fn key_of<K: Resource<DynamicType = ()>>(object: &K) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

/// The cluster that an object's labels name.
pub fn owner_of<K: Resource<DynamicType = ()>>(object: &K) -> Option<Owner> {
    let cluster = object.labels().get(super::CLUSTER_LABEL)?;
    Some((object.namespace()?, cluster.clone()))
}

/// True if `known` is a later version of the same object than `other`. A version that is no number is never held to be
/// newer, so that the watch prevails.
fn newer<K: Resource<DynamicType = ()>>(known: &K, other: &K) -> bool {
    match (version_of(known), version_of(other)) {
        (Some(known_version), Some(other_version)) => known_version > other_version,
        (Some(_) | None, _) => false,
    }
}

/// resourceVersions of one kind are comparable as numbers.
fn version_of<K: Resource<DynamicType = ()>>(object: &K) -> Option<u64> {
    object.resource_version()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::{
        api::core::v1::Pod,
        apimachinery::pkg::apis::meta::v1::{FieldsV1, ManagedFieldsEntry},
    };

    fn pod(name: &str, uid: &str, version: u64) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.namespace = Some("shop".into());
        pod.metadata.name = Some(name.into());
        pod.metadata.uid = Some(uid.into());
        pod.metadata.resource_version = Some(version.to_string());
        pod.metadata.labels = Some([(super::super::CLUSTER_LABEL.to_owned(), "orders".to_owned())].into());
        pod
    }

    fn shown(cache: &Cache<Pod>, name: &str) -> Option<String> {
        cache.get("shop", name).and_then(|p| p.resource_version())
    }

    #[test]
    fn a_watch_event_older_than_our_write_does_not_undo_it() {
        let cache = Cache::default();
        cache.written(&pod("a", "u1", 7));
        assert!(!cache.take_in(&Event::Apply(pod("a", "u1", 5))));
        assert_eq!(shown(&cache, "a").as_deref(), Some("7"));
        assert!(cache.take_in(&Event::Apply(pod("a", "u1", 8))));
        assert_eq!(shown(&cache, "a").as_deref(), Some("8"));
    }

    #[test]
    fn a_late_answer_does_not_bring_a_deleted_object_back() {
        let cache = Cache::default();
        cache.take_in(&Event::Apply(pod("a", "u1", 5)));
        cache.take_in(&Event::Delete(pod("a", "u1", 9)));
        cache.written(&pod("a", "u1", 7));
        assert_eq!(shown(&cache, "a"), None);
    }

    #[test]
    fn what_this_process_had_deleted_is_gone_at_once_but_never_its_namesake() {
        let cache = Cache::default();
        cache.take_in(&Event::Apply(pod("a", "u1", 5)));
        cache.deleted("shop", "a", "u0");
        assert_eq!(shown(&cache, "a").as_deref(), Some("5"), "another one was deleted");
        cache.deleted("shop", "a", "u1");
        assert_eq!(shown(&cache, "a"), None);
        assert!(!cache.take_in(&Event::Delete(pod("a", "u1", 9))), "the watch brings no news");
        cache.take_in(&Event::Apply(pod("a", "u2", 11)));
        assert_eq!(shown(&cache, "a").as_deref(), Some("11"));
    }

    #[test]
    fn an_object_that_had_only_lost_its_label_comes_back_with_our_write() {
        let cache = Cache::default();
        cache.take_in(&Event::Apply(pod("a", "u1", 5)));
        cache.take_in(&Event::Delete(pod("a", "u1", 9)));
        cache.written(&pod("a", "u1", 10));
        assert_eq!(shown(&cache, "a").as_deref(), Some("10"));
    }

    #[test]
    fn the_deletion_of_an_earlier_object_does_not_remove_its_namesake() {
        let cache = Cache::default();
        cache.take_in(&Event::Apply(pod("a", "u1", 5)));
        cache.written(&pod("a", "u2", 11));
        assert!(!cache.take_in(&Event::Delete(pod("a", "u1", 9))));
        assert_eq!(shown(&cache, "a").as_deref(), Some("11"));
    }

    #[test]
    fn a_relist_drops_what_is_gone_and_keeps_what_was_written_meanwhile() {
        let cache = Cache::default();
        cache.take_in(&Event::Apply(pod("gone", "u1", 5)));
        cache.take_in(&Event::Init);
        cache.take_in(&Event::InitApply(pod("kept", "u2", 6)));
        cache.written(&pod("new", "u3", 12));
        cache.take_in(&Event::InitDone);
        let names: Vec<String> =
            cache.of(&("shop".into(), "orders".into())).iter().map(|p| p.name_any()).collect();
        assert_eq!(names, ["kept", "new"]);
    }

    #[test]
    fn of_managers_it_is_kept_who_and_when_and_not_what() {
        let mut object = pod("a", "u1", 7);
        let mut manager = ManagedFieldsEntry { manager: Some("kubectl".into()), ..Default::default() };
        manager.fields_v1 = Some(FieldsV1(serde_json::json!({ "f:spec": {} })));
        object.metadata.managed_fields = Some(vec![manager]);
        let kept = kept(&object);
        let [manager] = kept.managed_fields() else { panic!("one manager") };
        assert_eq!((manager.manager.as_deref(), &manager.fields_v1), (Some("kubectl"), &None));
    }

    #[test]
    fn an_object_without_the_label_belongs_to_nobody() {
        let mut lone = pod("a", "u1", 5);
        lone.metadata.labels = None;
        let cache = Cache::default();
        cache.take_in(&Event::Apply(lone));
        assert!(cache.of(&("shop".into(), "orders".into())).is_empty());
        assert!(cache.get("shop", "a").is_some());
    }
}

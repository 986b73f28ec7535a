//! Objects in memory, with the faults of an API server: for tests and simulations.

use super::objects::{Body, Object, Objects, ObjectsError};
use async_trait::async_trait;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What happens to the next write (create, replace or delete).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectsFault {
    /// A timeout; the write is lost.
    TimeoutBeforeCommit,
    /// A timeout; the write was made.
    TimeoutAfterCommit,
    /// A timeout; the write arrives when [`MemoryObjects::deliver_late`] is called.
    TimeoutLateCommit,
    /// Someone touches the object's metadata just before: its version changes, its text does not.
    MetadataTouched,
    /// Refused for certain.
    Unavailable,
}

#[derive(Clone)]
enum Write {
    Create { name: String, body: Body },
    Replace { name: String, version: String, body: Body },
    Delete { name: String },
}

impl Write {
    fn name(&self) -> &str {
        match self {
            Write::Create { name, body: _ }
            | Write::Replace { name, version: _, body: _ }
            | Write::Delete { name } => name,
        }
    }
}

#[derive(Default)]
struct Inner {
    objects: BTreeMap<String, Object>,
    version: u64,
    faults: VecDeque<ObjectsFault>,
    skip: usize,
    late: Vec<Write>,
    writes: usize,
}

impl Inner {
    fn next_version(&mut self) -> String {
        self.version += 1;
        self.version.to_string()
    }

    fn commit(&mut self, write: Write) -> Result<String, ObjectsError> {
        match write {
            Write::Create { name, body } => {
                if self.objects.contains_key(&name) {
                    return Err(ObjectsError::AlreadyExists);
                }
                let version = self.next_version();
                self.objects.insert(name, Object { body, version: version.clone() });
                Ok(version)
            }
            Write::Replace { name, version, body } => {
                let next = self.next_version();
                let object = self.objects.get_mut(&name).ok_or(ObjectsError::NotFound)?;
                if object.version != version {
                    return Err(ObjectsError::Conflict);
                }
                *object = Object { body, version: next.clone() };
                Ok(next)
            }
            Write::Delete { name } => {
                self.objects.remove(&name).map(|o| o.version).ok_or(ObjectsError::NotFound)
            }
        }
    }

    fn write(&mut self, write: Write) -> Result<String, ObjectsError> {
        self.writes += 1;
        let timeout = || ObjectsError::Ambiguous("injected timeout".to_owned());
        if self.skip > 0 {
            self.skip -= 1;
            return self.commit(write);
        }
        match self.faults.pop_front() {
            None => self.commit(write),
            Some(ObjectsFault::TimeoutBeforeCommit) => Err(timeout()),
            Some(ObjectsFault::TimeoutAfterCommit) => self.commit(write).and(Err(timeout())),
            Some(ObjectsFault::TimeoutLateCommit) => {
                self.late.push(write);
                Err(timeout())
            }
            Some(ObjectsFault::MetadataTouched) => {
                let version = self.next_version();
                if let Some(object) = self.objects.get_mut(write.name()) {
                    object.version = version;
                }
                self.commit(write)
            }
            Some(ObjectsFault::Unavailable) => Err(ObjectsError::Unavailable("injected".to_owned())),
        }
    }
}

/// The store.
#[derive(Default)]
pub struct MemoryObjects {
    inner: Mutex<Inner>,
}

impl MemoryObjects {
    /// An empty store.
    pub fn new() -> MemoryObjects {
        MemoryObjects::default()
    }

    /// Queues a fault; each meets one write.
    pub fn inject(&self, fault: ObjectsFault) {
        self.lock().faults.push_back(fault);
    }

    /// Lets this many writes pass before queued faults begin.
    pub fn inject_after(&self, writes: usize, fault: ObjectsFault) {
        let mut inner = self.lock();
        inner.skip = writes;
        inner.faults.push_back(fault);
    }

    /// Forgets the faults that are still queued.
    pub fn clear_faults(&self) {
        let mut inner = self.lock();
        inner.faults.clear();
        inner.skip = 0;
    }

    /// Lets late writes arrive. Returns how many were still accepted.
    pub fn deliver_late(&self) -> usize {
        let mut inner = self.lock();
        let late = std::mem::take(&mut inner.late);
        late.into_iter().filter_map(|write| inner.commit(write).ok()).count()
    }

    /// Writes that arrived, accepted or not.
    pub fn writes(&self) -> usize {
        self.lock().writes
    }

    /// Everything there is: what a person with kubectl can do, tests can do.
    pub fn edit(&self, change: impl FnOnce(&mut BTreeMap<String, Object>)) {
        change(&mut self.lock().objects);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Objects for MemoryObjects {
    async fn get(&self, name: &str) -> Result<Option<Object>, ObjectsError> {
        Ok(self.lock().objects.get(name).cloned())
    }

    async fn create(&self, name: &str, body: &Body) -> Result<String, ObjectsError> {
        self.lock().write(Write::Create { name: name.to_owned(), body: body.clone() })
    }

    async fn replace(&self, name: &str, version: &str, body: &Body) -> Result<String, ObjectsError> {
        let (name, version, body) = (name.to_owned(), version.to_owned(), body.clone());
        self.lock().write(Write::Replace { name, version, body })
    }

    async fn delete(&self, name: &str) -> Result<(), ObjectsError> {
        self.lock().write(Write::Delete { name: name.to_owned() }).map(|_version| ())
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, ObjectsError> {
        Ok(self.lock().objects.keys().filter(|name| name.starts_with(prefix)).cloned().collect())
    }
}

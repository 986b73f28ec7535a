//! A stream is taken out of the store, at a person's word or because its cluster is long gone. At a person's word its
//! objects are kept under other names: the cause of a damage may be asked for. What is only a copy is not kept.

use super::{
    names,
    objects::{Object, ObjectsError},
    store::{Store, unreachable_store},
};
use crate::{backend::BackendError, record::StreamId};

/// What becomes of the objects.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Remains {
    Kept,
    Dropped,
}

impl Store {
    /// The head goes last: until then what is left is damaged, and nobody takes it for a new stream.
    pub async fn forget(&self, stream: &StreamId, remains: Remains) -> Result<(), BackendError> {
        let head = names::head(stream);
        let listed = self.objects.list(&names::prefix(stream)).await.map_err(unreachable_store)?;
        let parts = listed.into_iter().filter(|name| names::part(stream, name).is_some());
        for name in parts.chain([head]) {
            let found = self.objects.get(&name).await.map_err(unreachable_store)?;
            let Some(Object { body, version }) = found else { continue };
            if remains == Remains::Kept {
                match self.objects.create(&names::aside(stream, &name, &version), &body).await {
                    Ok(_) | Err(ObjectsError::AlreadyExists) => {}
                    Err(e) => return Err(unreachable_store(e)),
                }
            }
            self.delete(&name).await?;
        }
        self.unknow(stream);
        Ok(())
    }

    /// Another object takes the head's place until the parts are gone: what a crash leaves is no stream, and is found again.
    pub async fn remove(&self, stream: &StreamId) -> Result<(), BackendError> {
        let (head, mark) = (names::head(stream), names::removed(stream));
        if let Some(Object { body, version: _ }) = self.objects.get(&head).await.map_err(unreachable_store)? {
            match self.objects.create(&mark, &body).await {
                Ok(_) | Err(ObjectsError::AlreadyExists) => self.delete(&head).await?,
                Err(e) => return Err(unreachable_store(e)),
            }
        }
        let listed = self.objects.list(&names::prefix(stream)).await.map_err(unreachable_store)?;
        for name in listed.iter().filter(|name| names::part(stream, name).is_some()) {
            self.delete(name).await?;
        }
        self.delete(&mark).await?;
        self.unknow(stream);
        Ok(())
    }

    async fn delete(&self, name: &str) -> Result<(), BackendError> {
        match self.objects.delete(name).await {
            Ok(()) | Err(ObjectsError::NotFound) => Ok(()),
            Err(e) => Err(unreachable_store(e)),
        }
    }
}

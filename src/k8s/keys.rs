//! Secrets of the operator's own namespace: the keys of its certificate authorities. By name only, like every Secret.

use super::{Error, bounded};
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};

/// The Secrets of one namespace that hold keys.
#[derive(Clone)]
pub struct KeyStore {
    api: Api<Secret>,
}

impl KeyStore {
    /// Those of `namespace`.
    pub fn new(client: Client, namespace: &str) -> Self {
        KeyStore { api: Api::namespaced(client, namespace) }
    }

    /// What is there.
    ///
    /// # Errors
    /// As [`bounded`].
    pub async fn get(&self, name: &str) -> Result<Option<Secret>, Error> {
        bounded(&format!("get Secret/{name}"), self.api.get_opt(name)).await
    }

    /// Creates it.
    ///
    /// # Errors
    /// [`Error::Conflict`] if someone else was first; else as [`bounded`].
    pub async fn create(&self, secret: &Secret) -> Result<Secret, Error> {
        let params = PostParams { dry_run: false, field_manager: Some(super::FIELD_MANAGER.to_owned()) };
        bounded(&format!("create Secret/{}", secret.name_any()), self.api.create(&params, secret)).await
    }

    /// Gives it the contents of `secret`, if it still has the resourceVersion that `secret` carries.
    ///
    /// # Errors
    /// [`Error::Conflict`] if someone else was first; [`Error::Malformed`] without a resourceVersion; else as [`bounded`].
    pub async fn replace(&self, secret: &Secret) -> Result<Secret, Error> {
        let name = secret.name_any();
        let what = format!("patch Secret/{name}");
        if secret.resource_version().is_none() {
            return Err(Error::Malformed { what, problem: "no resourceVersion to compare with" });
        }
        let params =
            PatchParams { field_manager: Some(super::FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        bounded(&what, self.api.patch(&name, &params, &Patch::Merge(secret))).await
    }

    /// Deletes it, if it is there.
    ///
    /// # Errors
    /// As [`bounded`].
    pub async fn delete(&self, name: &str) -> Result<(), Error> {
        match bounded(&format!("delete Secret/{name}"), self.api.delete(name, &DeleteParams::default())).await
        {
            Ok(_answer) => Ok(()),
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }
}

//! Reading and writing one coordination.k8s.io Lease, always against the version that was read.

use super::{Error, bounded};
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client, ResourceExt, api::PostParams};

/// The Lease of the operator's installation.
#[derive(Clone)]
pub struct LeaseStore {
    api: Api<Lease>,
    name: String,
}

impl LeaseStore {
    /// The Lease `name` in `namespace`.
    pub fn new(client: Client, namespace: &str, name: &str) -> Self {
        LeaseStore { api: Api::namespaced(client, namespace), name: name.to_owned() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is there now.
    ///
    /// # Errors
    /// As [`bounded`].
    pub async fn get(&self) -> Result<Option<Lease>, Error> {
        bounded(&format!("get Lease/{}", self.name), self.api.get_opt(&self.name)).await
    }

    /// Creates it.
    ///
    /// # Errors
    /// [`Error::Conflict`] if someone else was first; else as [`bounded`].
    pub async fn create(&self, lease: &Lease) -> Result<Lease, Error> {
        bounded(&format!("create Lease/{}", self.name), self.api.create(&post(), lease)).await
    }

    /// Replaces it, if it still has the resourceVersion that `lease` carries.
    ///
    /// # Errors
    /// [`Error::Conflict`] if someone else was first; [`Error::Malformed`] without a resourceVersion; else as [`bounded`].
    pub async fn replace(&self, lease: &Lease) -> Result<Lease, Error> {
        let what = format!("replace Lease/{}", self.name);
        if lease.resource_version().is_none() {
            return Err(Error::Malformed { what, problem: "no resourceVersion to compare with" });
        }
        bounded(&what, self.api.replace(&self.name, &post(), lease)).await
    }
}

fn post() -> PostParams {
    PostParams { dry_run: false, field_manager: Some(super::FIELD_MANAGER.to_owned()) }
}

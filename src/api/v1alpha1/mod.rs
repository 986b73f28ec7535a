//! Version v1alpha1 of the API group `valkeeper.io`: one file per kind.

mod valkey_cluster;

pub use valkey_cluster::*;

/// The API group.
pub const GROUP: &str = "valkeeper.io";

//! The user's side: custom resources as they are written, what they mean, and the manifests generated from them.

pub mod crd;
pub mod parse;
pub mod v1alpha1;

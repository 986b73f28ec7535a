//! The user's side: custom resources as they are written, what they mean, and the manifests generated from them.

pub mod crd;
pub mod parse;
pub mod quantity;
pub mod v1alpha1;

pub use parse::{Defaults, Invalid, Parsed, changed, first, parse, parse_all};

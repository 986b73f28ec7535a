//! The imperative shell of Valkeeper: it observes, records, executes and publishes what the pure core decides.

pub mod api;
pub mod k8s;
pub mod objects;
pub mod valkey;

//! The imperative shell of Valkeeper: it observes, records, executes and publishes what the pure core decides.
//!
//! - the driver: [`run`], [`reconcile`], [`observe`], [`execute`], [`publish`]
//! - its tools: [`valkey`] and [`k8s`] (the only homes of `redis` and of raw `Api<>`), [`objects`] and [`api`] (pure)
//! - the process: [`args`], [`lease`], [`health`]

pub mod api;
pub mod args;
pub mod health;
pub mod k8s;
pub mod lease;
pub mod objects;
pub mod valkey;

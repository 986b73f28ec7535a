//! The imperative shell of Valkeeper: it observes, records, executes and publishes what the pure core decides.
//!
//! - the driver: [`reconcile`], with [`claim`], [`observe`], [`execute`] and [`command`], [`publish`]; one task's things in
//!   [`cluster`]
//! - its journal: [`witness`] (what is known of it outside), [`keeping`] (how much of it stays, and where the rest goes),
//!   [`mirror`] (its local copy)
//! - its tools: [`links`], [`agents`], [`pods`], [`owned`] and [`vault`] over [`valkey`] and [`k8s`] (the only homes of `redis` and
//!   of raw `Api<>`), [`objects`], [`pki`] and [`api`] (pure)
//! - the process: [`run`], [`args`], [`lease`], [`health`], [`clock`]

pub mod agents;
pub mod api;
pub mod archive;
pub mod args;
pub mod claim;
pub mod clock;
pub mod cluster;
pub mod command;
pub mod execute;
pub mod health;
pub mod k8s;
pub mod keeping;
pub mod lease;
pub mod left;
pub mod links;
pub mod mirror;
pub mod objects;
pub mod observe;
pub mod owned;
pub mod pki;
pub mod pods;
pub mod publish;
pub mod reconcile;
pub mod run;
pub mod valkey;
pub mod vault;
pub mod witness;

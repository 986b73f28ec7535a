//! Valkeeper's pure core. Three headings, read from top to bottom; data never imports rules or readers.
//!
//! - **data**: [`ids`], [`slots`], [`spec`], [`weights`], [`observation`], [`effect`], [`decision`], [`operation`], [`event`], [`state`], [`words`]
//! - **rules**: [`agent`], [`config`], [`exports`], [`info`], [`nodes`], [`retry`], [`turn`], [`decide`], [`steps`], [`topology`]
//! - **readers**: [`projection`], [`invariant`], `sim` (feature)

// data
pub mod decision;
pub mod effect;
pub mod event;
pub mod ids;
pub mod observation;
pub mod operation;
pub mod slots;
pub mod spec;
pub mod state;
pub mod weights;
pub mod words;

// rules
pub mod agent;
pub mod config;
pub mod decide;
pub mod exports;
pub mod info;
pub mod nodes;
pub mod retry;
pub mod steps;
pub mod topology;
pub mod turn;

// readers
pub mod invariant;
pub mod projection;
#[cfg(feature = "sim")]
pub mod sim;

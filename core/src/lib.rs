//! Valkeeper's pure core. Three headings, read from top to bottom; data never imports rules or readers.
//!
//! - **data**: [`ids`], [`spec`], [`observation`], [`effect`], [`decision`], [`event`], [`state`]

// data
pub mod decision;
pub mod effect;
pub mod event;
pub mod ids;
pub mod observation;
pub mod spec;
pub mod state;

//! Readers of state for people: nothing here decides.

pub mod reason;
pub mod status;

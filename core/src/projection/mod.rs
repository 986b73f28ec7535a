//! Readers of state for people: nothing here decides.

mod bus;
pub mod reason;
pub mod status;

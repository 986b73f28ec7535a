//! `audit`: reports of whole operations, from the record that opened them to the one that closed them.

pub mod failover;
pub mod reshard;

//! PID 1 of a Valkey member, and what it shares with the operator: the contract ([`proto`], [`wire`]) and who may speak
//! to whom ([`tls`], [`link`]), how many at a time ([`limits`]), and what anybody may read ([`pages`]).

pub mod limits;
pub mod link;
pub mod pages;
pub mod tls;
pub mod wire;

/// The contract, generated from `proto/valkeeper/agent/v1/agent.proto`.
pub mod proto {
    #![allow(
        missing_docs,
        clippy::all,
        clippy::too_many_lines,
        reason = "generated; documented in the contract"
    )]
    tonic::include_proto!("valkeeper.agent.v1");
}

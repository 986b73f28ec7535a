//! The operator's side of the contract with agents: what they say is kept on a [`Board`] for each cluster, brought by their
//! own news ([`news`]) or by asking ([`AgentLink`]); what is told to them goes through the same link, with the writer epoch.

mod board;
mod call;
mod link;
pub mod news;
mod tunnel;

pub use board::{Board, EPOCH_MAX, Registry, Seat};
pub use call::{CallError, Endpoint, Paused};
pub use link::{AgentLink, AgentLinks, Dial, Place};
pub use tunnel::Tunnel;

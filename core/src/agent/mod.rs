//! What the agent in a member decides: whom it obeys ([`ledger`]), what a restarted server becomes ([`gate`]) and how long
//! a primary may go on unconfirmed ([`isolation`]). Pure like everything here: the agent's program and the simulator
//! call the same rules. `docs/BOOT-GATE.md` is the table of them.

pub mod gate;
pub mod isolation;
pub mod ledger;

pub use gate::{Data, HISTORY_NONE, History, PeerAnswer, PeerServer, Verdict};
pub use isolation::{Answer, Confirmations};
pub use ledger::{Brief, Ledger, Refusal};

//! `src/valkey` and `src/agents` against real valkey-servers and their agents on loopback: no mocks. Binaries come from `VALKEY_BIN_DIR`, or from
//! `tests/cluster/cluster valkey-bin`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "the helpers of a test are a test: clippy only sees the functions marked so"
)]

mod agent;
mod cluster;
mod commands;
mod death;
mod gate;
mod handover;
mod login;
mod look;
mod news;
mod nodes;
mod older;
mod proxy;
mod server;
mod settings;
mod weights;

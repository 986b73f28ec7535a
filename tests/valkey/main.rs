//! `src/valkey` against real valkey-servers on loopback: no mocks. Binaries come from `VALKEY_BIN_DIR`, or from
//! `tests/cluster/cluster valkey-bin`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "the helpers of a test are a test: clippy only sees the functions marked so"
)]

mod death;
mod effects;
mod fence;
mod gate;
mod look;
mod proxy;
mod server;

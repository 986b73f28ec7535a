//! The crash battery of the local store: what kills, disks and people can do to it, and that nothing acknowledged is lost.
//!
//! A child process (this program itself; where a system call is to fail, with `tests/battery/fail_at.c` in it) works and prints what was
//! acknowledged; then its store is opened here. `cargo test` does a part of each; `make battery` sets VALKEEPER_BATTERY and
//! does all, and prints a table of faults, rounds and failures.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a failed step is a failed test

#[path = "../common/mod.rs"]
mod common;

mod check;
mod child;
mod damage;
mod directory;
mod disk;
mod kills;
mod large;
mod power;

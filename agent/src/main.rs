//! `valkeeper-agent`: PID 1 of a Valkey member. `run` starts the server at the boot gate and looks after it; `install`
//! copies the program to where a member's container finds it.

mod args;
mod boot;
mod confirm;
mod election;
mod gate;
mod handing;
mod http;
mod identity;
mod install;
mod leave;
mod local;
mod look;
mod memory;
mod metrics;
mod news;
mod peers;
mod port;
mod relay;
mod run;
mod service;
mod settings;
mod shared;
mod supervise;
mod users;

use args::{Args, Command};
use clap::Parser;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Threads: one for what must be on time, one for a disk that takes its time.
const THREADS: usize = 2;

/// A task that is gone must not leave an agent that looks alive: the container starts anew, its server at the gate.
fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let at = panic.location().map(ToString::to_string);
        tracing::error!(at, "a bug: the agent ends");
        std::process::abort();
    }));
}

fn main() -> anyhow::Result<ExitCode> {
    match Args::parse().command {
        Command::Install { dir } => {
            install::install(&dir)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Run(args) => {
            let filter = EnvFilter::try_from_env("VALKEEPER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
            tracing_subscriber::fmt().with_env_filter(filter).json().flatten_event(true).init();
            end_on_panic();
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
            let code = runtime.block_on(run::run(*args))?;
            // What still runs is of no use any more: the server is gone.
            runtime.shutdown_background();
            Ok(ExitCode::from(code))
        }
    }
}

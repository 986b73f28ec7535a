//! The operator's program: reads the command line and runs it.

use anyhow::Context;
use clap::Parser;
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;
use valkeeper::{
    api,
    args::{Args, Command, LogFormat, RunArgs},
    run,
};

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Crd => {
            print!("{}", api::crd::crd_yaml());
            Ok(())
        }
        Command::Run(args) => {
            log(args.log_format);
            let runtime = tokio::runtime::Runtime::new().context("the runtime does not start")?;
            runtime.block_on(operate(*args))
        }
    }
}

async fn operate(args: RunArgs) -> anyhow::Result<()> {
    // The pod's name is the host's name unless the manifest says otherwise.
    let instance = ["POD_NAME", "HOSTNAME"].into_iter().find_map(|key| std::env::var(key).ok());
    let instance = instance.unwrap_or_else(|| "valkeeper".to_owned());
    run::run(args, instance, std::env::var("POD_UID").ok(), stop_signal()?).await?;
    Ok(())
}

/// Resolves at SIGTERM (kubelet) or SIGINT (a person).
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be caught")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be caught")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("info,kube_client=off,tower_http=off"));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
}

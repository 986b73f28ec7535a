//! From the creation of the resource to Ready, and how much of it pods need to start.

use crate::{spec, subject};
use anyhow::Context;
use kube::Client;

/// Shards of the clusters that are made, each with one replica.
const SHARDS: [usize; 2] = [3, 6];
/// Replicas of each shard.
const REPLICAS: usize = 1;

/// Makes each, and removes it.
pub async fn run(client: &Client) -> anyhow::Result<()> {
    println!("From the creation of the resource, seconds");
    println!("  {:<24} {:>18} {:>8} {:>22}", "", "last pod Running", "Ready", "Ready after the pods");
    for shards in SHARDS {
        let subject = subject(client, &format!("made-{shards}"));
        let pods = shards * (REPLICAS + 1);
        subject.apply(&spec(shards, REPLICAS)).await?;
        let both = tokio::try_join!(subject.all_running(pods), subject.ready());
        let (running, ready) = both.with_context(|| format!("{shards}x{REPLICAS}"))?;
        let (running, ready) = (running.as_secs_f64(), ready.as_secs_f64());
        let name = format!("{shards}x{REPLICAS}, {pods} pods");
        println!("  {name:<24} {running:>18.1} {ready:>8.1} {:>22.1}", ready - running);
        subject.remove().await?;
    }
    Ok(())
}

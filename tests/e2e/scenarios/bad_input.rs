//! Input that cannot be used: refused at once by the API server where a rule can say so, else said in the status.

use super::{World, spec};
use crate::support::subject::PATIENCE;
use anyhow::{Context, bail};
use serde_json::{Value, json};

/// Refused sizes and shapes, an unknown directive, and the way back.
pub async fn refused_and_healed(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let refused: [(&str, Value, &str); 9] = [
        ("/auth", json!({ "passwordSecret": { "name": "my secret" } }), "passwordSecret.name"),
        ("/podLabels", json!({ "team": "a b" }), "podLabels.team"),
        ("/scheduling", json!({ "priorityClassName": "High Priority" }), "priorityClassName"),
        ("/persistence/size", json!("-1Gi"), "positive quantity"),
        ("/replicas", json!(-1), "replicas"),
        ("/shards", json!(0), "shards"),
        ("/failover", json!({ "detectionWindowMs": -5 }), "detectionWindowMs"),
        ("/topology", json!("Sentinel"), "not available yet"),
        ("/profile", json!("Cache"), "cannot change"),
    ];
    for (field, value, expected) in &refused {
        let mut wanted = spec();
        let (parent, key) = field.rsplit_once('/').context("no field")?;
        let parent = wanted.pointer_mut(parent).context("no parent")?;
        parent[key] = value.clone();
        match subject.apply(&wanted).await {
            Ok(()) => bail!("{field} = {value} was accepted"),
            Err(error) if format!("{error:#}").contains(expected) => {}
            Err(error) => bail!("{field} = {value} was refused without {expected:?}: {error:#}"),
        }
    }
    let mut wanted = spec();
    wanted["config"] = json!({ "maxmemory-polizy": "allkeys-lru" });
    let message = stalled(world, &wanted).await?;
    for part in ["spec.config.maxmemory-polizy", "no directive of Valkey"] {
        if !message.contains(part) {
            bail!("the message lacks {part:?}: {message}");
        }
    }
    wanted["config"] = json!({ "maxmemory-policy": "everything" });
    let message = stalled(world, &wanted).await?;
    for part in ["spec.config.maxmemory-policy", "everything", "allkeys-lru"] {
        if !message.contains(part) {
            bail!("the message lacks {part:?}: {message}");
        }
    }
    // Nothing was changed meanwhile, and a primary serves.
    subject.primary().await?;
    subject.apply(&spec()).await?;
    let healed = subject.ready().await?;
    subject.condition("Stalled", "False", PATIENCE).await?;
    Ok(format!(
        "{} refused by the API server, 2 by the operator, healed in {:.1} s",
        refused.len(),
        healed.as_secs_f64()
    ))
}

/// Applies a spec and waits until the operator says why it cannot be used.
async fn stalled(world: &World, wanted: &Value) -> anyhow::Result<String> {
    world.subject.apply(wanted).await?;
    let (condition, _) = world.subject.condition("Stalled", "True", PATIENCE).await?;
    Ok(condition.message)
}

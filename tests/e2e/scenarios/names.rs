//! Names that two resources, or a resource and somebody else, both want.

use super::{World, remove_with_claims};
use crate::support::subject::{PATIENCE, Subject};
use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Service;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, PostParams},
};
use serde_json::json;

/// Another resource in the same namespace.
const OTHER: &str = "payments";

/// A name that ends like a Service's is refused. Of a Service that somebody else has under a name that a new resource needs nothing is
/// changed, the status says whose it is, and the resource becomes Ready once that is gone.
pub async fn collide(world: &World) -> anyhow::Result<String> {
    let services: Api<Service> = Api::namespaced(world.client.clone(), &world.subject.namespace);
    let write_service = || async { services.get(&format!("{}-primary", world.subject.name)).await };
    let before = write_service().await?.uid();
    let named = |name: String| Subject { name, ..world.subject.clone() };
    for ending in ["primary", "primary-3", "replicas", "headless", "node-0-1"] {
        let twin = named(format!("{}-{ending}", world.subject.name));
        match twin.apply(&json!({ "topology": "Standalone" })).await {
            Ok(()) => bail!("{} was accepted", twin.name),
            Err(error) if format!("{error:#}").contains("metadata.name must not end in -primary") => {}
            Err(error) => bail!("{} was refused without saying why: {error:#}", twin.name),
        }
    }
    let other = named(OTHER.to_owned());
    remove_with_claims(&other).await?;
    let taken = foreign(&services).await?;
    other.apply(&json!({ "topology": "Standalone", "resources": super::spec()["resources"] })).await?;
    let (stalled, said_after) = other.condition("Stalled", "True", PATIENCE).await?;
    let told = format!("Service/{} belongs to nobody", taken.name_any());
    if stalled.reason != "NameTaken" || !stalled.message.contains(&told) {
        bail!("Stalled says {}: {}", stalled.reason, stalled.message);
    }
    if !other.members().await?.is_empty() {
        bail!("pods were made beside a Service that is somebody else's");
    }
    let now = services.get(&taken.name_any()).await?;
    if (now.uid(), now.resource_version()) != (taken.uid(), taken.resource_version()) {
        bail!("the Service was changed: {now:?}");
    }
    services.delete(&taken.name_any(), &DeleteParams::default()).await?;
    let ready_after = other.ready().await?;
    remove_with_claims(&other).await?;
    if write_service().await?.uid() != before {
        bail!("the write Service of {} is another one", world.subject.name);
    }
    Ok(format!(
        "5 names refused; said after {:.1} s whose the Service is, Ready {:.1} s after it was gone",
        said_after.as_secs_f64(),
        ready_after.as_secs_f64()
    ))
}

/// Somebody's Service with the name of the other resource's write Service.
async fn foreign(services: &Api<Service>) -> anyhow::Result<Service> {
    let name = format!("{OTHER}-primary");
    // An earlier run may have ended half way.
    match services.delete(&name, &DeleteParams::default()).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        Err(error) => return Err(error).context("the Service of an earlier run"),
    }
    let service = json!({
        "metadata": { "name": name },
        "spec": { "selector": { "app": "theirs" }, "ports": [{ "port": 80 }] },
    });
    Ok(services.create(&PostParams::default(), &serde_json::from_value(service)?).await?)
}

//! A way into a cluster whose network is out of reach: a pod with a shell, in which connections begin.

use super::{MANAGER, resp::Reach, wait::until};
use anyhow::bail;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use std::time::Duration;

/// Bound on the start of the pod: its image may have to be pulled.
const PATIENCE: Duration = Duration::from_secs(120);

/// A pod to connect from, on a cluster whose network is out of reach.
pub async fn open(client: &Client, namespace: &str) -> anyhow::Result<Reach> {
    let name = "valkeeper-tunnel";
    let image = std::env::var("VALKEEPER_VALKEY_IMAGE")
        .unwrap_or_else(|_| valkeeper::api::parse::IMAGE_DEFAULT.to_owned());
    let secure = json!({
        "allowPrivilegeEscalation": false,
        "capabilities": { "drop": ["ALL"] },
        "runAsNonRoot": true,
        "runAsUser": 999,
        "seccompProfile": { "type": "RuntimeDefault" },
    });
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace },
        "spec": {
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "shell", "image": image, "command": ["sh", "-c", "sleep 86400"], "securityContext": secure,
            }],
        },
    });
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&pod)).await?;
    until("the pod to connect from", PATIENCE, || async {
        let phase = api.get(name).await?.status.and_then(|status| status.phase).unwrap_or_default();
        if phase == "Running" { Ok(()) } else { bail!("it is {phase}") }
    })
    .await?;
    Ok(Reach::Through { namespace: namespace.to_owned(), pod: name.to_owned() })
}

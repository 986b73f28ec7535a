//! The CustomResourceDefinition as it is installed: kube's derivation of the types, with what it cannot express
//! patched in. `valkeeper crd` prints it; `crds/` and the chart hold copies that a test compares with it.

use super::v1alpha1::ValkeyCluster;
use kube::CustomResourceExt;
use serde_json::{Value, json};

/// Integer formats that the API server knows; it warns about others at each apply.
const FORMATS_KNOWN: [&str; 4] = ["int32", "int64", "double", "date-time"];

/// The CustomResourceDefinition of `ValkeyCluster`.
pub fn crd() -> Value {
    let mut crd = serde_json::to_value(ValkeyCluster::crd()).unwrap_or_default();
    tidy(&mut crd);
    // Uninstalling the chart must not delete the clusters.
    crd["metadata"]["annotations"] = json!({ "helm.sh/resource-policy": "keep" });
    if let Some(status) = crd.pointer_mut("/spec/versions/0/schema/openAPIV3Schema/properties/status") {
        // Without it a resource that the operator has not seen yet looks ready to kstatus and to `helm --wait`.
        status["default"] = json!({ "observedGeneration": -1 });
    }
    crd
}

/// The same as YAML. It is the text of `crds/valkeyclusters.yaml` and of the chart's copy.
pub fn crd_yaml() -> String {
    let body = serde_saphyr::to_string(&crd()).unwrap_or_default();
    format!("# Generated from src/api/v1alpha1 by `cargo crdgen`. Do not edit.\n{body}")
}

/// Drops formats that the API server does not know, and `nullable`: without it the server prunes a null, so that CEL's
/// `has()` means "the user has set it".
fn tidy(value: &mut Value) {
    match value {
        Value::Object(map) => {
            let typed = map.contains_key("type");
            let unknown = |f: &Value| f.as_str().is_some_and(|f| !FORMATS_KNOWN.contains(&f));
            if typed && map.get("format").is_some_and(unknown) {
                map.remove("format");
            }
            if map.get("nullable").is_some_and(Value::is_boolean) {
                map.remove("nullable");
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(list) => list.iter_mut().for_each(tidy),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEMA: &str = "/spec/versions/0/schema/openAPIV3Schema";

    #[test]
    fn a_resource_that_nobody_has_seen_does_not_look_ready() {
        let status = format!("{SCHEMA}/properties/status/default");
        assert_eq!(crd().pointer(&status), Some(&json!({ "observedGeneration": -1 })));
    }

    #[test]
    fn null_means_absent_and_every_format_is_known() {
        let text = crd().to_string();
        assert!(!text.contains("\"nullable\"") && !text.contains("uint"));
    }

    #[test]
    fn unavailable_topologies_are_refused_with_what_is_allowed() {
        let crd = crd();
        let rules =
            crd.pointer(&format!("{SCHEMA}/properties/spec/properties/topology/x-kubernetes-validations"));
        let rules = rules.and_then(Value::as_array).unwrap();
        let message = "topology Sentinel is not available yet; allowed: Standalone, Replication, Cluster";
        assert!(rules.iter().any(|r| r["message"] == message), "{rules:?}");
    }

    #[test]
    fn what_is_immutable_or_bounded_has_a_rule() {
        let crd = crd();
        let spec = crd.pointer(&format!("{SCHEMA}/properties/spec")).unwrap();
        for path in ["topology", "profile", "persistence", "persistence/properties/size"] {
            let rules = spec.pointer(&format!("/properties/{path}/x-kubernetes-validations"));
            let rules = rules.unwrap_or_else(|| panic!("{path}")).to_string();
            assert!(rules.contains("oldSelf"), "{path}");
        }
        let rules = spec.pointer("/x-kubernetes-validations").and_then(Value::as_array).unwrap();
        assert_eq!(rules.len(), 7);
        let of_shards = rules.iter().filter(|r| r["fieldPath"] == ".shards");
        assert_eq!(of_shards.filter(|r| r["rule"].to_string().contains("oldSelf.shards")).count(), 1);
        let balance = rules.iter().find(|r| r["fieldPath"] == ".balance").unwrap();
        assert_eq!(balance["rule"], "self.topology == 'Cluster' || self.balance == 'Slots'");
        // The rule reads it without asking whether it is there.
        assert_eq!(spec["properties"]["balance"]["default"], "Slots");
        let announce = rules.iter().find(|r| r["fieldPath"] == ".announce").unwrap();
        assert_eq!(announce["rule"], "self.topology == 'Cluster' || !has(self.announce)");
        assert!(spec["properties"]["announce"].get("default").is_none());
        assert_eq!(spec["properties"]["shards"]["maximum"].as_f64(), Some(16.0));
    }

    #[test]
    fn the_yaml_says_what_the_json_says() {
        let read: Value = serde_saphyr::from_str(&crd_yaml()).unwrap();
        let numbers = |v: &Value| v.to_string().replace(".0,", ",").replace(".0}", "}");
        assert_eq!(numbers(&read), numbers(&crd()));
    }
}

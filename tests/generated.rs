//! Generated files equal their generators, and what the chart says twice it says alike.

use std::{fs, path::PathBuf};
use valkeeper::api::{crd, parse};
use valkeeper_journal::record::{LEVEL_FIRST, LEVEL_MAX};

const REGENERATE: &str =
    "cargo crdgen > crds/valkeyclusters.yaml && cp crds/valkeyclusters.yaml charts/valkeeper/files/";

/// The text of a file of the repository; empty if it cannot be read, which equals nothing.
fn read(path: &str) -> String {
    fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap_or_default()
}

#[test]
fn the_crd_files_are_what_the_types_say() {
    for path in ["crds/valkeyclusters.yaml", "charts/valkeeper/files/valkeyclusters.yaml"] {
        assert!(
            read(path) == crd::crd_yaml(),
            "{path} is not what `valkeeper crd` prints; run: {REGENERATE}"
        );
    }
}

#[test]
fn the_chart_names_the_default_image_of_the_operator() {
    let line = format!("defaultImage: {}", parse::IMAGE_DEFAULT);
    assert!(read("charts/valkeeper/values.yaml").lines().any(|l| l == line), "values.yaml lacks {line:?}");
}

#[test]
fn the_chart_has_the_version_of_the_program() {
    let chart = read("charts/valkeeper/Chart.yaml");
    for key in ["version", "appVersion"] {
        let line = format!("{key}: {}", env!("CARGO_PKG_VERSION"));
        assert!(chart.lines().any(|l| l == line), "Chart.yaml lacks {line:?}");
    }
}

#[test]
fn every_value_of_the_chart_is_in_its_schema() {
    let schema: serde_json::Value =
        serde_json::from_str(&read("charts/valkeeper/values.schema.json")).unwrap();
    let values: serde_json::Value = serde_saphyr::from_str(&read("charts/valkeeper/values.yaml")).unwrap();
    for key in values.as_object().unwrap().keys() {
        assert!(schema["properties"].get(key).is_some(), "values.schema.json lacks {key}");
    }
}

#[test]
fn the_chart_knows_the_levels_that_the_operator_knows() {
    let schema: serde_json::Value =
        serde_json::from_str(&read("charts/valkeeper/values.schema.json")).unwrap();
    let level = &schema["properties"]["journalFinalize"];
    assert_eq!(
        (level["minimum"].as_u64(), level["maximum"].as_u64()),
        (Some(LEVEL_FIRST.into()), Some(LEVEL_MAX.into()))
    );
}

#[test]
fn the_operator_may_not_list_secrets_nor_run_commands_in_pods() {
    let rbac = read("charts/valkeeper/templates/rbac.yaml");
    let lines: Vec<&str> = rbac.lines().map(str::trim).collect();
    let of_secrets = lines.windows(2).filter(|pair| pair[0] == "resources: [secrets]");
    let verbs: Vec<&str> = of_secrets.map(|pair| pair[1]).collect();
    // Where clusters are, and in the operator's own namespace.
    assert_eq!(verbs, ["verbs: [get, create, patch, delete]"; 2]);
    assert!(!rbac.contains("pods/exec") && !rbac.contains('*'));
}

#[test]
fn the_operator_may_delete_where_clusters_are_only_pods_and_what_a_removed_shard_or_member_leaves() {
    let rbac = read("charts/valkeeper/templates/rbac.yaml");
    let lines: Vec<&str> = rbac.split("\n---").next().unwrap_or_default().lines().map(str::trim).collect();
    let deletes = lines.windows(2).filter(|pair| pair[1].starts_with("verbs:") && pair[1].contains("delete"));
    let resources: Vec<&str> = deletes.map(|pair| pair[0]).collect();
    let expected = ["[pods]", "[services]", "[secrets]", "[statefulsets]", "[poddisruptionbudgets]"];
    assert_eq!(resources, expected.map(|kinds| format!("resources: {kinds}")));
}

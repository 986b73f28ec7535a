//! Every refusal names the field, and every default is what the documentation of the field says.

use super::*;
use serde_json::{Value, json};

fn cluster(spec: Value, annotations: Value) -> api::ValkeyCluster {
    serde_json::from_value(json!({
        "apiVersion": "valkeeper.io/v1alpha1",
        "kind": "ValkeyCluster",
        "metadata": { "name": "orders", "namespace": "shop", "generation": 3, "annotations": annotations },
        "spec": spec,
    }))
    .unwrap()
}

fn parsed(spec: Value) -> Parsed {
    parse_all(&cluster(spec, json!({})), &Defaults::default()).unwrap()
}

fn refused(spec: Value) -> Invalid {
    parse(&cluster(spec, json!({}))).unwrap_err()
}

#[test]
fn a_short_spec_gets_the_documented_defaults() {
    let Parsed { desired, workload } = parsed(json!({ "topology": "Replication" }));
    assert_eq!((desired.generation, desired.shards, desired.replicas_per_shard), (3, 1, 2));
    assert_eq!(desired.profile, Profile::Durable);
    assert_eq!(
        desired.failover,
        FailoverPolicy { mode: FailoverMode::Automatic, detection_window_ms: 3000, isolation: Isolation::On }
    );
    assert_eq!(workload.image, IMAGE_DEFAULT);
    assert_eq!(workload.volume, Some(Volume { size: "1Gi".into(), class: None }));
    assert_eq!(workload.config.files, Files::RdbAof);
    assert_eq!((workload.config.version.major, workload.config.version.minor), (9, 1));
}

#[test]
fn a_spec_that_is_too_large_is_refused_as_a_whole() {
    let terms: Vec<Value> = (0..1_000)
        .map(|n| json!({ "matchExpressions": [{ "key": "zone", "operator": "In", "values": [format!("zone-{n:030}")] }] }))
        .collect();
    let affinity = json!({ "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": terms } } });
    let why =
        refused(json!({ "topology": "Replication", "scheduling": { "affinity": affinity } })).to_string();
    assert!(why.starts_with("spec") && why.contains("allowed: at most 65536 bytes as JSON"), "{why}");
}

#[test]
fn standalone_is_replication_without_replicas() {
    let standalone = parsed(json!({ "topology": "Standalone" })).desired;
    assert_eq!((standalone.topology, standalone.replicas_per_shard), (Topology::Replication, 0));
    assert_eq!(refused(json!({ "topology": "Standalone", "replicas": 1 })).field, "spec.replicas");
}

#[test]
fn a_valkey_cluster_has_three_shards_and_a_node_timeout_below_the_window() {
    let spec = |window: i64| json!({ "topology": "Cluster", "failover": { "detectionWindowMs": window } });
    let Parsed { desired, workload } = parsed(json!({ "topology": "Cluster" }));
    assert_eq!((desired.topology, desired.shards, desired.replicas_per_shard), (Topology::Cluster, 3, 2));
    assert_eq!(workload.config.node_timeout_ms, Some(2_000));
    assert_eq!(parsed(spec(2_500)).workload.config.node_timeout_ms, Some(1_500));
    let alone = parsed(json!({ "topology": "Cluster", "shards": 1, "replicas": 0 })).desired;
    assert_eq!((alone.shards, alone.replicas_per_shard), (1, 0));
    assert_eq!(parsed(json!({ "topology": "Replication" })).workload.config.node_timeout_ms, None);
    let tight = refused(spec(1_999));
    assert_eq!(tight.field, "spec.failover.detectionWindowMs");
    assert_eq!(tight.allowed, "allowed in topology Cluster: 2000 to 60000 milliseconds");
}

#[test]
fn the_shards_of_a_valkey_cluster_change_with_every_version_and_its_topology_never() {
    let of = |topology: &str, shards: u16, image: &str| {
        parsed(json!({ "topology": topology, "shards": shards, "replicas": 1, "image": image }))
    };
    let before = of("Cluster", 3, IMAGE_DEFAULT).desired;
    for (shards, image) in [(1, "v:9.0.0"), (2, "v:9.1.2"), (16, "v:10.0"), (3, "v:8.1.1"), (4, "v:8.0.1")] {
        assert_eq!(changed(&before, &of("Cluster", shards, image)), Ok(()), "{shards} {image}");
    }
    let other = of("Replication", 3, IMAGE_DEFAULT);
    assert_eq!(changed(&before, &other).unwrap_err().field, "spec.topology");
    assert_eq!(changed(&other.desired, &of("Cluster", 3, IMAGE_DEFAULT)).unwrap_err().field, "spec.topology");
    assert_eq!(changed(&other.desired, &of("Replication", 4, "v:8.1.1")), Ok(()));
}

#[test]
fn decisions_know_whether_servers_run_io_threads() {
    let of = |config| parsed(json!({ "topology": "Cluster", "config": config })).desired.io_threads;
    assert_eq!([of(json!({})), of(json!({ "io-threads": "1" }))], [IoThreads::Off; 2]);
    assert_eq!(of(json!({ "io-threads": "2" })), IoThreads::On);
}

#[test]
fn a_cache_has_no_volume_unless_asked_for() {
    let cache = parsed(json!({ "topology": "Replication", "profile": "Cache" })).workload;
    assert_eq!((cache.volume, cache.config.files), (None, Files::Nothing));
    let kept = json!({ "topology": "Replication", "profile": "Cache", "persistence": { "enabled": true } });
    let kept = parsed(kept).workload;
    assert_eq!((kept.volume.is_some(), kept.config.files), (true, Files::Rdb));
}

#[test]
fn what_cannot_be_used_is_refused_by_field() {
    let base = |key: &str, value: Value| {
        let mut spec = json!({ "topology": "Replication" });
        spec[key] = value;
        refused(spec).field
    };
    assert_eq!(base("topology", json!("Sentinel")), "spec.topology");
    assert_eq!(base("shards", json!(0)), "spec.shards");
    assert_eq!(base("shards", json!(17)), "spec.shards");
    assert_eq!(base("replicas", json!(6)), "spec.replicas");
    assert_eq!(base("persistence", json!({ "enabled": false })), "spec.persistence.enabled");
    assert_eq!(base("persistence", json!({ "size": "big" })), "spec.persistence.size");
    assert_eq!(base("failover", json!({ "detectionWindowMs": 10 })), "spec.failover.detectionWindowMs");
    assert_eq!(base("image", json!("valkey/valkey:7.2.9")), "spec.image");
    assert_eq!(base("image", json!("valkey/valkey:latest")), "spec.image");
    assert_eq!(base("image", json!("registry:5000/valkey")), "spec.image");
    assert_eq!(base("version", json!("7.2")), "spec.version");
    assert_eq!(base("podLabels", json!({ "valkeeper.io/role": "primary" })), "spec.podLabels");
    let tiny = json!({ "limits": { "memory": "32Mi" } });
    assert_eq!(base("resources", tiny), "spec.resources.limits.memory");
    let odd = json!({ "limits": { "memory": "lots" } });
    assert_eq!(base("resources", odd), "spec.resources.limits.memory");
    let upside_down = json!({ "limits": { "memory": "1Gi" }, "requests": { "memory": "2Gi" } });
    assert_eq!(base("resources", upside_down), "spec.resources.requests.memory");
    assert_eq!(base("config", json!({ "port": "1" })), "spec.config.port");
    assert_eq!(base("config", json!({ "maxmemry": "1" })), "spec.config.maxmemry");
    assert_eq!(base("config", json!({ "activedefrag": "on" })), "spec.config.activedefrag");
}

#[test]
fn an_image_without_a_readable_tag_needs_a_version() {
    let spec = json!({ "topology": "Replication", "image": "mine/valkey@sha256:00", "version": "8.1" });
    assert_eq!(parsed(spec).workload.config.version, ServerVersion { major: 8, minor: 1 });
    let spec = json!({ "topology": "Replication", "image": "registry:5000/mine/valkey:8.0.1-alpine" });
    assert_eq!(parsed(spec).workload.config.version, ServerVersion { major: 8, minor: 0 });
}

#[test]
fn a_directive_of_a_later_version_is_refused() {
    let spec = json!({ "topology": "Replication", "image": "v:8.0.1", "config": { "log-format": "logfmt" } });
    let invalid = refused(spec);
    assert_eq!(
        invalid.to_string(),
        "spec.config.log-format: \"logfmt\" cannot be used; Valkey 8.0 does not have it: since 8.1"
    );
}

#[test]
fn a_password_in_the_wrong_place_is_not_repeated() {
    let spec = json!({ "topology": "Replication", "config": { "requirepass": "hunter2" } });
    let text = refused(spec).to_string();
    assert!(text.contains("users and passwords are in Secrets") && !text.contains("hunter2"), "{text}");
}

#[test]
fn maxmemory_must_fit_into_the_limit() {
    let spec = json!({
        "topology": "Replication",
        "resources": { "limits": { "memory": "1Gi" } },
        "config": { "maxmemory": "2gb" },
    });
    assert_eq!(refused(spec).field, "spec.config.maxmemory");
}

#[test]
fn a_switchover_wish_is_read_with_and_without_shard_and_token() {
    let wish = |text: &str| {
        let annotations = json!({ "valkeeper.io/switchover": text });
        let desired = parse(&cluster(json!({ "topology": "Replication" }), annotations)).unwrap();
        (desired.switchover, desired.refused)
    };
    for (text, member) in
        [("2", "0-2"), ("0-1", "0-1"), ("1-2@monday", "1-2"), ("2@again", "0-2"), (" 2 ", "0-2")]
    {
        let (wish, refused) = wish(text);
        assert_eq!(refused, None);
        let wish = wish.unwrap();
        assert_eq!((wish.to.to_string(), wish.token.as_str()), (member.to_owned(), text.trim()), "{text}");
    }
    assert_eq!(wish(""), (None, None));
    for text in ["orders-0-1", "primary", "-1", "0-1-2", "@x"] {
        let (none, refused) = wish(text);
        assert_eq!(none, None, "{text}");
        let begins = format!("metadata.annotations[valkeeper.io/switchover]: \"{text}\" cannot be used; ");
        assert!(refused.unwrap().starts_with(&begins), "{text}");
    }
}

#[test]
fn nodes_name_each_other_by_hostname_unless_the_user_says_otherwise() {
    let of = |topology: &str, announce: &str| json!({ "topology": topology, "announce": announce });
    assert_eq!(parsed(json!({ "topology": "Cluster" })).workload.announce, api::Announce::Hostname);
    assert_eq!(parsed(of("Cluster", "Hostname")).workload.announce, api::Announce::Hostname);
    assert_eq!(parsed(of("Cluster", "Address")).workload.announce, api::Announce::Address);
    for topology in ["Replication", "Standalone"] {
        assert_eq!(parsed(json!({ "topology": topology })).workload.announce, api::Announce::Address);
        assert_eq!(refused(of(topology, "Address")).field, "spec.announce");
        let text = "spec.announce: \"Hostname\" cannot be used; \
                    only nodes of topology Cluster name each other to clients: leave it out";
        assert_eq!(refused(of(topology, "Hostname")).to_string(), text);
    }
}

#[test]
fn what_shards_are_even_by_is_the_number_of_slots_unless_the_user_says_otherwise() {
    let of = |balance: &str| json!({ "topology": "Cluster", "balance": balance });
    assert_eq!(parsed(json!({ "topology": "Cluster" })).desired.balance, Balance::Slots);
    for (text, balance) in [("Slots", Balance::Slots), ("Keys", Balance::Keys), ("Bytes", Balance::Bytes)] {
        assert_eq!(parsed(of(text)).desired.balance, balance);
    }
    for topology in ["Replication", "Standalone"] {
        let spec = |balance: &str| json!({ "topology": topology, "balance": balance });
        assert_eq!(parsed(spec("Slots")).desired.balance, Balance::Slots);
        let text =
            "spec.balance: \"Keys\" cannot be used; only topology Cluster has slots to balance: leave it out";
        assert_eq!(refused(spec("Keys")).to_string(), text);
        assert_eq!(refused(spec("Bytes")).field, "spec.balance");
    }
    let unknown = serde_json::from_value::<api::ValkeyClusterSpec>(of("Memory"));
    assert!(unknown.unwrap_err().to_string().contains("expected one of `Slots`, `Keys`, `Bytes`"));
}

#[test]
fn a_wish_to_even_out_slots_is_a_text_of_its_own_and_only_where_there_are_slots() {
    let of = |topology: &str, text: &str| {
        let annotations = json!({ "valkeeper.io/rebalance": text, "valkeeper.io/confirm-blank": text });
        parse(&cluster(json!({ "topology": topology }), annotations))
    };
    let desired = of("Cluster", " monday ").unwrap();
    assert_eq!(desired.rebalance.as_deref(), Some("rebalance@monday"));
    assert_eq!(desired.confirm_blank.as_deref(), Some("monday"), "neither is spent with the other");
    assert_eq!(parsed(json!({ "topology": "Cluster" })).desired.rebalance, None);
    for (topology, text) in
        [("Cluster", ""), ("Cluster", " "), ("Replication", "monday"), ("Standalone", "x")]
    {
        let desired = of(topology, text).unwrap();
        let begins = format!("metadata.annotations[valkeeper.io/rebalance]: \"{text}\" cannot be used; ");
        assert!(desired.refused.unwrap().starts_with(&begins), "{topology}");
        assert_eq!(desired.rebalance, None);
    }
}

#[test]
fn an_endless_text_is_refused_in_few_words_and_the_rest_of_the_resource_is_in_force() {
    for key in ["rebalance", "confirm-blank", "switchover"] {
        let text = format!("0-1@{}", "x".repeat(70_000));
        let annotations = json!({ format!("valkeeper.io/{key}"): text });
        let desired = parse(&cluster(json!({ "topology": "Cluster", "shards": 5 }), annotations)).unwrap();
        let words = format!(
            "metadata.annotations[valkeeper.io/{key}]: \"{}…\" cannot be used; \
             it has 70004 bytes; allowed: at most 128",
            &text[..200]
        );
        assert_eq!(desired.refused, Some(words));
        assert_eq!((desired.shards, desired.switchover), (5, None));
        assert_eq!((desired.confirm_blank, desired.rebalance), (None, None));
    }
    let fits = json!({ "valkeeper.io/switchover": format!("0-1@{}", "x".repeat(124)) });
    assert!(parse(&cluster(json!({ "topology": "Cluster" }), fits)).unwrap().switchover.is_some());
}

#[test]
fn requests_by_annotation_are_carried_over() {
    let annotations = json!({ "valkeeper.io/restart": "monday", "valkeeper.io/confirm-blank": "yes" });
    let cluster = cluster(json!({ "topology": "Replication" }), annotations);
    let Parsed { desired, workload } = parse_all(&cluster, &Defaults::default()).unwrap();
    assert_eq!(desired.confirm_blank.as_deref(), Some("yes"));
    assert_eq!(workload.restart.as_deref(), Some("monday"));
}

#[test]
fn a_name_that_another_clusters_service_may_have_is_refused_before_anything_is_made() {
    let named = |name: &str| {
        let mut cluster = cluster(json!({ "topology": "Replication" }), json!({}));
        cluster.metadata.name = Some(name.to_owned());
        first(&cluster)
    };
    for name in [
        "orders-primary",
        "orders-primary-3",
        "orders-replicas",
        "orders-replicas-15",
        "orders-headless",
        "orders-node-0-12",
    ] {
        let refused = named(name).unwrap_err();
        assert_eq!((refused.field.as_str(), refused.value.as_str()), ("metadata.name", name));
        assert!(refused.allowed.contains("allowed: one that does not end in -primary"), "{refused}");
    }
    // No other name of one cluster's objects is one of another's, whatever shards there are.
    for name in [
        "orders",
        "primary",
        "orders-0",
        "orders-0-0",
        "orders-auth",
        "orders-primary-x",
        "orders-primary-",
        "orders-node",
        "orders-node-1",
    ] {
        assert_eq!(named(name), Ok(()), "{name}");
    }
}

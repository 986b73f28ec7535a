//! What holds for every object of every cluster, and the scripts run by a real shell.

use super::*;
use crate::{
    api::{Defaults, parse_all},
    pki::{self, Certified},
};
use k8s_openapi::{
    ByteString,
    api::{
        apps::v1::StatefulSet,
        core::v1::{ConfigMap, Secret, Service},
        discovery::v1::EndpointSlice,
        policy::v1::PodDisruptionBudget,
    },
};
use rand::{SeedableRng, rngs::StdRng};
use serde::{Serialize, de::DeserializeOwned};
use valkeeper_core::ids::{MemberId, Timestamp};

fn cluster(spec: Value) -> ValkeyCluster {
    serde_json::from_value(json!({
        "apiVersion": "valkeeper.io/v1alpha1",
        "kind": "ValkeyCluster",
        "metadata": { "name": "orders", "namespace": "shop", "uid": "c-1", "generation": 1 },
        "spec": spec,
    }))
    .unwrap()
}

/// Made once: keys are random, and rendering twice shall give the same bytes.
fn identities() -> BTreeMap<ShardId, Identity> {
    static MADE: std::sync::OnceLock<BTreeMap<ShardId, Identity>> = std::sync::OnceLock::new();
    let make = || {
        let root = Certified::root(NOW).unwrap();
        let issuer = root.intermediate(&pki::cluster_uri("shop", "orders"), NOW).unwrap();
        let of = |shard| {
            Identity::default().complete(
                &root.chain,
                &issuer,
                members(shard),
                pki::LEAF_LIFETIME_DEFAULT,
                NOW,
            )
        };
        [0, 1].map(|shard| (ShardId(shard), of(shard).unwrap())).into()
    };
    MADE.get_or_init(make).clone()
}

fn members(shard: u16) -> impl Iterator<Item = MemberId> {
    (0..3).map(move |ordinal| MemberId::new(shard, ordinal))
}

const NOW: Timestamp = Timestamp(1_800_000_000_000_000_000);

fn context() -> Context {
    let credentials = Credentials::complete(None, Some("top secret%".into()), &mut StdRng::seed_from_u64(7));
    let uids = ["orders-primary", "orders-primary-1"].map(|name| (name.to_owned(), format!("uid of {name}")));
    Context {
        credentials,
        identities: identities(),
        service_uids: uids.into(),
        address_type: AddressType::IPv4,
    }
}

fn rendered(spec: Value) -> Vec<Rendered> {
    let cluster = cluster(spec);
    render_all(&cluster, &parse_all(&cluster, &Defaults::default()).unwrap(), &context())
}

fn full() -> Value {
    json!({
        "topology": "Replication",
        "shards": 2,
        "resources": { "limits": { "memory": "1024Mi", "cpu": "1" }, "requests": { "memory": "1Gi" } },
        "config": { "maxmemory-policy": "volatile-lru" },
        "persistence": { "size": "2Gi", "storageClassName": "fast" },
        "scheduling": {
            "nodeSelector": { "disk": "ssd" },
            "tolerations": [{ "key": "db", "operator": "Exists" }],
            "affinity": { "nodeAffinity": { "preferredDuringSchedulingIgnoredDuringExecution": [] } },
            "priorityClassName": "high",
        },
        "podLabels": { "team": "shop" },
        "podAnnotations": { "note": "x" },
        "imagePullSecrets": [{ "name": "pull" }],
    })
}

fn find(objects: &[Rendered], name: &str) -> Rendered {
    objects.iter().find(|r| r.object.to_string() == name).unwrap_or_else(|| panic!("{name}")).clone()
}

/// Reads a value as its Kubernetes type and writes it again: a misspelt field would be lost.
fn through<T: DeserializeOwned + Serialize>(value: &Value) -> Value {
    let typed: T = serde_json::from_value(value.clone()).unwrap();
    serde_json::to_value(&typed).unwrap()
}

fn served(rendered: &Rendered) -> Value {
    match rendered.object.kind {
        ObjectKind::Secret => through::<Secret>(&rendered.value()),
        ObjectKind::ConfigMap => through::<ConfigMap>(&rendered.value()),
        ObjectKind::Service => through::<Service>(&rendered.value()),
        ObjectKind::EndpointSlice => {
            let mut value = rendered.value();
            value["endpoints"] = json!([{ "addresses": ["10.0.0.1"] }]);
            through::<EndpointSlice>(&value)
        }
        ObjectKind::PodDisruptionBudget => through::<PodDisruptionBudget>(&rendered.value()),
        ObjectKind::StatefulSet => through::<StatefulSet>(&rendered.value()),
    }
}

#[test]
fn a_cluster_of_two_shards_has_these_objects_in_this_order() {
    let names: Vec<String> = rendered(full()).iter().map(|r| r.object.to_string()).collect();
    assert_eq!(
        names,
        [
            "Secret/orders-system",
            "Secret/orders-auth",
            "Secret/orders-identity-0",
            "Secret/orders-identity-1",
            "ConfigMap/orders-config",
            "Service/orders",
            "Service/orders-headless",
            "Service/orders-primary",
            "Service/orders-replicas",
            "EndpointSlice/orders-primary",
            "PodDisruptionBudget/orders-0",
            "StatefulSet/orders-0",
            "Service/orders-primary-1",
            "Service/orders-replicas-1",
            "EndpointSlice/orders-primary-1",
            "PodDisruptionBudget/orders-1",
            "StatefulSet/orders-1",
        ]
    );
}

fn valkey_cluster() -> Value {
    json!({ "topology": "Cluster", "shards": 2, "replicas": 1 })
}

#[test]
fn a_valkey_cluster_has_one_service_to_begin_at_one_for_each_member_and_no_route() {
    let objects = rendered(valkey_cluster());
    let names: Vec<String> = objects.iter().map(|r| r.object.to_string()).collect();
    assert_eq!(
        names,
        [
            "Secret/orders-system",
            "Secret/orders-auth",
            "Secret/orders-identity-0",
            "Secret/orders-identity-1",
            "ConfigMap/orders-config",
            "Service/orders",
            "Service/orders-headless",
            "Service/orders-node-0-0",
            "Service/orders-node-0-1",
            "PodDisruptionBudget/orders-0",
            "StatefulSet/orders-0",
            "Service/orders-node-1-0",
            "Service/orders-node-1-1",
            "PodDisruptionBudget/orders-1",
            "StatefulSet/orders-1",
        ]
    );
    let auth: Secret = serde_json::from_value(find(&objects, "Secret/orders-auth").value()).unwrap();
    let ByteString(host) = &auth.data.unwrap()["host"];
    assert_eq!(host, b"orders.shop.svc");
}

#[test]
fn the_bus_is_open_between_the_nodes_of_a_valkey_cluster_and_nowhere_else() {
    let ports = |spec: Value, object: &str, list: &str| -> Vec<u64> {
        let value = find(&rendered(spec), object).value();
        let ports = value.pointer(list).and_then(Value::as_array).unwrap();
        ports.iter().map(|p| p["containerPort"].as_u64().or(p["port"].as_u64()).unwrap()).collect()
    };
    let container = "/spec/template/spec/containers/0/ports";
    assert_eq!(ports(valkey_cluster(), "StatefulSet/orders-1", container), [6379, 7443, 9121, 16379]);
    assert_eq!(ports(valkey_cluster(), "Service/orders-headless", "/spec/ports"), [6379, 16379]);
    assert_eq!(ports(valkey_cluster(), "Service/orders", "/spec/ports"), [6379]);
    assert_eq!(ports(full(), "StatefulSet/orders-1", container), [6379, 7443, 9121]);
    assert_eq!(ports(full(), "Service/orders-headless", "/spec/ports"), [6379]);
}

#[test]
fn an_agent_is_told_of_names_where_clients_are_to_be_and_pods_are_in_dns_before_they_are_ready() {
    let command = |announce: Value| {
        let mut spec = valkey_cluster();
        spec["announce"] = announce;
        let stateful_set = find(&rendered(spec), "StatefulSet/orders-1").value();
        let words = stateful_set.pointer("/spec/template/spec/containers/0/command").cloned().unwrap();
        serde_json::from_value::<Vec<String>>(words).unwrap().join(" ")
    };
    let (agent, server) =
        ("/valkeeper/valkeeper-agent run --cluster orders", "-- valkey-server /etc/valkey/conf/valkey.conf");
    assert_eq!(command(json!("Address")), format!("{agent} {server}"));
    assert_eq!(command(json!("Hostname")), format!("{agent} --announce hostname {server}"));
    let headless = find(&rendered(valkey_cluster()), "Service/orders-headless").value();
    assert_eq!(headless["spec"]["publishNotReadyAddresses"], json!(true));
    let stateful_set = find(&rendered(valkey_cluster()), "StatefulSet/orders-1").value();
    let labels = stateful_set.pointer("/spec/template/metadata/labels").cloned().unwrap();
    let selects = |service: &str| {
        let service = find(&rendered(valkey_cluster()), service).value();
        let selector = service["spec"]["selector"].as_object().unwrap().clone();
        selector
            .iter()
            .filter(|(label, value)| labels[*label] != **value)
            .map(|(l, _)| l.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(selects("Service/orders-headless"), Vec::<String>::new());
    // That one label comes from the StatefulSet controller.
    assert_eq!(selects("Service/orders-node-1-0"), ["statefulset.kubernetes.io/pod-name"]);
}

#[test]
fn every_field_is_one_that_kubernetes_has_and_reads_back_equal() {
    for spec in [full(), json!({ "topology": "Standalone", "profile": "Cache" }), valkey_cluster()] {
        for object in rendered(spec) {
            assert_eq!(object.live_digest(&served(&object)), object.digest, "{}", object.object);
        }
    }
}

#[test]
fn rendering_twice_gives_the_same_bytes() {
    let (one, other) = (rendered(full()), rendered(full()));
    assert!(one.iter().zip(&other).all(|(a, b)| a.value() == b.value() && a.digest == b.digest));
}

#[test]
fn a_statefulset_as_the_server_returns_it_is_no_difference_and_a_change_is_one() {
    let wanted = find(&rendered(full()), "StatefulSet/orders-0");
    let mut live = wanted.value();
    live["metadata"]["resourceVersion"] = json!("17");
    live["metadata"]["managedFields"] = json!([{ "manager": "valkeeper" }]);
    live["spec"]["revisionHistoryLimit"] = json!(10);
    live["status"] = json!({ "replicas": 3 });
    let pod = &mut live["spec"]["template"]["spec"];
    pod["restartPolicy"] = json!("Always");
    pod["dnsPolicy"] = json!("ClusterFirst");
    pod["containers"][0]["resources"]["limits"]["memory"] = json!("1Gi");
    pod["containers"][0]["startupProbe"]["successThreshold"] = json!(1);
    pod["volumes"][1]["configMap"]["defaultMode"] = json!(420);
    live["spec"]["volumeClaimTemplates"][0]["kind"] = json!("PersistentVolumeClaim");
    live["spec"]["volumeClaimTemplates"][0]["status"] = json!({ "phase": "Pending" });
    assert_eq!(wanted.live_digest(&live), wanted.digest);

    let changes = [
        ("/spec/replicas", json!(1)),
        ("/spec/template/spec/containers/0/image", json!("evil")),
        ("/spec/template/spec/containers/0/securityContext/readOnlyRootFilesystem", json!(false)),
        ("/spec/template/spec/containers/0/command/3", json!("another")),
        ("/metadata/labels/valkeeper.io~1shard", json!("9")),
    ];
    for (path, value) in changes {
        let mut changed = live.clone();
        *changed.pointer_mut(path).unwrap() = value;
        assert_ne!(wanted.live_digest(&changed), wanted.digest, "{path}");
    }
}

#[test]
fn a_field_that_is_no_longer_wanted_is_a_difference() {
    let before = find(&rendered(full()), "StatefulSet/orders-0");
    let mut spec = full();
    spec["scheduling"].as_object_mut().unwrap().remove("nodeSelector");
    let after = find(&rendered(spec), "StatefulSet/orders-0");
    assert_ne!(after.live_digest(&before.value()), after.digest);
}

#[test]
fn the_revision_changes_with_the_template_and_only_with_it() {
    let revision = |spec: Value| find(&rendered(spec), "StatefulSet/orders-0").revision.unwrap();
    let base = revision(full());
    let changed = |key: &str, value: Value| {
        let mut spec = full();
        spec[key] = value;
        revision(spec)
    };
    assert_eq!(changed("replicas", json!(4)), base);
    assert_eq!(changed("paused", json!(true)), base);
    assert_ne!(changed("image", json!("valkey/valkey:9.1.1")), base);
    assert_ne!(changed("config", json!({ "maxmemory-policy": "volatile-lru", "tcp-backlog": "64" })), base);
    assert_eq!(
        changed("config", json!({ "maxmemory-policy": "noeviction" })),
        base,
        "servers take it while they run"
    );
    let set = find(&rendered(full()), "StatefulSet/orders-0").value();
    assert_eq!(set["spec"]["template"]["metadata"]["annotations"][ANNOTATION_REVISION], json!(base.0));

    let mut restarted = cluster(full());
    let annotation = ("valkeeper.io/restart".to_owned(), "monday".to_owned());
    restarted.metadata.annotations = Some([annotation].into());
    let parsed = parse_all(&restarted, &Defaults::default()).unwrap();
    let restarted = find(&render_all(&restarted, &parsed, &context()), "StatefulSet/orders-0");
    assert_ne!(restarted.revision.unwrap(), base);
}

#[test]
fn every_container_satisfies_pod_security_restricted() {
    for spec in [full(), json!({ "topology": "Standalone", "profile": "Cache" })] {
        for object in rendered(spec).iter().filter(|r| r.object.kind == ObjectKind::StatefulSet) {
            let pod = &object.value()["spec"]["template"]["spec"];
            assert_eq!(pod["automountServiceAccountToken"], json!(false));
            assert_eq!(pod["securityContext"]["runAsNonRoot"], json!(true));
            assert_eq!(pod["securityContext"]["runAsUser"], json!(999));
            let lists =
                ["containers", "initContainers"].map(|l| pod[l].as_array().cloned().unwrap_or_default());
            for container in lists.concat() {
                let context = &container["securityContext"];
                assert_eq!(context["allowPrivilegeEscalation"], json!(false));
                assert_eq!(context["capabilities"], json!({ "drop": ["ALL"] }));
                assert_eq!(context["readOnlyRootFilesystem"], json!(true));
                assert_eq!(context["runAsNonRoot"], json!(true));
                assert_eq!(context["seccompProfile"], json!({ "type": "RuntimeDefault" }));
            }
            let kinds = pod["volumes"].as_array().unwrap().iter().flat_map(|v| v.as_object().unwrap().keys());
            assert!(kinds.clone().all(|k| ["name", "emptyDir", "configMap", "secret"].contains(&k.as_str())));
        }
    }
}

#[test]
fn no_secret_byte_is_in_any_object_but_secrets_nor_in_debug_output() {
    let Credentials { default, operator, replica } = context().credentials;
    let shown = format!("{:?} {:?}", rendered(full()), context());
    for password in [default, operator, replica] {
        assert!(!shown.contains(password.expose()));
        for object in rendered(full()).iter().filter(|r| r.object.kind != ObjectKind::Secret) {
            assert!(!object.value().to_string().contains(password.expose()), "{}", object.object);
        }
    }
}

#[test]
fn the_secrets_hold_hashes_a_parseable_uri_and_what_members_include() {
    let objects = rendered(full());
    let read = |name: &str, key: &str| {
        let secret: Secret = serde_json::from_value(find(&objects, name).value()).unwrap();
        String::from_utf8(secret.data.unwrap()[key].0.clone()).unwrap()
    };
    let users = read("Secret/orders-system", "users.acl");
    let names: Vec<&str> = users.lines().map(|l| l.split(' ').nth(1).unwrap()).collect();
    assert_eq!(names, ["default", "valkeeper", "replica"]);
    assert!(users.lines().nth(1).unwrap().ends_with("resetchannels -@all +ping +info +role"));
    assert!(users.lines().all(|l| l.split(' ').nth(3).unwrap().len() == 65));
    assert!(!users.contains(context().credentials.operator.expose()));
    let auth = read("Secret/orders-system", "auth.conf");
    assert_eq!(
        auth,
        format!("primaryuser replica\nprimaryauth {}\n", context().credentials.replica.expose())
    );
    assert_eq!(
        read("Secret/orders-auth", "uri"),
        "redis://default:top%20secret%25@orders-primary.shop.svc:6379/0"
    );
    let set = find(&objects, "StatefulSet/orders-0").value().to_string();
    assert!(!set.contains("operator-password"), "the plain passwords are not mounted");
}

#[test]
fn a_server_gets_the_users_that_its_version_understands_also_while_others_are_upgraded() {
    let of = |image: &str| {
        let mut spec = valkey_cluster();
        spec["image"] = json!(image);
        let objects = rendered(spec);
        let secret: Secret = serde_json::from_value(find(&objects, "Secret/orders-system").value()).unwrap();
        let set: StatefulSet =
            serde_json::from_value(find(&objects, "StatefulSet/orders-0").value()).unwrap();
        let volumes = set.spec.unwrap().template.spec.unwrap().volumes.unwrap();
        let mounted = volumes.into_iter().find_map(|v| v.secret).unwrap().items.unwrap().remove(0);
        assert_eq!(mounted.path, "users.acl");
        (secret.data.unwrap(), mounted.key)
    };
    let text =
        |data: &BTreeMap<String, ByteString>, key: &str| String::from_utf8(data[key].0.clone()).unwrap();
    let ends = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.split_once("-@all ").unwrap_or_default().1.to_owned()).collect()
    };
    let (old, mounted) = of("v:8.1.4");
    let users = text(&old, &mounted);
    assert_eq!(
        ends(&users)[1..],
        [
            "+ping +info +role +cluster|nodes +cluster|info +cluster|countkeysinslot",
            "+ping +psync +replconf +sync ~* +@write +pfcount +select +cluster|myid +cluster|setslot -flushall -flushdb -migrate -swapdb"
        ]
    );
    let (new, mounted) = of("v:9.0.0");
    assert_eq!(text(&new, "users.acl"), users, "who is still old starts with what it knows");
    assert_eq!(text(&old, &mounted), text(&new, &mounted), "and who is new finds its own at once");
    assert_eq!(
        ends(&text(&new, &mounted))[1..],
        [
            "+ping +info +role +cluster|nodes +cluster|info +cluster|countkeysinslot +cluster|getslotmigrations",
            "+ping +psync +replconf +sync ~* +@write +pfcount +select +cluster|myid +cluster|setslot +cluster|syncslots \
             -flushall -flushdb -migrate -swapdb"
        ]
    );
}

#[test]
fn passwords_that_exist_are_kept_and_missing_ones_are_made() {
    let objects = rendered(full());
    let system: Secret = serde_json::from_value(find(&objects, "Secret/orders-system").value()).unwrap();
    let again = Credentials::complete(Some(&system), None, &mut StdRng::seed_from_u64(99));
    assert_eq!(again, context().credentials);
    let mut edited = system.clone();
    if let Some(data) = &mut edited.data {
        data.insert("replica-password".to_owned(), ByteString(b"a\nrequirepass b".to_vec()));
    }
    let mended = Credentials::complete(Some(&edited), None, &mut StdRng::seed_from_u64(99));
    assert_eq!((&mended.operator, &mended.default), (&again.operator, &again.default));
    assert!(!mended.replica.expose().contains("requirepass"), "it would be a line of valkey.conf");
    let fresh = Credentials::complete(None, None, &mut StdRng::seed_from_u64(99));
    for password in [&fresh.default, &fresh.operator, &fresh.replica] {
        assert!(
            password.expose().len() == 32 && password.expose().bytes().all(|b| b.is_ascii_alphanumeric())
        );
    }
    assert!(fresh.default != fresh.operator && fresh.operator != fresh.replica);
}

#[test]
fn a_changed_password_of_clients_is_a_new_revision() {
    let cluster = cluster(full());
    let parsed = parse_all(&cluster, &Defaults::default()).unwrap();
    let mut context = context();
    let before = find(&render_all(&cluster, &parsed, &context), "StatefulSet/orders-0");
    context.credentials.default = "another".into();
    assert_ne!(
        find(&render_all(&cluster, &parsed, &context), "StatefulSet/orders-0").revision,
        before.revision
    );
}

#[test]
fn a_password_secret_is_read_without_its_last_newline_or_refused_by_name() {
    let reference = serde_json::from_value(json!({ "name": "pw" })).unwrap();
    let secret: Secret = serde_json::from_value(json!({ "data": { "password": "aHVudGVyMgo=" } })).unwrap();
    assert_eq!(Credentials::from_user(&reference, Some(&secret)).unwrap().expose(), "hunter2");
    let refused = Credentials::from_user(&reference, Some(&Secret::default())).unwrap_err();
    assert_eq!((refused.field.as_str(), refused.value.as_str()), ("spec.auth.passwordSecret", "pw/password"));
    assert!(Credentials::from_user(&reference, None).is_err());
}

#[test]
fn the_write_service_has_no_selector_and_its_slice_lists_nobody() {
    let objects = rendered(full());
    assert!(find(&objects, "Service/orders-primary").value()["spec"].get("selector").is_none());
    let slice = find(&objects, "EndpointSlice/orders-primary").value();
    assert!(slice.get("endpoints").is_none());
    assert_eq!(slice["metadata"]["labels"]["kubernetes.io/service-name"], json!("orders-primary"));
    assert_eq!(slice["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"], json!("valkeeper.io"));
    assert_eq!(slice["metadata"]["ownerReferences"][0]["uid"], json!("uid of orders-primary"));
}

#[test]
fn a_slice_waits_for_the_uid_of_its_service() {
    let cluster = cluster(full());
    let parsed = parse_all(&cluster, &Defaults::default()).unwrap();
    let context = Context { service_uids: BTreeMap::new(), ..context() };
    let objects = render_all(&cluster, &parsed, &context);
    assert!(objects.iter().all(|r| r.object.kind != ObjectKind::EndpointSlice));
}

#[test]
fn what_a_service_of_one_cluster_is_called_no_other_cluster_can_be() {
    for (topology, count) in [("Replication", 2 + 2 * 16), ("Cluster", 2 + 3 * 16)] {
        let all = rendered(json!({ "topology": topology, "shards": 16 }));
        let services = all.iter().filter(|r| r.object.kind == ObjectKind::Service);
        let services: Vec<&str> = services.map(|r| r.object.name.as_str()).collect();
        assert_eq!(services.len(), count);
        let (plain, others): (Vec<&str>, Vec<&str>) =
            services.into_iter().partition(|name| !names::is_of_a_service(name));
        assert_eq!((plain, others.len()), (vec!["orders"], count - 1));
    }
}

#[test]
fn a_member_of_a_valkey_cluster_has_a_service_that_leads_to_its_pod_alone_until_that_goes() {
    let objects = rendered(json!({ "topology": "Cluster", "shards": 2, "replicas": 1 }));
    let service = find(&objects, "Service/orders-node-1-0").value();
    assert_eq!(service["spec"]["selector"]["statefulset.kubernetes.io/pod-name"], json!("orders-1-0"));
    assert_eq!(service["spec"]["selector"]["valkeeper.io/named"], json!("true"));
    assert_eq!(service["spec"]["publishNotReadyAddresses"], json!(true));
    assert_eq!(service["spec"]["type"], json!("ClusterIP"));
    assert!(service["spec"].get("clusterIP").is_none(), "an address of its own");
    assert_eq!(names::member_of_node("orders", "orders-node-1-0"), Some(MemberId::new(1, 0)));
    for other in ["orders-node-01-0", "orders-node-1", "orders-1-0", "payments-node-1-0"] {
        assert_eq!(names::member_of_node("orders", other), None, "{other}");
    }
}

#[test]
fn a_pod_is_the_member_that_its_name_says() {
    let member = MemberId::new(1, 2);
    assert_eq!(names::member_of_pod("orders", &names::pod("orders", member)), Some(member));
    assert_eq!(names::member_of_pod("orders", "orders-web-0-1"), None);
    assert_eq!(names::member_of_pod("orders", "other-0-1"), None);
}

fn identity_secret() -> Secret {
    serde_json::from_value(find(&rendered(full()), "Secret/orders-identity-0").value()).unwrap()
}

#[test]
fn certificates_that_are_good_are_kept_and_those_that_are_due_are_made_anew() {
    let root = Certified::root(NOW).unwrap();
    let issuer = root.intermediate(&pki::cluster_uri("shop", "orders"), NOW).unwrap();
    let complete = |known: Identity, now: Timestamp| {
        known.complete(&root.chain, &issuer, members(0), pki::LEAF_LIFETIME_DEFAULT, now).unwrap()
    };
    let first = complete(Identity::default(), NOW);
    assert_eq!(complete(first.clone(), NOW.plus_millis(6 * 24 * 3_600_000)), first);
    let renewed = complete(first.clone(), NOW.plus_millis(8 * 24 * 3_600_000));
    assert!(renewed.leaves.iter().all(|(ordinal, leaf)| first.leaves[ordinal] != *leaf));
    // Another cluster's, another member's: neither is kept.
    let strange = Identity { leaves: [(0, first.leaves[&1].clone())].into(), ..first.clone() };
    assert_ne!(complete(strange, NOW).leaves[&0], first.leaves[&1]);
    assert_ne!(
        complete(identities()[&ShardId(0)].clone(), NOW).leaves[&0],
        identities()[&ShardId(0)].leaves[&0]
    );
}

#[test]
fn an_identity_reads_back_as_it_was_written_and_damage_is_left_out() {
    let written = identities()[&ShardId(0)].clone();
    let mut secret = identity_secret();
    assert_eq!(Identity::read(&secret), written);
    if let Some(data) = &mut secret.data {
        data.remove("1.key");
        data.insert("2.crt".to_owned(), ByteString(b"garbage".to_vec()));
    }
    assert_eq!(Identity::read(&secret).leaves.keys().collect::<Vec<_>>(), [&0]);
    let other = ByteString(written.leaves[&1].key.expose().as_bytes().to_vec());
    secret.data.get_or_insert_default().insert("0.key".to_owned(), other);
    assert!(Identity::read(&secret).leaves.is_empty(), "a key that does not fit");
}

#[test]
fn certificates_and_nothing_else_are_vital_and_need_no_spec() {
    let cluster = cluster(full());
    let vital = render_vital(&cluster, &context());
    let all = rendered(full());
    let of_all: Vec<_> = all.iter().filter(|r| r.vital).collect();
    let same = |(a, b): (&Rendered, &&Rendered)| (&a.object, &a.digest) == (&b.object, &b.digest);
    assert!(!vital.is_empty() && vital.len() == of_all.len() && vital.iter().zip(&of_all).all(same));
    assert!(vital.iter().all(|r| r.object.name.starts_with("orders-identity-")));
    assert!(vital[0].facts(Observed::Absent).vital);
}

#[test]
fn a_renewed_certificate_is_no_new_revision() {
    let cluster = cluster(full());
    let parsed = parse_all(&cluster, &Defaults::default()).unwrap();
    let before = find(&rendered(full()), "StatefulSet/orders-0");
    let without = Context { identities: BTreeMap::new(), ..context() };
    let after = find(&render_all(&cluster, &parsed, &without), "StatefulSet/orders-0");
    assert_eq!(before.revision, after.revision);
}

#[test]
fn the_time_to_stop_grows_with_the_data() {
    let grace = |spec: Value| {
        let set = find(&rendered(spec), "StatefulSet/orders-0").value();
        set["spec"]["template"]["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap()
    };
    let with_memory = |memory: &str| {
        let mut spec = full();
        spec["resources"] = json!({ "limits": { "memory": memory } });
        grace(spec)
    };
    assert_eq!(with_memory("1000Mi"), 10 + 5 + 2 + 5 + 20);
    assert_eq!(with_memory("10000Mi") - with_memory("1000Mi"), 180);
    assert_eq!(grace(json!({ "topology": "Replication" })), 62);
}

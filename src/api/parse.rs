//! `ValkeyCluster` -> what it means: parse, don't validate. What comes out is valid by its types; what cannot be
//! parsed names the field, the value and what is allowed. Rules that CEL has too are kept here as well, because a
//! cluster may run with an older copy of the CRD.

use super::{quantity, v1alpha1 as api};
use crate::objects::names::is_of_a_service;
use std::collections::BTreeMap;
use valkeeper_core::{
    config::{self, Files, MEMORY_LIMIT_MIN_BYTES, ServerConfig, ServerVersion, Setting, VERSION_MIN},
    ids::MemberId,
    spec::{
        Balance, DesiredCluster, FailoverMode, FailoverPolicy, IoThreads, Isolation, Profile, Settings,
        SwitchoverWish, Topology,
    },
};

/// Image unless the user or the operator's flag names one.
pub const IMAGE_DEFAULT: &str = "valkey/valkey:9.1.2";
/// Image with the agent unless the operator's flag names one: the operator's own.
pub const AGENT_IMAGE_DEFAULT: &str = concat!("valkeeper/valkeeper:", env!("CARGO_PKG_VERSION"));
/// Replicas of a shard of topology Replication or Cluster unless the user says how many: two, so that after a failover there is
/// still one.
pub const REPLICAS_DEFAULT: u16 = 2;
/// Shards of topology Cluster unless the user says how many: the fewest whose primaries can lose one and still elect another.
pub const CLUSTER_SHARDS_DEFAULT: u16 = 3;

/// A spec that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value:?} cannot be used; {allowed}")]
pub struct Invalid {
    /// Path of the field.
    pub field: String,
    /// Its value.
    pub value: String,
    /// What is allowed, or why it is not.
    pub allowed: String,
}

impl Invalid {
    fn new(field: impl Into<String>, value: impl ToString, allowed: impl Into<String>) -> Self {
        let mut value = value.to_string();
        if let Some((end, _)) = value.char_indices().nth(SHOWN_CHARS_MAX) {
            value.truncate(end);
            value.push('…');
        }
        Invalid { field: field.into(), value, allowed: allowed.into() }
    }
}

/// Longest part of a refused value that is repeated: it is in a record, which has a bound, and in a condition. Characters.
const SHOWN_CHARS_MAX: usize = 200;

/// Longest text of an annotation that tells one request from another: each is remembered. Bytes.
const TOKEN_BYTES_MAX: usize = 128;
/// Largest spec. Bytes as JSON: far more than a spec with every field has, and a twentieth of what etcd takes for one object.
const SPEC_BYTES_MAX: usize = 65_536;

/// Most of spec.config, names and values. Bytes: what servers take while they run is in records, which have a bound.
const CONFIG_BYTES_MAX: usize = 8_192;

/// What the operator's flags decide where the spec says nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// Image with valkey-server.
    pub image: String,
    /// Image with the agent.
    pub agent_image: String,
}

impl Default for Defaults {
    fn default() -> Self {
        Defaults { image: IMAGE_DEFAULT.to_owned(), agent_image: AGENT_IMAGE_DEFAULT.to_owned() }
    }
}

/// A member's volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its size, a quantity.
    pub size: String,
    /// Its StorageClass; `None`: the cluster's default.
    pub class: Option<String>,
}

/// What rendering depends on beyond the parts that are copied as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Image of the members.
    pub image: String,
    /// Image that the agent comes from.
    pub agent_image: String,
    /// The members' volume, if they have one.
    pub volume: Option<Volume>,
    /// Everything of valkey.conf.
    pub config: ServerConfig,
    /// How nodes name each other to clients.
    pub announce: api::Announce,
    /// Text of the request for a rolling restart.
    pub restart: Option<String>,
}

/// A resource that was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// What decisions depend on.
    pub desired: DesiredCluster,
    /// What rendering depends on.
    pub workload: Workload,
}

/// What decisions need of a resource, with the built-in defaults.
///
/// # Errors
/// The first field that cannot be used.
pub fn parse(cluster: &api::ValkeyCluster) -> Result<DesiredCluster, Invalid> {
    parse_all(cluster, &Defaults::default()).map(|parsed| parsed.desired)
}

/// What decisions and rendering need of a resource.
///
/// # Errors
/// The first field that cannot be used.
pub fn parse_all(cluster: &api::ValkeyCluster, defaults: &Defaults) -> Result<Parsed, Invalid> {
    let spec = &cluster.spec;
    size(spec)?;
    let mut desired = DesiredCluster {
        generation: cluster.metadata.generation.unwrap_or_default(),
        topology: topology(spec.topology)?,
        shards: within("spec.shards", spec.shards.unwrap_or_else(|| shards(spec)), 1, api::SHARDS_MAX)?,
        replicas_per_shard: replicas(spec)?,
        profile: profile(spec.profile),
        failover: failover(spec.topology, &spec.failover)?,
        switchover: None,
        confirm_blank: None,
        volatile: false,
        paused: spec.paused,
        io_threads: IoThreads::Off,
        balance: balance(spec)?,
        rebalance: None,
        version: spec.version.clone(),
        settings: None,
        refused: None,
    };
    wishes(cluster, &mut desired);
    name(cluster)?;
    reserved("spec.podLabels", &spec.pod_labels)?;
    reserved("spec.podAnnotations", &spec.pod_annotations)?;
    let image = spec.image.clone().unwrap_or_else(|| defaults.image.clone());
    let version = version(&image, spec.version.as_deref())?;
    let memory_limit_bytes = resources(spec)?;
    let volume = volume(spec)?;
    desired.volatile = volume.is_none();
    let config = ServerConfig {
        version,
        profile: desired.profile,
        node_timeout_ms: node_timeout_ms(&desired),
        files: files(spec, volume.is_some()),
        memory_limit_bytes,
        settings: settings(&spec.config, version, memory_limit_bytes)?,
    };
    desired.settings = Some(Settings { digest: config.live_digest(), named: config.live_of_user() });
    if matches!(config.settings.get("io-threads"), Some(Setting::Integer(count)) if *count > 1) {
        desired.io_threads = IoThreads::On;
    }
    let restart = annotation(cluster, api::ANNOTATION_RESTART).map(str::to_owned);
    let (agent_image, announce) = (defaults.agent_image.clone(), announce(spec)?);
    Ok(Parsed { desired, workload: Workload { image, agent_image, volume, config, announce, restart } })
}

/// The value of an annotation; an empty one is none.
fn annotation<'a>(cluster: &'a api::ValkeyCluster, key: &str) -> Option<&'a str> {
    cluster.metadata.annotations.as_ref()?.get(key).map(|text| text.trim()).filter(|text| !text.is_empty())
}

fn name(cluster: &api::ValkeyCluster) -> Result<(), Invalid> {
    let name = cluster.metadata.name.as_deref().unwrap_or_default();
    let fits = name.len() <= api::NAME_LENGTH_MAX
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    let allowed = "allowed: at most 40 letters, digits and '-', beginning with a letter";
    if fits { Ok(()) } else { Err(Invalid::new("metadata.name", name, allowed)) }
}

/// Whether a resource that never had a valid spec can be called so. One that has run under its name goes on.
///
/// # Errors
/// If it would need the name of another's Service.
pub fn first(cluster: &api::ValkeyCluster) -> Result<(), Invalid> {
    let name = cluster.metadata.name.as_deref().unwrap_or_default();
    let allowed = "Services of other ValkeyClusters have such names; allowed: one that does not end in -primary, \
                   -replicas (with or without a shard's number behind it), -headless or -node with two numbers";
    if is_of_a_service(name) { Err(Invalid::new("metadata.name", name, allowed)) } else { Ok(()) }
}

fn topology(topology: api::Topology) -> Result<Topology, Invalid> {
    match topology {
        api::Topology::Standalone | api::Topology::Replication => Ok(Topology::Replication),
        api::Topology::Cluster => Ok(Topology::Cluster),
        api::Topology::Sentinel => Err(Invalid::new(
            "spec.topology",
            format!("{topology:?}"),
            "it is not available yet; allowed: Standalone, Replication, Cluster",
        )),
    }
}

/// Shards where the user does not say how many.
fn shards(spec: &api::ValkeyClusterSpec) -> u16 {
    match spec.topology {
        api::Topology::Standalone | api::Topology::Replication | api::Topology::Sentinel => 1,
        api::Topology::Cluster => CLUSTER_SHARDS_DEFAULT,
    }
}

/// What a spec may not be after another, whatever the API server has let through.
///
/// # Errors
/// The field that cannot change.
pub fn changed(before: &DesiredCluster, wanted: &Parsed) -> Result<(), Invalid> {
    let wanted = wanted.desired.topology;
    if wanted == before.topology {
        return Ok(());
    }
    let allowed = format!("topology cannot change; allowed: {:?}", before.topology);
    Err(Invalid::new("spec.topology", format!("{wanted:?}"), allowed))
}

fn node_timeout_ms(desired: &DesiredCluster) -> Option<i64> {
    match desired.topology {
        Topology::Replication => None,
        Topology::Cluster => Some(config::node_timeout_ms(desired.failover.detection_window_ms)),
    }
}

fn within(field: &str, value: u16, least: u16, most: u16) -> Result<u16, Invalid> {
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(Invalid::new(field, value, format!("allowed: {least} to {most}")))
}

fn replicas(spec: &api::ValkeyClusterSpec) -> Result<u16, Invalid> {
    match (spec.topology, spec.replicas) {
        (api::Topology::Standalone, None | Some(0)) => Ok(0),
        (api::Topology::Standalone, Some(count)) => {
            Err(Invalid::new("spec.replicas", count, "topology Standalone allows 0; use Replication"))
        }
        (api::Topology::Replication | api::Topology::Sentinel | api::Topology::Cluster, count) => {
            within("spec.replicas", count.unwrap_or(REPLICAS_DEFAULT), 0, api::REPLICAS_MAX)
        }
    }
}

fn profile(profile: api::Profile) -> Profile {
    match profile {
        api::Profile::Cache => Profile::Cache,
        api::Profile::Durable => Profile::Durable,
    }
}

fn failover(topology: api::Topology, failover: &api::Failover) -> Result<FailoverPolicy, Invalid> {
    let api::Failover { mode, detection_window_ms, isolation } = *failover;
    let (least, most) = api::DETECTION_WINDOW_MS.into_inner();
    let least = match topology {
        api::Topology::Standalone | api::Topology::Replication | api::Topology::Sentinel => least,
        api::Topology::Cluster => api::CLUSTER_DETECTION_WINDOW_MIN_MS,
    };
    if !(least..=most).contains(&detection_window_ms) {
        let allowed = format!("allowed in topology {topology:?}: {least} to {most} milliseconds");
        return Err(Invalid::new("spec.failover.detectionWindowMs", detection_window_ms, allowed));
    }
    let mode = match mode {
        api::FailoverMode::Automatic => FailoverMode::Automatic,
        api::FailoverMode::Manual => FailoverMode::Manual,
    };
    let isolation = match isolation {
        api::Isolation::On => Isolation::On,
        api::Isolation::Off => Isolation::Off,
    };
    Ok(FailoverPolicy { mode, detection_window_ms, isolation })
}

/// What the user asks for by annotations. One that cannot be used stops nothing else: it is named, and counts
/// as not there.
fn wishes(cluster: &api::ValkeyCluster, desired: &mut DesiredCluster) {
    let (switchover, a) = usable(word(cluster, api::ANNOTATION_SWITCHOVER).and_then(switchover));
    let (blank, b) = usable(word(cluster, api::ANNOTATION_CONFIRM_BLANK));
    let (rebalance, c) = usable(rebalance(cluster));
    desired.switchover = switchover;
    (desired.confirm_blank, desired.rebalance) = (blank.map(str::to_owned), rebalance);
    desired.refused = a.or(b).or(c).map(|invalid| invalid.to_string());
}

fn usable<T>(read: Result<Option<T>, Invalid>) -> (Option<T>, Option<Invalid>) {
    match read {
        Ok(wish) => (wish, None),
        Err(invalid) => (None, Some(invalid)),
    }
}

/// The text of an annotation that tells one request from the next.
fn word<'a>(cluster: &'a api::ValkeyCluster, key: &str) -> Result<Option<&'a str>, Invalid> {
    let text = annotation(cluster, key);
    text.map(|text| within_bytes(key, text)).transpose()
}

fn within_bytes<'a>(key: &str, text: &'a str) -> Result<&'a str, Invalid> {
    if text.len() <= TOKEN_BYTES_MAX {
        return Ok(text);
    }
    let allowed = format!("it has {} bytes; allowed: at most {TOKEN_BYTES_MAX}", text.len());
    Err(Invalid::new(annotation_field(key), text, allowed))
}

/// Reads `2`, `0-2`, `2@monday`, `0-2@monday`. The whole text is the token: another text is another wish.
fn switchover(text: Option<&str>) -> Result<Option<SwitchoverWish>, Invalid> {
    let Some(text) = text else { return Ok(None) };
    let (target, _) = text.split_once('@').unwrap_or((text, ""));
    let to = match target.parse::<u16>() {
        Ok(ordinal) => Some(MemberId::new(0, ordinal)),
        Err(_) => target.parse::<MemberId>().ok(),
    };
    let allowed =
        "allowed: ORDINAL or SHARD-ORDINAL, with @TOKEN behind it to repeat a wish, for example 0-2@monday";
    let to = to.ok_or_else(|| Invalid::new(annotation_field(api::ANNOTATION_SWITCHOVER), text, allowed))?;
    Ok(Some(SwitchoverWish { to, token: text.to_owned() }))
}

fn balance(spec: &api::ValkeyClusterSpec) -> Result<Balance, Invalid> {
    let wanted = match spec.balance {
        api::Balance::Slots => Balance::Slots,
        api::Balance::Keys => Balance::Keys,
        api::Balance::Bytes => Balance::Bytes,
    };
    match (topology(spec.topology)?, wanted) {
        (Topology::Cluster, _) | (Topology::Replication, Balance::Slots) => Ok(wanted),
        (Topology::Replication, Balance::Keys | Balance::Bytes) => {
            let allowed = "only topology Cluster has slots to balance: leave it out";
            Err(Invalid::new("spec.balance", format!("{wanted:?}"), allowed))
        }
    }
}

fn announce(spec: &api::ValkeyClusterSpec) -> Result<api::Announce, Invalid> {
    match (topology(spec.topology)?, spec.announce) {
        (Topology::Cluster, wanted) => Ok(wanted.unwrap_or_default()),
        // Nobody asks its members.
        (Topology::Replication, None) => Ok(api::Announce::Address),
        (Topology::Replication, Some(wanted)) => {
            let allowed = "only nodes of topology Cluster name each other to clients: leave it out";
            Err(Invalid::new("spec.announce", format!("{wanted:?}"), allowed))
        }
    }
}

/// The wish to even out slots. The annotation's name is part of the word, as earlier builds kept those of all
/// wishes together.
fn rebalance(cluster: &api::ValkeyCluster) -> Result<Option<String>, Invalid> {
    let key = api::ANNOTATION_REBALANCE;
    let Some(text) = cluster.metadata.annotations.as_ref().and_then(|all| all.get(key)) else {
        return Ok(None);
    };
    let refused = |allowed: &str| Err(Invalid::new(annotation_field(key), text, allowed));
    match (topology(cluster.spec.topology)?, text.trim()) {
        (Topology::Replication, _) => {
            refused("only topology Cluster has slots to balance: remove the annotation")
        }
        (Topology::Cluster, "") => {
            refused("allowed: any text, for example monday; another text is another request")
        }
        (Topology::Cluster, text) => Ok(Some(format!("rebalance@{}", within_bytes(key, text)?))),
    }
}

fn annotation_field(key: &str) -> String {
    format!("metadata.annotations[{key}]")
}

/// Labels and annotations that only the operator sets on pods.
fn reserved(field: &str, map: &BTreeMap<String, String>) -> Result<(), Invalid> {
    let ours = ["valkeeper.io/", "app.kubernetes.io/", "apps.kubernetes.io/", "statefulset.kubernetes.io/"];
    match map.keys().find(|key| ours.iter().any(|prefix| key.starts_with(prefix))) {
        Some(key) => Err(Invalid::new(field, key, "the operator sets keys with this prefix")),
        None => Ok(()),
    }
}

/// A spec is rendered for every shard and kept in memory: what is written into one by mistake must not be paid for by all.
fn size(spec: &api::ValkeyClusterSpec) -> Result<(), Invalid> {
    let bytes = serde_json::to_vec(spec).map_or(usize::MAX, |text| text.len());
    let allowed = format!("allowed: at most {SPEC_BYTES_MAX} bytes as JSON");
    let is_too_large = bytes > SPEC_BYTES_MAX;
    if is_too_large { Err(Invalid::new("spec", format!("{bytes} bytes"), allowed)) } else { Ok(()) }
}

fn version(image: &str, declared: Option<&str>) -> Result<ServerVersion, Invalid> {
    let (field, text) = match declared {
        Some(text) => ("spec.version", text),
        None => ("spec.image", tag(image)),
    };
    let allowed = "its tag does not say MAJOR.MINOR: set spec.version, for example 9.1";
    let version: ServerVersion = text
        .parse()
        .map_err(|_| Invalid::new(field, if declared.is_some() { text } else { image }, allowed))?;
    if version < VERSION_MIN {
        return Err(Invalid::new(field, text, format!("allowed: Valkey {VERSION_MIN} and later")));
    }
    Ok(version)
}

/// The tag of an image reference; empty if it has none. A port of the host is no tag, and a digest is none either.
fn tag(image: &str) -> &str {
    let path = image.split('@').next().unwrap_or(image);
    let last = path.rsplit('/').next().unwrap_or(path);
    last.split_once(':').map_or("", |(_, tag)| tag)
}

/// Reads every quantity; gives the memory limit in bytes.
fn resources(spec: &api::ValkeyClusterSpec) -> Result<Option<u64>, Invalid> {
    let Some(resources) = &spec.resources else { return Ok(None) };
    let none = BTreeMap::new();
    let (limits, requests) =
        (resources.limits.as_ref().unwrap_or(&none), resources.requests.as_ref().unwrap_or(&none));
    for (part, map) in [("limits", limits), ("requests", requests)] {
        for (name, value) in map {
            if quantity::units(&value.0).is_none() {
                let field = format!("spec.resources.{part}.{name}");
                return Err(Invalid::new(field, &value.0, "allowed: a quantity such as 500m or 2Gi"));
            }
        }
    }
    for (name, request) in requests {
        let limit = limits.get(name);
        if let Some(limit) = limit.filter(|limit| quantity::nanos(&limit.0) < quantity::nanos(&request.0)) {
            let field = format!("spec.resources.requests.{name}");
            return Err(Invalid::new(field, &request.0, format!("allowed: at most the limit, {}", limit.0)));
        }
    }
    let Some(limit) = limits.get("memory") else { return Ok(None) };
    let bytes = quantity::units(&limit.0).unwrap_or_default();
    if bytes < MEMORY_LIMIT_MIN_BYTES {
        return Err(Invalid::new("spec.resources.limits.memory", &limit.0, "allowed: 64Mi and more"));
    }
    Ok(Some(bytes))
}

fn volume(spec: &api::ValkeyClusterSpec) -> Result<Option<Volume>, Invalid> {
    let api::Persistence { enabled, size, storage_class_name, mode: _ } = &spec.persistence;
    let durable = spec.profile == api::Profile::Durable;
    if durable && *enabled == Some(false) {
        return Err(Invalid::new(
            "spec.persistence.enabled",
            false,
            "profile Durable needs a volume; use Cache",
        ));
    }
    if quantity::units(&size.0).is_none_or(|bytes| bytes == 0) {
        return Err(Invalid::new(
            "spec.persistence.size",
            &size.0,
            "allowed: a positive quantity such as 8Gi",
        ));
    }
    let wanted = enabled.unwrap_or(durable);
    Ok(wanted.then(|| Volume { size: size.0.clone(), class: storage_class_name.clone() }))
}

fn files(spec: &api::ValkeyClusterSpec, has_volume: bool) -> Files {
    match (has_volume, spec.persistence.mode, spec.profile) {
        (false, _, _) => Files::Nothing,
        (true, Some(api::PersistenceMode::Rdb), _) | (true, None, api::Profile::Cache) => Files::Rdb,
        (true, Some(api::PersistenceMode::RdbAof), _) | (true, None, api::Profile::Durable) => Files::RdbAof,
    }
}

fn settings(
    config: &BTreeMap<String, String>,
    version: ServerVersion,
    memory_limit_bytes: Option<u64>,
) -> Result<BTreeMap<String, Setting>, Invalid> {
    let mut settings = BTreeMap::new();
    let bytes: usize = config.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > CONFIG_BYTES_MAX {
        let allowed = format!("allowed: at most {CONFIG_BYTES_MAX} bytes in all");
        return Err(Invalid::new("spec.config", format!("{bytes} bytes"), allowed));
    }
    for (name, value) in config {
        let field = || format!("spec.config.{name}");
        // A value the operator does not understand may be a password that belongs elsewhere: it is not repeated.
        let shown = |refusal: &config::Refusal| match refusal {
            config::Refusal::Unknown | config::Refusal::Owned(_) => name,
            config::Refusal::Version { .. } | config::Refusal::Value { .. } => value,
        };
        let setting = config::read(name, value, version)
            .map_err(|refusal| Invalid::new(field(), shown(&refusal), refusal.to_string()))?;
        if let (Setting::Bytes(bytes), "maxmemory", Some(limit)) =
            (&setting, name.as_str(), memory_limit_bytes)
            && (*bytes >= limit || *bytes == 0)
        {
            let allowed = format!("allowed: less than the memory limit, {limit} bytes, and not 0");
            return Err(Invalid::new(field(), value, allowed));
        }
        settings.insert(name.clone(), setting);
    }
    Ok(settings)
}

#[cfg(test)]
mod tests;

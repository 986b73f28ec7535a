//! Metrics in Prometheus' text form. What INFO says has the names that redis_exporter gives it, so that dashboards that
//! exist go on working; what only the agent knows begins with `valkeeper_agent_`.

use crate::shared::Agent;
use std::{collections::BTreeMap, fmt::Write};
use valkeeper_core::observation::Gate;

/// Largest number of lines taken from one answer: databases and replicas are a line each, and a thousand are many.
const LINES_MAX: usize = 5_000;

/// (field of INFO, name of the metric without `redis_`), gauges.
const GAUGES: &[(&str, &str)] = &[
    ("uptime_in_seconds", "uptime_in_seconds"),
    ("connected_clients", "connected_clients"),
    ("blocked_clients", "blocked_clients"),
    ("maxclients", "config_maxclients"),
    ("tracking_clients", "tracking_clients"),
    ("used_memory", "memory_used_bytes"),
    ("used_memory_rss", "memory_used_rss_bytes"),
    ("used_memory_peak", "memory_used_peak_bytes"),
    ("used_memory_lua", "memory_used_lua_bytes"),
    ("used_memory_overhead", "memory_used_overhead_bytes"),
    ("used_memory_dataset", "memory_used_dataset_bytes"),
    ("used_memory_startup", "memory_used_startup_bytes"),
    ("used_memory_scripts", "memory_used_scripts_bytes"),
    ("maxmemory", "memory_max_bytes"),
    ("mem_fragmentation_ratio", "mem_fragmentation_ratio"),
    ("mem_clients_normal", "mem_clients_normal"),
    ("mem_clients_slaves", "mem_clients_slaves"),
    ("loading", "loading_dump_file"),
    ("rdb_changes_since_last_save", "rdb_changes_since_last_save"),
    ("rdb_bgsave_in_progress", "rdb_bgsave_in_progress"),
    ("rdb_last_save_time", "rdb_last_save_timestamp_seconds"),
    ("rdb_last_bgsave_time_sec", "rdb_last_bgsave_duration_sec"),
    ("aof_enabled", "aof_enabled"),
    ("aof_rewrite_in_progress", "aof_rewrite_in_progress"),
    ("aof_current_size", "aof_current_size_bytes"),
    ("instantaneous_ops_per_sec", "instantaneous_ops_per_sec"),
    ("latest_fork_usec", "latest_fork_usec"),
    ("pubsub_channels", "pubsub_channels"),
    ("pubsub_patterns", "pubsub_patterns"),
    ("connected_slaves", "connected_slaves"),
    ("master_repl_offset", "master_repl_offset"),
    ("slave_repl_offset", "slave_repl_offset"),
    ("slave_priority", "slave_priority"),
    ("second_repl_offset", "second_repl_offset"),
    ("master_last_io_seconds_ago", "master_last_io_seconds_ago"),
    ("master_sync_in_progress", "master_sync_in_progress"),
    ("repl_backlog_active", "repl_backlog_is_active"),
    ("repl_backlog_size", "replication_backlog_bytes"),
    ("repl_backlog_first_byte_offset", "repl_backlog_first_byte_offset"),
    ("repl_backlog_histlen", "repl_backlog_history_bytes"),
    ("cluster_enabled", "cluster_enabled"),
];

/// As above, counters.
const COUNTERS: &[(&str, &str)] = &[
    ("total_connections_received", "connections_received_total"),
    ("rejected_connections", "rejected_connections_total"),
    ("total_commands_processed", "commands_processed_total"),
    ("total_net_input_bytes", "net_input_bytes_total"),
    ("total_net_output_bytes", "net_output_bytes_total"),
    ("total_error_replies", "total_error_replies"),
    ("keyspace_hits", "keyspace_hits_total"),
    ("keyspace_misses", "keyspace_misses_total"),
    ("expired_keys", "expired_keys_total"),
    ("evicted_keys", "evicted_keys_total"),
    ("sync_full", "replica_resyncs_full"),
    ("sync_partial_ok", "replica_partial_resync_accepted"),
    ("sync_partial_err", "replica_partial_resync_denied"),
    ("used_cpu_sys", "cpu_sys_seconds_total"),
    ("used_cpu_user", "cpu_user_seconds_total"),
];

/// (field, its good value, name): 1 if it has that value.
const STATES: &[(&str, &str, &str)] = &[
    ("rdb_last_bgsave_status", "ok", "rdb_last_bgsave_status"),
    ("aof_last_bgrewrite_status", "ok", "aof_last_bgrewrite_status"),
    ("aof_last_write_status", "ok", "aof_last_write_status"),
    ("master_link_status", "up", "master_link_up"),
];

/// The page.
pub async fn page(agent: &Agent) -> String {
    let mut out = String::new();
    match agent.local.info_text().await {
        Ok(text) => {
            metric(&mut out, "gauge", "redis_up", "", "1");
            server(&mut out, &text);
        }
        Err(_) => metric(&mut out, "gauge", "redis_up", "", "0"),
    }
    own(&mut out, agent);
    out
}

fn metric(out: &mut String, kind: &str, name: &str, labels: &str, value: &str) {
    let head = format!("# TYPE {name} {kind}\n");
    if !out.contains(&head) {
        out.push_str(&head);
    }
    let braced = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{name}{braced} {value}");
}

/// A label whose value cannot end it.
fn label(name: &str, value: &str) -> String {
    let escaped = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("{name}=\"{escaped}\"")
}

fn server(out: &mut String, text: &str) {
    let lines = text.lines().take(LINES_MAX).filter_map(|line| line.split_once(':'));
    let fields: BTreeMap<&str, &str> = lines.map(|(name, value)| (name, value.trim())).collect();
    for (kind, table) in [("gauge", GAUGES), ("counter", COUNTERS)] {
        for (field, name) in table {
            // A number and nothing else: the text is a server's.
            if let Some(value) = fields.get(field).filter(|value| value.parse::<f64>().is_ok()) {
                metric(out, kind, &format!("redis_{name}"), "", value);
            }
        }
    }
    for (field, good, name) in STATES {
        if let Some(value) = fields.get(field) {
            metric(out, "gauge", &format!("redis_{name}"), "", if value == good { "1" } else { "0" });
        }
    }
    let get = |name: &str| fields.get(name).copied().unwrap_or_default();
    let own = if get("valkey_version").is_empty() { get("redis_version") } else { get("valkey_version") };
    let labels = [
        label("role", get("role")),
        label("redis_version", own),
        label("redis_mode", get("redis_mode")),
        label("os", get("os")),
        label("tcp_port", get("tcp_port")),
        label("run_id", get("run_id")),
        label("process_id", get("process_id")),
        label("maxmemory_policy", get("maxmemory_policy")),
    ];
    metric(out, "gauge", "redis_instance_info", &labels.join(","), "1");
    databases(out, &fields);
    replicas(out, &fields);
}

/// The value of `name=` in a list with commas, if it is a number.
fn part<'a>(list: &'a str, name: &str) -> Option<&'a str> {
    let value = list.split(',').find_map(|part| part.strip_prefix(name)?.strip_prefix('='))?;
    value.parse::<f64>().is_ok().then_some(value)
}

fn databases(out: &mut String, fields: &BTreeMap<&str, &str>) {
    for (part_name, name) in [("keys", "redis_db_keys"), ("expires", "redis_db_keys_expiring")] {
        for (field, value) in fields {
            let is_database = field.strip_prefix("db").is_some_and(|n| n.parse::<u32>().is_ok());
            if let Some(value) = part(value, part_name).filter(|_| is_database) {
                metric(out, "gauge", name, &label("db", field), value);
            }
        }
    }
}

fn replicas(out: &mut String, fields: &BTreeMap<&str, &str>) {
    for (part_name, name) in
        [("offset", "redis_connected_slave_offset_bytes"), ("lag", "redis_connected_slave_lag_seconds")]
    {
        for (field, value) in fields {
            let is_replica = field.strip_prefix("slave").is_some_and(|n| n.parse::<u32>().is_ok());
            if let Some(number) = part(value, part_name).filter(|_| is_replica) {
                let ip = value.split(',').find_map(|part| part.strip_prefix("ip=")).unwrap_or_default();
                metric(out, "gauge", name, &label("slave_ip", ip), number);
            }
        }
    }
}

fn own(out: &mut String, agent: &Agent) {
    let state = agent.state();
    let flag = |is: bool| if is { "1" } else { "0" };
    let (holding, restarts, away, confirmations, relays) = agent.read(|known| {
        let holding = matches!(known.gate, Gate::Holding(_));
        (holding, known.restarts, known.operator_away(), known.confirmations, known.relays)
    });
    let grant = state.brief.as_ref().map_or(0, |brief| brief.grant).to_string();
    for (kind, name, value) in [
        ("gauge", "grant", grant.as_str()),
        ("gauge", "writes_stopped", flag(state.writes_stopped)),
        ("gauge", "gate_holding", flag(holding)),
        ("gauge", "operator_away", flag(away)),
        ("gauge", "leaving", flag(state.leaving)),
        ("gauge", "disk_full", flag(state.disk_full)),
        ("gauge", "relaying", flag(relays)),
        ("counter", "relayed_connections_total", &agent.relay.taken().to_string()),
        ("counter", "server_restarts_total", &restarts.to_string()),
        ("counter", "oom_kills_total", &state.oom_kills.to_string()),
        ("counter", "confirmations_total", &confirmations.to_string()),
        ("counter", "consents_total", &state.consents.to_string()),
        ("gauge", "certificate_expiry_timestamp_seconds", &state.certificate_not_after.to_string()),
        (
            "gauge",
            "server_silent_seconds",
            &format!("{}.{:03}", state.silent_ms / 1_000, state.silent_ms % 1_000),
        ),
    ] {
        metric(out, kind, &format!("valkeeper_agent_{name}"), "", value);
    }
    metric(out, "gauge", "valkeeper_agent_info", &label("version", &state.version), "1");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_info_says_has_the_names_that_dashboards_know() {
        let mut out = String::new();
        let text = "# Server\r\nvalkey_version:9.1.2\r\nrun_id:abc\r\nrole:master\r\nconnected_clients:3\r\n\
            maxmemory_policy:a\"b\r\ntotal_commands_processed:12\r\nused_memory:lots\r\nrdb_last_bgsave_status:ok\r\n\
            slave0:ip=10.0.0.2,port=6379,state=online,offset=70,lag=1,type=replica\r\n\
            db0:keys=5,expires=1,avg_ttl=0\r\ndb1:keys=6,expires=0,avg_ttl=0\r\n";
        server(&mut out, text);
        for line in [
            "redis_connected_clients 3",
            "redis_commands_processed_total 12",
            "redis_rdb_last_bgsave_status 1",
            "redis_db_keys{db=\"db0\"} 5",
            "redis_db_keys{db=\"db1\"} 6",
            "redis_connected_slave_offset_bytes{slave_ip=\"10.0.0.2\"} 70",
        ] {
            assert!(out.lines().any(|l| l == line), "{line} in {out}");
        }
        assert!(out.contains("maxmemory_policy=\"a\\\"b\""), "{out}");
        assert!(!out.contains("lots"), "what is no number is left out: {out}");
        assert_eq!(out.matches("# TYPE redis_db_keys gauge").count(), 1);
    }
}

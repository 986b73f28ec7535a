//! `at SEQ|TIME`: what was known at that moment: a fold of the records up to it and nothing else.

use crate::{
    Error,
    history::History,
    line,
    moment::Moment,
    report::{Finding, Report},
    table::Table,
};
use serde::Serialize;
use std::fmt::Write;
use valkeeper_core::{
    decision::Operation,
    effect::short,
    ids::{MemberId, ShardId},
    observation::Observed,
    state::{ClusterState, MemberState, Pending, ShardState},
};

/// What was known.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct StateAt(pub ClusterState);

/// Folds what there is up to and including a moment. Errors: as [`History::at`].
pub fn at(history: &History, moment: Moment) -> Result<StateAt, Error> {
    history.at(moment).map(StateAt)
}

impl Report for StateAt {
    fn text(&self) -> String {
        let state = &self.0;
        let mut text = String::new();
        let ClusterState { cluster_uid, namespace, name, head, head_time, epoch, spec, spec_error, .. } =
            state;
        let _ = writeln!(
            text,
            "{namespace}/{name} (uid {cluster_uid}) at record {head}, {head_time}, epoch {epoch}"
        );
        let spec = spec.as_ref().map_or_else(|| "never seen".to_owned(), line::spec);
        let looked = if state.spec_seen { "" } else { " (not looked at in this epoch)" };
        let _ = writeln!(text, "spec     {spec}{looked}");
        if let Some(why) = spec_error {
            let _ = writeln!(text, "refused  {why}");
        }
        let _ = writeln!(text, "standing {}", line::standing(&state.standing));
        let _ = write!(text, "\n{}", members(state).aligned());
        let _ = write!(text, "\n{}", shards(state).aligned());
        nodes(state, &mut text);
        if !state.operations.is_empty() {
            let _ = write!(text, "\n{}", operations(state).aligned());
        }
        if !state.pending.is_empty() {
            text.push('\n');
        }
        for (seq, Pending { decision, epoch: decided_in }) in &state.pending {
            let doubt = if decided_in < epoch { " (in doubt: its epoch is over)" } else { "" };
            let _ = writeln!(text, "open decision {seq}{doubt}: {}", line::decision(decision));
        }
        if !state.objects.is_empty() {
            let mut table = Table::new(["object", "state"]);
            for (object, facts) in &state.objects {
                table.push([object.to_string(), line::object_facts(facts)]);
            }
            let _ = write!(text, "\n{}", table.aligned());
        }
        text
    }

    fn csv(&self) -> Option<String> {
        Some(members(&self.0).csv())
    }

    fn finding(&self) -> Finding {
        Finding::Clean
    }
}

fn members(state: &ClusterState) -> Table<9> {
    let mut table =
        Table::new(["member", "server", "history", "run", "for", "pod", "node", "address", "grant"]);
    for (id, member) in &state.members {
        table.push(member_row(state, *id, member));
    }
    table
}

fn member_row(state: &ClusterState, id: MemberId, member: &MemberState) -> [String; 9] {
    let server = match &member.facts.server {
        Observed::Unknown(cause) => line::why(*cause).to_owned(),
        Observed::Absent => "gone".to_owned(),
        Observed::Present(facts) if facts.loading => format!("{}, loading", line::role(&facts.role)),
        Observed::Present(facts) => line::role(&facts.role),
    };
    let pod = match &member.facts.pod {
        Observed::Unknown(cause) => line::why(*cause).to_owned(),
        Observed::Absent => "gone".to_owned(),
        Observed::Present(facts) if facts.deleting => {
            format!("{}, deleting", line::container(&facts.container))
        }
        Observed::Present(facts) => line::container(&facts.container),
    };
    let history = member.server().map(|s| short(&s.replid.0).to_owned());
    let run = member.server().map(|s| short(&s.run_id).to_owned());
    let node = member.facts.pod.present().map(|p| p.node.clone());
    let grant = state.shards.get(&id.shard).and_then(|shard| grant(shard, id));
    [
        id.to_string(),
        server,
        or_dash(history),
        or_dash(run),
        duration(state.head_time.millis_since(member.server_since)),
        pod,
        or_dash(node),
        or_dash(member.address().map(str::to_owned)),
        or_dash(grant),
    ]
}

fn grant(shard: &ShardState, id: MemberId) -> Option<String> {
    let number = shard.grants.get(&id)?;
    let in_force = shard.holder().is_some_and(|(holder, _)| holder == id);
    Some(if in_force { format!("{number} (in force)") } else { number.to_string() })
}

fn shards(state: &ClusterState) -> Table<4> {
    let mut table = Table::new(["shard", "grant", "primaries seen", "write route"]);
    for (id, shard) in &state.shards {
        let holder = shard.holder().map(|(member, number)| format!("{member} (number {number})"));
        let seen: Vec<String> = state
            .members_of(*id)
            .filter(|(_, m)| m.is_primary())
            .map(|(member, _)| member.to_string())
            .collect();
        let seen = (!seen.is_empty()).then(|| seen.join(", "));
        table.push([id.to_string(), or_dash(holder), or_dash(seen), route(state, *id, shard)]);
    }
    table
}

fn route(state: &ClusterState, id: ShardId, shard: &ShardState) -> String {
    match &shard.route {
        Observed::Unknown(cause) => line::why(*cause).to_owned(),
        Observed::Absent => "missing".to_owned(),
        Observed::Present(route) => {
            let Some(address) = &route.address else { return "nobody".to_owned() };
            let member = state.members_of(id).find(|(_, m)| m.address() == Some(address));
            member.map_or_else(
                || format!("{address} (no member)"),
                |(member, _)| format!("{member} ({address})"),
            )
        }
    }
}

/// Of a Valkey Cluster: the members' nodes as they said last, and which slots are whose.
fn nodes(state: &ClusterState, text: &mut String) {
    let said: Vec<String> =
        state.members.iter().filter_map(|(id, m)| Some(line::node(*id, m.node()?))).collect();
    let owners = state.shards.iter().filter(|(_, shard)| !shard.slots.is_empty());
    let owned = owners.map(|(id, shard)| format!("shard {id} slots {}", shard.slots));
    for (at, line) in said.into_iter().chain(owned).enumerate() {
        let gap = if at == 0 { "\n" } else { "" };
        let _ = writeln!(text, "{gap}{line}");
    }
}

fn operations(state: &ClusterState) -> Table<8> {
    let mut table =
        Table::new(["operation", "scope", "cause", "phase", "member", "asked by", "open for", "opened at"]);
    for operation in &state.operations {
        let Operation {
            id,
            kind,
            scope,
            phase,
            asked_by,
            word: _,
            member,
            opened_at,
            phase_since: _,
            cause,
            slots_moved,
            settled: _,
        } = operation;
        let moved = (*slots_moved > 0).then(|| format!(" ({slots_moved} slots so far)"));
        table.push([
            format!("{kind:?} {id}"),
            scope.to_string(),
            cause.to_string(),
            format!("{phase:?}{}", moved.unwrap_or_default()),
            or_dash(member.map(|m| m.to_string())),
            asked_by.clone(),
            duration(state.head_time.millis_since(*opened_at)),
            opened_at.to_string(),
        ]);
    }
    table
}

fn or_dash(cell: Option<String>) -> String {
    cell.unwrap_or_else(|| "-".to_owned())
}

/// Milliseconds in the largest unit that leaves a number above 1.
fn duration(ms: i64) -> String {
    match ms {
        ms if ms < 1_000 => format!("{ms} ms"),
        ms if ms < 120_000 => format!("{}.{} s", ms / 1_000, ms / 100 % 10),
        ms if ms < 7_200_000 => format!("{} m", ms / 60_000),
        ms => format!("{} h", ms / 3_600_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::story;

    fn told(moment: &str) -> String {
        at(&story::failover().into(), moment.parse().unwrap()).unwrap().text()
    }

    #[test]
    fn at_the_loss_the_operation_is_open_and_the_new_grant_not_yet_in_force() {
        let text = told("13");
        assert!(
            text.starts_with(
                "demo/orders (uid 5f0c1d2e-uid) at record 13, 2026-11-21T03:01:00.000Z, epoch 1\n"
            )
        );
        for expected in [
            "0-0     gone                     -         -      0 ms    running  node-0  10.0.0.1  11 (in force)\n",
            "10.0.0.2  13\n",
            "0      0-0 (number 11)  -               0-0 (10.0.0.1)\n",
            "Failover 13  shard 0  PrimaryGone  Promoting  0-0     operator  0 ms      2026-11-21T03:01:00.000Z\n",
            "open decision 13: PrimaryGone 0-0",
        ] {
            assert!(text.contains(expected), "{expected:?} in\n{text}");
        }
    }

    #[test]
    fn nodes_of_a_valkey_cluster_and_whose_slots_are_whose_are_told() {
        let text = at(&story::clustered().0.into(), "13".parse().unwrap()).unwrap().text();
        assert!(text.contains("\n\n0-0 node aaaaaaaa primary, epoch 3, 5461 slots, knows 2, "), "{text}");
        assert!(text.contains("\nshard 0 slots 0-5460\n"), "{text}");
        assert!(!told("22").contains(" slots "), "{}", told("22"));
    }

    #[test]
    fn a_time_means_the_last_record_up_to_it() {
        assert_eq!(told("03:00:30"), told("11"));
        assert_eq!(told("03:01:00.020"), told("18"));
    }

    #[test]
    fn there_is_no_state_before_history_or_beyond_the_end() {
        let records = History::from(story::failover());
        let early = at(&records, "2020-01-01".parse().unwrap()).unwrap_err();
        assert_eq!(early.to_string(), "history begins at 2026-11-21T03:00:00.000Z");
        assert!(at(&records, "23".parse().unwrap()).unwrap_err().is_usage());
        assert!(at(&records, "0".parse().unwrap()).is_err());
    }

    #[test]
    fn the_state_as_json_reads_back_as_the_same_state() {
        let state = at(&story::failover().into(), "22".parse().unwrap()).unwrap();
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<ClusterState>(&json).unwrap(), state.0);
    }
}

//! One record as one line for people. What a line says is a function of the record; [`Joined`] adds what only another
//! record knows: which effects an outcome belongs to.

mod slots;

pub use slots::node;

use crate::history::History;
use slots::weighed;
use std::collections::BTreeMap;
use valkeeper_core::{
    decision::{Block, Candidate, Decision, Discard, OperationChange, Scope, Standing, Wait},
    effect::{Effect, Promotion, short},
    event::{BaselineOrigin, CloseReason, Event, Record},
    ids::{Digest, MemberId, Seq, ShardId},
    observation::{
        AgentFacts, ContainerPhase, Executed, Gate, Link, LiveObject, NodeHealth, ObjectFacts, ObjectRef,
        Observed, PodFacts, RouteFacts, ServerFacts, ServerProcess, ServerRole, Source, SpecFact, Why,
    },
    spec::{Balance, DesiredCluster, IoThreads},
};

/// `seq  kind  text` of a record, aligned, without its time.
pub fn line(record: &Record) -> String {
    format!("{:>5}  {:<8}  {}", record.seq.0, kind(&record.event), text(record))
}

/// [`line`] of each record, outcomes joined with their effects.
pub fn lines(history: &History) -> Vec<String> {
    let joined = Joined::new(history);
    history
        .records()
        .iter()
        .map(|r| format!("{:>5}  {:<8}  {}", r.seq.0, kind(&r.event), joined.text(r)))
        .collect()
}

/// The kind of an event in one short word.
pub fn kind(event: &Event) -> &'static str {
    match event {
        Event::Baseline { .. } => "baseline",
        Event::EpochStarted { .. } => "epoch",
        Event::SpecChanged(_) => "spec",
        Event::PodChanged { .. } => "pod",
        Event::ServerChanged { .. } => "server",
        Event::AgentChanged { .. } => "agent",
        Event::NodeChanged { .. } => "node",
        Event::SlotsWeighed { .. } => "weighed",
        Event::RouteChanged { .. } => "route",
        Event::ObjectChanged { .. } => "object",
        Event::Decided { .. } => "decided",
        Event::EffectsEnded(_) => "effects",
        Event::DecisionClosed { .. } => "closed",
        Event::StandingChanged { .. } => "standing",
        Event::Trimmed { .. } => "trimmed",
        Event::LevelRaised { .. } => "level",
    }
}

/// What happened, without sequence, kind and time.
pub fn text(record: &Record) -> String {
    match &record.event {
        Event::Baseline { cluster_uid, namespace, name, origin } => {
            baseline(cluster_uid, namespace, name, *origin)
        }
        Event::EpochStarted { writer, version, lost_through } => {
            let lost =
                lost_through.map(|seq| format!("; a person accepted that records up to {seq} are LOST"));
            format!("epoch {} by {writer} ({version}){}", record.epoch, lost.unwrap_or_default())
        }
        Event::SpecChanged(SpecFact::Valid(wanted)) => spec(wanted),
        Event::SpecChanged(SpecFact::Invalid(why)) => format!("refused: {why}"),
        Event::SpecChanged(SpecFact::Deleting) => "the resource is being deleted".to_owned(),
        Event::PodChanged { member, pod: facts } => pod(*member, facts),
        Event::ServerChanged { member, server: facts } => server(*member, facts),
        Event::AgentChanged { member, agent: facts } => agent(*member, facts),
        Event::NodeChanged { member, node: facts } => node(*member, facts),
        Event::SlotsWeighed { member, weights } => weighed(*member, weights.as_ref()),
        Event::RouteChanged { shard, route: facts } => route(*shard, facts),
        Event::ObjectChanged { object: name, facts } => object(name, facts),
        Event::Decided { decision: made, evidence: _ } => decision(made),
        Event::EffectsEnded(ended) => outcomes(ended, None),
        Event::DecisionClosed { decision, how: CloseReason::Superseded } => format!("{decision} superseded"),
        Event::DecisionClosed { decision, how: CloseReason::Reissued } => format!("{decision} decided again"),
        Event::StandingChanged { standing: now, evidence: _ } => standing(now),
        Event::Trimmed { through, hash: _, folded, archive } => trimmed(*through, folded, archive.as_deref()),
        Event::LevelRaised { level, version } => format!("level {level} from here on, by {version}"),
    }
}

/// Lines of a whole stream: outcomes are shown with the effects of the decision that they belong to.
pub struct Joined<'a> {
    decisions: BTreeMap<Seq, &'a Decision>,
    ends: BTreeMap<Seq, &'a Record>,
}

impl<'a> Joined<'a> {
    /// Remembers the decisions of a stream and what ended them; those that were open when its beginning was cut, too.
    pub fn new(history: &'a History) -> Self {
        let records = history.records();
        let open = history.start().pending.iter().map(|(seq, pending)| (*seq, &pending.decision));
        let decisions = open.chain(records.iter().filter_map(|r| decided(r).map(|d| (r.seq, d)))).collect();
        Joined { decisions, ends: records.iter().filter_map(|r| ends(r).map(|seq| (seq, r))).collect() }
    }

    /// The record that ended or closed the decision recorded at this sequence.
    pub fn end(&self, seq: Seq) -> Option<&'a Record> {
        self.ends.get(&seq).copied()
    }

    /// The decision recorded at this sequence.
    pub fn decision(&self, seq: Seq) -> Option<&'a Decision> {
        self.decisions.get(&seq).copied()
    }

    /// The decisions recorded before this sequence.
    pub fn decisions_before(&self, seq: Seq) -> impl Iterator<Item = &'a Decision> {
        self.decisions.range(..seq).map(|(_, decision)| *decision)
    }

    /// As [`text`], with outcomes joined.
    pub fn text(&self, record: &Record) -> String {
        match ended(record) {
            Some(executed) => outcomes(executed, self.decision(executed.decision)),
            None => text(record),
        }
    }
}

/// The decision in a record, if it is one.
pub fn decided(record: &Record) -> Option<&Decision> {
    record.event.decided()
}

/// The outcomes in a record, if it has some.
pub fn ended(record: &Record) -> Option<&Executed> {
    if let Event::EffectsEnded(executed) = &record.event { Some(executed) } else { None }
}

/// The decision that a record ends or closes.
fn ends(record: &Record) -> Option<Seq> {
    if let Event::DecisionClosed { decision, how: _ } = &record.event {
        return Some(*decision);
    }
    ended(record).map(|executed| executed.decision)
}

/// Where the beginning of a stream is, in a few words.
pub fn trimmed(through: Seq, folded: &Digest, archive: Option<&str>) -> String {
    let archived = archive.map_or_else(|| "not archived".to_owned(), |name| format!("archived in {name}"));
    format!("records 1 to {through} left the store, folded to {}; {archived}", short(&folded.0))
}

fn baseline(uid: &str, namespace: &str, name: &str, origin: BaselineOrigin) -> String {
    let before = match origin {
        BaselineOrigin::Empty => "new cluster",
        BaselineOrigin::Observed => "history begins here; the cluster was there before",
    };
    format!("{namespace}/{name} (uid {uid}): {before}")
}

/// A valid spec on one line.
pub fn spec(wanted: &DesiredCluster) -> String {
    let DesiredCluster {
        generation,
        topology,
        shards,
        replicas_per_shard,
        profile,
        failover,
        switchover,
        confirm_blank,
        volatile,
        paused,
        io_threads,
        balance,
        rebalance,
        version,
        settings,
        refused,
    } = wanted;
    let mut parts = vec![
        format!("generation {generation}: {topology:?}"),
        format!("{shards} x {} members", replicas_per_shard.saturating_add(1)),
        format!("{profile:?}"),
        format!("failover {:?} after {} ms", failover.mode, failover.detection_window_ms),
    ];
    parts.extend(volatile.then(|| "in memory alone".to_owned()));
    parts.extend(switchover.as_ref().map(|w| format!("switchover to {} ({})", w.to, w.token)));
    parts.extend(confirm_blank.as_ref().map(|token| format!("blank confirmed ({token})")));
    parts.extend(paused.then(|| "paused".to_owned()));
    parts.extend((*io_threads == IoThreads::On).then(|| "with I/O threads".to_owned()));
    parts.extend(
        (*balance != Balance::Slots).then(|| format!("even by {}", format!("{balance:?}").to_lowercase())),
    );
    parts.extend(rebalance.as_ref().map(|token| format!("slots evened out ({token})")));
    parts.extend(version.as_ref().map(|version| format!("of version {version}")));
    let named = settings.iter().flat_map(|settings| &settings.named);
    parts.extend(named.map(|(name, value)| format!("{name} {value}")));
    parts.extend(refused.as_ref().map(|why| format!("refused: {why}")));
    parts.join(", ")
}

/// Why something is not known, in a few words.
pub fn why(why: Why) -> &'static str {
    match why {
        Why::NotLooked => "not looked at",
        Why::Silent => "silent",
        Why::Unauthorized => "refuses the operator's credentials",
        Why::Garbled => "answers garbled",
        Why::ApiError => "unknown (API error)",
    }
}

fn pod(member: MemberId, pod: &Observed<PodFacts>) -> String {
    match pod {
        Observed::Unknown(cause) => format!("{member} pod {}", why(*cause)),
        Observed::Absent => format!("{member} pod gone"),
        Observed::Present(facts) => format!("{member} pod {}", pod_facts(facts)),
    }
}

fn pod_facts(facts: &PodFacts) -> String {
    let PodFacts {
        uid,
        address,
        node,
        node_health,
        cordoned,
        deleting,
        revision,
        container: phase,
        role_label,
        trouble,
    } = facts;
    let mut parts =
        vec![if *deleting { format!("deleting, {}", container(phase)) } else { container(phase) }];
    if !node.is_empty() {
        let health = match node_health {
            NodeHealth::Ready => "",
            NodeHealth::NotReady => " (not ready)",
        };
        let cordon = if *cordoned { " (cordoned)" } else { "" };
        parts.push(format!("on {node}{health}{cordon}"));
    }
    parts.extend(address.as_ref().map(|a| format!("at {a}")));
    parts.push(format!("(uid {}, revision {})", short(uid), short(&revision.0)));
    parts.extend(role_label.map(|role| format!("labelled {}", role.as_str())));
    parts.extend(trouble.as_ref().map(|words| format!("does not run: {words}")));
    parts.join(" ")
}

/// Phase of a container in a few words.
pub fn container(phase: &ContainerPhase) -> String {
    match phase {
        ContainerPhase::Waiting(reason) if reason.is_empty() => "waiting".to_owned(),
        ContainerPhase::Waiting(reason) => format!("waiting ({reason})"),
        ContainerPhase::Running => "running".to_owned(),
        ContainerPhase::Terminated(code) => format!("ended with {code}"),
    }
}

/// What is known of a server, in a few words.
pub fn server(member: MemberId, server: &Observed<ServerFacts>) -> String {
    match server {
        Observed::Unknown(cause) => format!("{member} server {}", why(*cause)),
        Observed::Absent => format!("{member} server gone"),
        Observed::Present(facts) => {
            let ServerFacts { run_id, version, role: says, loading, replid, replid2: _, replid2_offset: _ } =
                facts;
            let loading = if *loading { ", loading" } else { "" };
            let (run, history) = (short(run_id), short(&replid.0));
            format!("{member} {}{loading}, history {history} (run {run}, {version})", role(says))
        }
    }
}

/// An agent in a few words.
pub fn agent(member: MemberId, agent: &Observed<AgentFacts>) -> String {
    let facts = match agent {
        Observed::Unknown(cause) => return format!("{member} agent {}", why(*cause)),
        Observed::Absent => return format!("{member} agent gone"),
        Observed::Present(facts) => facts,
    };
    let AgentFacts {
        version,
        brief,
        consents,
        run_id,
        server,
        drawn,
        gate,
        leaving,
        relays,
        start_failure,
        disk_full,
        oom_kills,
        writes_stopped,
        certificate,
        settings,
    } = facts;
    let mut said = vec![match server {
        ServerProcess::Running => format!("server runs ({})", short(run_id)),
        ServerProcess::Silent { since } => format!("server silent since {since}"),
        ServerProcess::Exited(how) => format!("server ended: {how}"),
    }];
    said.push(match gate {
        Gate::Holding(reason) => format!("holds it at the gate: {reason}"),
        Gate::Commanded => "gate opened by the operator".to_owned(),
        Gate::Resumed => "resumed by itself".to_owned(),
        Gate::Attached(to) => format!("attached itself to {to}"),
    });
    said.push(match brief.holder {
        Some(holder) => format!("grant {} is {holder}'s", brief.grant),
        None => "knows of no grant".to_owned(),
    });
    said.extend(drawn.is_some().then(|| "started without data".to_owned()));
    said.extend((*consents > 0).then(|| format!("consented {consents} times")));
    said.extend(leaving.then(|| "is leaving".to_owned()));
    said.extend(relays.then(|| "passes clients on".to_owned()));
    said.extend(start_failure.as_ref().map(|words| format!("its server does not start ({words})")));
    said.extend(disk_full.then(|| "DISK FULL".to_owned()));
    said.extend((*oom_kills > 0).then(|| format!("{oom_kills} processes killed for want of memory")));
    said.extend(writes_stopped.then(|| "WRITES STOPPED".to_owned()));
    said.extend(settings.as_ref().map(|digest| format!("settings {}", short(&digest.0))));
    let until = (!certificate.thumbprint.is_empty())
        .then(|| format!("certificate {} until {}", short(&certificate.thumbprint), certificate.not_after));
    said.extend(until);
    format!("{member} agent {version}: {}", said.join(", "))
}

/// A role in a few words.
pub fn role(role: &ServerRole) -> String {
    match role {
        ServerRole::Primary => "primary".to_owned(),
        ServerRole::Replica { source: Source::Gate { had_history: true }, link: _ } => {
            "at the gate".to_owned()
        }
        ServerRole::Replica { source: Source::Gate { had_history: false }, link: _ } => {
            "at the gate, blank".to_owned()
        }
        ServerRole::Replica { source: Source::Member(of), link: state } => {
            format!("replica of {of}, {}", link(*state))
        }
        ServerRole::Replica { source: Source::Foreign(of), link: state } => {
            format!("replica of foreign {of}, {}", link(*state))
        }
    }
}

fn link(link: Link) -> &'static str {
    match link {
        Link::Up => "link up",
        Link::Down => "link down",
        Link::Syncing => "syncing",
    }
}

/// Where the write Service of a shard points, in a few words.
pub fn route(shard: ShardId, route: &Observed<RouteFacts>) -> String {
    match route {
        Observed::Unknown(cause) => format!("shard {shard} route {}", why(*cause)),
        Observed::Absent => format!("shard {shard} route missing"),
        Observed::Present(RouteFacts { address: Some(address), resource_version }) => {
            format!("shard {shard} route to {address} (resourceVersion {resource_version})")
        }
        Observed::Present(RouteFacts { address: None, resource_version }) => {
            format!("shard {shard} route to nobody (resourceVersion {resource_version})")
        }
    }
}

fn object(name: &ObjectRef, facts: &ObjectFacts) -> String {
    format!("{name} {}", object_facts(facts))
}

/// How an owned object is, in a few words.
pub fn object_facts(facts: &ObjectFacts) -> String {
    let ObjectFacts { wanted, wanted_revision: _, shard: _, vital: _, surplus, live } = facts;
    match live {
        Observed::Unknown(cause) => why(*cause).to_owned(),
        Observed::Absent if *surplus => "gone".to_owned(),
        Observed::Present(_) if *surplus => "not wanted any more".to_owned(),
        Observed::Absent => format!("missing (wanted {})", short(&wanted.0)),
        Observed::Present(LiveObject { taken_by: Some(owner), .. }) => format!("belongs to {owner}"),
        Observed::Present(live) if live.digest == *wanted => {
            let refused = live.pods_refused.as_ref().map(|words| format!(", its pods are not made: {words}"));
            format!("as wanted ({}){}", short(&wanted.0), refused.unwrap_or_default())
        }
        Observed::Present(live) => {
            let by = live
                .foreign_manager
                .as_ref()
                .map(|who| format!(", last written by {who}"))
                .unwrap_or_default();
            format!("differs (is {}, wanted {}{by})", short(&live.digest.0), short(&wanted.0))
        }
    }
}

/// A decision on one line: reason, whom it is about, what it does to an operation, its effects, what is lost.
pub fn decision(decision: &Decision) -> String {
    let about = match (decision.about, decision.scope) {
        (Some(member), _) => format!(" {member}"),
        (None, Scope::Shard(id)) => format!(" shard {id}"),
        (None, Scope::Cluster) => String::new(),
    };
    let operation =
        decision.operation.as_ref().map(|change| format!(" [{}]", operation(change))).unwrap_or_default();
    let again = decision.reissue_of.map(|seq| format!(" (again as {seq})")).unwrap_or_default();
    let mut parts: Vec<String> = decision.effects.iter().map(Effect::to_string).collect();
    parts.extend(decision.discards.iter().map(discard));
    let colon = if parts.is_empty() { "" } else { ": " };
    format!("{}{about}{operation}{again}{colon}{}", decision.reason, parts.join("; "))
}

fn operation(change: &OperationChange) -> String {
    match change {
        OperationChange::Open { kind, phase, asked_by, member: _ } if asked_by == "operator" => {
            format!("opens {kind:?}, {phase:?}")
        }
        OperationChange::Open { kind, phase, asked_by, member: _ } => {
            format!("opens {kind:?}, {phase:?}, asked by {asked_by}")
        }
        OperationChange::Advance { kind, phase, member: _ } => format!("{kind:?} goes on, {phase:?}"),
        OperationChange::Close { kind } => format!("ends {kind:?}"),
    }
}

/// Discarded writes in a few words.
pub fn discard(discard: &Discard) -> String {
    let Discard { member, replid, offset, kept_offset } = discard;
    let history = short(&replid.0);
    match kept_offset {
        Some(kept) => {
            format!("{member} loses {} bytes ({history}:{kept} to {offset})", offset.saturating_sub(*kept))
        }
        None => format!("{member} loses its history {history} up to {offset}"),
    }
}

/// A candidate in a few words.
pub fn candidate(candidate: &Candidate) -> String {
    let Candidate { member, offset, rejected } = candidate;
    let offset = offset.map_or_else(|| "offset unknown".to_owned(), |o| format!("offset {o}"));
    match rejected {
        None => format!("{member} chosen ({offset})"),
        Some(why) => format!("{member} {why} ({offset})"),
    }
}

/// Verb and object of an effect, without addresses and preconditions.
pub fn effect_name(effect: &Effect) -> String {
    match effect {
        Effect::Promote { server, by, .. } => format!("promote {}{}", server.member, way(*by)),
        Effect::Promise { member, candidate, .. } => format!("promise of {member} for {candidate}"),
        Effect::Brief { member, .. } => format!("brief {member}"),
        Effect::Fence { server } => format!("end the server of {}", server.member),
        Effect::Attach { server, to, .. } => format!("attach {} to {to}", server.member),
        Effect::Handover { from, to, .. } => format!("hand over {} to {}", from.member, to.member),
        Effect::Meet { server, member, .. } => format!("introduce {member} to {}", server.member),
        Effect::AddSlots { server, slots, .. } => format!("give {} {} slots", server.member, slots.len()),
        Effect::MigrateSlots { server, slots, to, .. } => {
            format!("{} hands {} slots to {to}", server.member, slots.len())
        }
        Effect::Forget { server, node } => format!("{} forgets {}", server.member, short(&node.to_string())),
        Effect::Route { shard, to, .. } => format!("route shard {shard} to {to}"),
        Effect::Unroute { shard, .. } => format!("route shard {shard} to nobody"),
        Effect::Label { member, role, .. } => format!("label {member} {}", role.as_str()),
        Effect::Configure { server, .. } => format!("configure {}", server.member),
        Effect::Disconnect { server } => format!("disconnect clients of {}", server.member),
        Effect::DeletePod { member, .. } => format!("delete pod of {member}"),
        Effect::Apply { object, .. } => format!("apply {object}"),
        Effect::Delete { object, .. } => format!("delete {object}"),
        Effect::ReleaseFinalizer => "release the finalizer".to_owned(),
    }
}

/// How a server becomes primary, if there is more than one way.
fn way(by: Promotion) -> &'static str {
    match by {
        Promotion::Detach => "",
        Promotion::Open => " by its gate",
        Promotion::Force => " by vote",
        Promotion::Takeover => " by takeover",
    }
}

fn outcomes(executed: &Executed, decision: Option<&Decision>) -> String {
    let Executed { decision: of, outcomes } = executed;
    let name = |i: usize| decision.and_then(|d| d.effects.get(i)).map(|e| format!("{} ", effect_name(e)));
    let each = outcomes
        .iter()
        .enumerate()
        .map(|(i, (_, outcome))| format!("{}{outcome}", name(i).unwrap_or_default()));
    format!("of {of}: {}", each.collect::<Vec<_>>().join(", "))
}

/// What is waited for and what is blocked, on one line.
pub fn standing(standing: &Standing) -> String {
    let Standing { waits, blocks } = standing;
    if waits.is_empty() && blocks.is_empty() {
        return "nothing waits, nothing is blocked".to_owned();
    }
    blocks.iter().map(block).chain(waits.iter().map(wait)).collect::<Vec<_>>().join("; ")
}

/// A wait in a few words.
pub fn wait(wait: &Wait) -> String {
    let Wait { step, scope, reason, about } = wait;
    format!("{step:?} waits: {reason} ({})", subject(*scope, *about))
}

/// A block in a few words, with the candidates that were refused.
pub fn block(block: &Block) -> String {
    let Block { step, scope, reason, about, candidates } = block;
    let refused: Vec<String> = candidates.iter().map(candidate).collect();
    let refused = if refused.is_empty() { String::new() } else { format!(": {}", refused.join(", ")) };
    format!("{step:?} BLOCKED: {reason} ({}){refused}", subject(*scope, *about))
}

fn subject(scope: Scope, about: Option<MemberId>) -> String {
    about.map_or_else(|| scope.to_string(), |member| member.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::story;
    use valkeeper_core::observation::NodeFacts;

    #[test]
    fn a_failover_reads_as_a_story() {
        let told = lines(&story::failover().into());
        assert_eq!(told, story::FAILOVER_LINES.lines().collect::<Vec<_>>(), "\n{}", told.join("\n"));
    }

    #[test]
    fn a_node_and_what_is_done_to_it_read_in_words_of_a_valkey_cluster() {
        let told = lines(&story::clustered().0.into());
        let wanted = [
            "   12  node      0-0 node aaaaaaaa primary, epoch 3, 5461 slots, knows 2, is meeting 1, holds 1 for dead, sees an \
             owner for 10923 of 16384 slots",
            "   13  decided   SlotsAssigned: give 0-0 the slots 0-5460; introduce 0-2 (10.0.0.3) to 0-0; 0-0 forgets the node \
             cccccccc",
        ];
        assert_eq!(told.get(11..), Some(wanted.map(str::to_owned).as_slice()));
        let names: Vec<String> = story::gossip().effects.iter().map(effect_name).collect();
        assert_eq!(names, ["give 0-0 5461 slots", "introduce 0-2 to 0-0", "0-0 forgets cccccccc"]);
        let replica = NodeFacts { primary: story::node().failed.first().cloned(), ..story::node() };
        assert!(
            node(MemberId::new(0, 1), &replica)
                .starts_with("0-1 node aaaaaaaa replica of cccccccc, epoch 3, knows 2")
        );
    }

    #[test]
    fn a_promotion_says_how_where_there_is_more_than_one_way() {
        let promotion = story::promotion();
        let Some(Effect::Promote { server, replid, offset, consents, by: _ }) = promotion.effects.first()
        else {
            panic!("{promotion:?}")
        };
        let told = |by| {
            let (server, replid) = (server.clone(), replid.clone());
            effect_name(&Effect::Promote { server, replid, offset: *offset, consents: *consents, by })
        };
        let ways = [Promotion::Detach, Promotion::Open, Promotion::Force, Promotion::Takeover].map(told);
        assert_eq!(
            ways,
            ["promote 0-1", "promote 0-1 by its gate", "promote 0-1 by vote", "promote 0-1 by takeover"]
        );
    }

    #[test]
    fn a_line_alone_names_the_decision_whose_outcomes_it_holds() {
        let records = story::failover();
        let ended = records.iter().find(|r| ended(r).is_some()).map(line).unwrap_or_default();
        assert!(ended.contains("effects   of "), "{ended}");
        assert!(ended.ends_with("verified"), "{ended}");
    }
}

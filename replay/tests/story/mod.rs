//! Hand-made journals for tests: one adopted cluster of three members whose primary dies, and its pieces.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use valkeeper_core::{
    decision::{
        Candidate, Decision, Discard, OperationChange, OperationKind, Phase, Reason, RejectReason, Scope,
        Standing, StepName, Wait, WaitReason,
    },
    effect::{Effect, Outcome, Promotion, Server},
    event::{BaselineOrigin, Event, Record},
    ids::{Digest, MemberId, NodeId, ReplId, Seq, ShardId, Timestamp, WriterEpoch},
    observation::{
        ContainerPhase, Evidence, Executed, Link, NodeFacts, NodeHealth, Observed, PodFacts, Reading,
        RouteFacts, ServerFacts, ServerRole, Source, SpecFact,
    },
    spec::{Balance, DesiredCluster, FailoverMode, FailoverPolicy, IoThreads, Isolation, Profile, Topology},
    state::ClusterState,
};
use valkeeper_journal::{Folded, Hash, Lineage, Stored, StreamId, export_line};

/// 2026-11-21T03:00:00Z, in milliseconds.
pub const START_MS: i64 = 1_795_230_000_000;
/// When the primary is seen gone: one minute later.
pub const LOSS_MS: i64 = 60_000;

/// What [`failover`] reads like.
pub const FAILOVER_LINES: &str = "    1  baseline  demo/orders (uid 5f0c1d2e-uid): history begins here; the cluster was there before
    2  epoch     epoch 1 by valkeeper-0 (0.1.0)
    3  spec      generation 1: Replication, 1 x 3 members, Durable, failover Automatic after 3000 ms
    4  pod       0-0 pod running on node-0 at 10.0.0.1 (uid pod-0, revision 77aa)
    5  pod       0-1 pod running on node-1 at 10.0.0.2 (uid pod-1, revision 77aa)
    6  pod       0-2 pod running on node-2 at 10.0.0.3 (uid pod-2, revision 77aa)
    7  server    0-0 primary, history aaaaaaaa (run run-0, 9.0.0)
    8  server    0-1 replica of 0-0, link up, history aaaaaaaa (run run-1, 9.0.0)
    9  server    0-2 replica of 0-0, link up, history aaaaaaaa (run run-2, 9.0.0)
   10  route     shard 0 route to 10.0.0.1 (resourceVersion 100)
   11  decided   Adopted 0-0
   12  server    0-0 server gone
   13  decided   PrimaryGone 0-0 [opens Failover, Promoting]: promote 0-1 (10.0.0.2) at aaaaaaaa:1200; route shard 0 to 0-1 (10.0.0.2); attach 0-2 to 0-1 (10.0.0.2)
   14  effects   of 13: promote 0-1 verified, route shard 0 to 0-1 verified, attach 0-2 to 0-1 verified
   15  server    0-1 primary, history bbbbbbbb (run run-1, 9.0.0)
   16  server    0-2 replica of 0-1, link up, history bbbbbbbb (run run-2, 9.0.0)
   17  route     shard 0 route to 10.0.0.2 (resourceVersion 101)
   18  decided   FailoverComplete 0-1 [ends Failover]
   19  server    0-0 at the gate, history aaaaaaaa (run run-9, 9.0.0)
   20  decided   StalePrimaryDemoted 0-0: attach 0-0 to 0-1 (10.0.0.2); 0-0 loses 100 bytes (aaaaaaaa:1200 to 1300)
   21  standing  Membership waits: ReplicaSyncing (0-0)
   22  effects   of 20: attach 0-0 to 0-1 failed: timed out";

pub fn member(ordinal: u16) -> MemberId {
    MemberId::new(0, ordinal)
}

pub fn at_ms(offset_ms: i64) -> Timestamp {
    Timestamp(START_MS * 1_000_000).plus_millis(offset_ms)
}

/// Numbers records as they come.
#[derive(Default)]
pub struct Book(pub Vec<Record>);

impl Book {
    pub fn add(&mut self, offset_ms: i64, event: Event) -> Seq {
        let seq = Seq(self.0.len() as u64 + 1);
        self.0.push(Record { seq, epoch: WriterEpoch(1), time: at_ms(offset_ms), event });
        seq
    }
}

pub fn address(ordinal: u16) -> String {
    format!("10.0.0.{}", ordinal + 1)
}

pub fn pod(ordinal: u16) -> Event {
    let pod = Observed::Present(PodFacts {
        uid: format!("pod-{ordinal}"),
        address: Some(address(ordinal)),
        node: format!("node-{ordinal}"),
        node_health: NodeHealth::Ready,
        cordoned: false,
        deleting: false,
        revision: Digest("77aa".into()),
        container: ContainerPhase::Running,
        role_label: None,
        trouble: None,
    });
    Event::PodChanged { member: member(ordinal), pod }
}

pub fn server(ordinal: u16, run: &str, role: ServerRole, history: char) -> Event {
    let server = Observed::Present(ServerFacts {
        run_id: run.to_owned(),
        version: "9.0.0".into(),
        role,
        loading: false,
        replid: ReplId(String::from(history).repeat(40)),
        replid2: None,
        replid2_offset: None,
    });
    Event::ServerChanged { member: member(ordinal), server }
}

pub fn gone(ordinal: u16) -> Event {
    Event::ServerChanged { member: member(ordinal), server: Observed::Absent }
}

pub fn following(ordinal: u16) -> ServerRole {
    ServerRole::Replica { source: Source::Member(member(ordinal)), link: Link::Up }
}

pub fn route(ordinal: u16, resource_version: &str) -> Event {
    let route = RouteFacts { address: Some(address(ordinal)), resource_version: resource_version.to_owned() };
    Event::RouteChanged { shard: ShardId(0), route: Observed::Present(route) }
}

pub fn readings(taken_ms: i64, offsets: &[(u16, i64)]) -> Evidence {
    let reading = |offset| Reading {
        taken_at: at_ms(taken_ms),
        offset,
        last_io_ms: Some(100),
        replicas_online: 0,
        keys: None,
    };
    Evidence {
        readings: offsets
            .iter()
            .map(|(ordinal, offset)| (member(*ordinal), reading(*offset)))
            .collect::<BTreeMap<_, _>>(),
        ..Evidence::default()
    }
}

pub fn process(ordinal: u16) -> Server {
    Server { member: member(ordinal), address: address(ordinal), run_id: format!("run-{ordinal}") }
}

pub fn attach(ordinal: u16, to: u16) -> Effect {
    Effect::Attach { server: process(ordinal), to: member(to), to_address: address(to), node: None }
}

pub fn decided(decision: Decision, evidence: Evidence) -> Event {
    Event::Decided { decision: Box::new(decision), evidence }
}

pub fn shard_decision(step: StepName, reason: Reason, about: u16) -> Decision {
    let mut decision = Decision::new(step, Scope::Shard(ShardId(0)), reason);
    decision.about = Some(member(about));
    decision
}

pub fn spec() -> DesiredCluster {
    DesiredCluster {
        generation: 1,
        topology: Topology::Replication,
        shards: 1,
        replicas_per_shard: 2,
        profile: Profile::Durable,
        failover: FailoverPolicy {
            mode: FailoverMode::Automatic,
            detection_window_ms: 3000,
            isolation: Isolation::On,
        },
        switchover: None,
        confirm_blank: None,
        volatile: false,
        paused: false,
        io_threads: IoThreads::Off,
        balance: Balance::Slots,
        rebalance: None,
        version: None,
        settings: None,
        refused: None,
    }
}

/// The cluster as it was found: a primary and two replicas, adopted.
pub fn adopted() -> Book {
    let mut book = Book::default();
    let (cluster_uid, namespace, name) = ("5f0c1d2e-uid".to_owned(), "demo".to_owned(), "orders".to_owned());
    book.add(0, Event::Baseline { cluster_uid, namespace, name, origin: BaselineOrigin::Observed });
    book.add(
        0,
        Event::EpochStarted { writer: "valkeeper-0".into(), version: "0.1.0".into(), lost_through: None },
    );
    book.add(10, Event::SpecChanged(SpecFact::Valid(spec())));
    for ordinal in 0..3 {
        book.add(10, pod(ordinal));
    }
    book.add(10, server(0, "run-0", ServerRole::Primary, 'a'));
    book.add(10, server(1, "run-1", following(0), 'a'));
    book.add(10, server(2, "run-2", following(0), 'a'));
    book.add(10, route(0, "100"));
    let mut adopts = shard_decision(StepName::Membership, Reason::Adopted, 0);
    adopts.grant = Some(member(0));
    book.add(10, decided(adopts, readings(10, &[(0, 1000), (1, 1000), (2, 1000)])));
    book
}

/// The decision that follows the loss of 0-0.
pub fn promotion() -> Decision {
    let mut decision = shard_decision(StepName::Failover, Reason::PrimaryGone, 0);
    decision.operation = Some(OperationChange::Open {
        kind: OperationKind::Failover,
        phase: Phase::Promoting,
        asked_by: "operator".into(),
        member: Some(member(0)),
    });
    decision.grant = Some(member(1));
    decision.candidates = vec![
        Candidate { member: member(1), offset: Some(1200), rejected: None },
        Candidate { member: member(2), offset: Some(1180), rejected: Some(RejectReason::Behind) },
        Candidate { member: member(0), offset: None, rejected: Some(RejectReason::LostPrimary) },
    ];
    decision.effects = vec![
        Effect::Promote {
            server: process(1),
            replid: ReplId("a".repeat(40)),
            offset: 1200,
            consents: 0,
            by: Promotion::Detach,
        },
        Effect::Route {
            shard: ShardId(0),
            to: member(1),
            address: address(1),
            resource_version: "100".into(),
        },
        attach(2, 1),
    ];
    decision
}

/// What the node of 0-0 says in a Valkey Cluster of three others, one of which is held for dead.
pub fn node() -> NodeFacts {
    let id = |digit: &str| -> NodeId { digit.repeat(40).parse().unwrap() };
    NodeFacts {
        id: id("a"),
        primary: None,
        epoch: 3,
        slots: "0-5460".parse().unwrap(),
        knows: [("b", 2), ("c", 3)].map(|(digit, ordinal)| (id(digit), Some(address(ordinal)))).into(),
        meeting: [address(4)].into(),
        failed: [id("c")].into(),
        covered: 10_923,
        exports: Vec::new(),
        exports_unread: false,
        import_failed: None,
        migrating: BTreeMap::new(),
        importing: BTreeMap::new(),
        down: false,
    }
}

/// 0-0 gets slots, meets another and forgets a third.
pub fn gossip() -> Decision {
    let mut decision = Decision::new(StepName::Gossip, Scope::Cluster, Reason::SlotsAssigned);
    let NodeFacts { id, slots, failed, .. } = node();
    decision.effects = vec![
        Effect::AddSlots { server: process(0), node: id, slots, epoch: Some(1) },
        Effect::Meet { server: process(0), member: member(2), address: address(2) },
    ];
    decision.effects.extend(failed.into_iter().map(|node| Effect::Forget { server: process(0), node }));
    decision
}

/// The adopted cluster, with a node that spoke and a decision about it.
pub fn clustered() -> Book {
    let mut book = adopted();
    book.add(20, Event::NodeChanged { member: member(0), node: node() });
    book.add(30, decided(gossip(), readings(30, &[])));
    book
}

/// A replica is awaited.
pub fn syncing(ordinal: u16) -> Standing {
    let (step, scope) = (StepName::Membership, Scope::Shard(ShardId(0)));
    let waits = vec![Wait { step, scope, reason: WaitReason::ReplicaSyncing, about: Some(member(ordinal)) }];
    Standing { waits, blocks: Vec::new() }
}

/// Records sealed into a chain.
pub fn sealed(records: &[Record]) -> Vec<Stored> {
    let mut prev = Hash::ZERO;
    let seal = |record: &Record| {
        let stored = Stored::seal(record.clone(), prev).unwrap();
        prev = stored.hash;
        stored
    };
    records.iter().map(seal).collect()
}

/// Lines of an export.
pub fn exported(folded: Option<&Folded>, records: &[Stored]) -> String {
    let first = folded.map(|folded| folded.text().to_owned());
    let lines = first.into_iter().chain(records.iter().map(export_line));
    lines.map(|line| format!("{line}\n")).collect()
}

/// The record after which [`cut`] cuts: the failover is open, and what it decided has no outcome yet.
pub const CUT_AFTER: Seq = Seq(13);

/// The story with its cut, as an archive has all of it: what the records up to [`CUT_AFTER`] fold to, edited, and every
/// record, the one of the cut and one more included.
pub fn cut(edit: impl Fn(&str) -> String) -> (Folded, Vec<Stored>) {
    let mut records = failover();
    let (before, _) = records.split_at(CUT_AFTER.0 as usize);
    let head = sealed(before).last().unwrap().head();
    let id = StreamId("5f0c1d2e-uid".into());
    let folded = Folded::new(&id, head, Lineage::FIRST, &ClusterState::fold(before)).unwrap();
    let folded = Folded::parse(&edit(folded.text())).unwrap();
    let trimmed = Event::Trimmed {
        through: head.seq,
        hash: Digest(head.hash.to_string()),
        folded: Digest(folded.digest().to_string()),
        archive: Some("s3://journals/demo".into()),
    };
    let raised = Event::LevelRaised { level: 1, version: "0.1.0".into() };
    for (event, seq) in [trimmed, raised].into_iter().zip(23..) {
        records.push(Record { seq: Seq(seq), epoch: WriterEpoch(1), time: at_ms(3_600_000), event });
    }
    (folded, sealed(&records))
}

/// [`cut`] as the store has it: without the records that left.
pub fn cut_in_store(edit: impl Fn(&str) -> String) -> (Folded, Vec<Stored>) {
    let (folded, mut records) = cut(edit);
    records.retain(|s| s.record.seq > CUT_AFTER);
    (folded, records)
}

/// The whole story: 0-0 dies, 0-1 takes over, 0-0 returns with 100 bytes that nobody else has.
pub fn failover() -> Vec<Record> {
    let mut book = adopted();
    book.add(LOSS_MS, gone(0));
    let seq = book.add(LOSS_MS, decided(promotion(), readings(LOSS_MS, &[(1, 1200), (2, 1180)])));
    let verified = |after_ms| (at_ms(LOSS_MS + after_ms), Outcome::Verified);
    let outcomes = vec![verified(8), verified(18), verified(19)];
    book.add(LOSS_MS + 20, Event::EffectsEnded(Executed { decision: seq, outcomes }));
    book.add(LOSS_MS + 20, server(1, "run-1", ServerRole::Primary, 'b'));
    book.add(LOSS_MS + 20, server(2, "run-2", following(1), 'b'));
    book.add(LOSS_MS + 20, route(1, "101"));
    let mut complete = shard_decision(StepName::Failover, Reason::FailoverComplete, 1);
    complete.operation = Some(OperationChange::Close { kind: OperationKind::Failover });
    book.add(LOSS_MS + 20, decided(complete, readings(LOSS_MS + 20, &[(1, 1200), (2, 1200)])));
    let gate = ServerRole::Replica { source: Source::Gate { had_history: true }, link: Link::Down };
    book.add(LOSS_MS + 300, server(0, "run-9", gate, 'a'));
    let mut demote = shard_decision(StepName::Membership, Reason::StalePrimaryDemoted, 0);
    demote.discards = vec![Discard {
        member: member(0),
        replid: ReplId("a".repeat(40)),
        offset: 1300,
        kept_offset: Some(1200),
    }];
    demote.effects = vec![attach(0, 1)];
    let seq = book.add(LOSS_MS + 300, decided(demote, readings(LOSS_MS + 300, &[(0, 1300), (1, 1250)])));
    let standing = syncing(0);
    book.add(
        LOSS_MS + 300,
        Event::StandingChanged { standing, evidence: readings(LOSS_MS + 300, &[(0, 1300), (1, 1250)]) },
    );
    let outcomes = vec![(at_ms(LOSS_MS + 400), Outcome::Failed("timed out".into()))];
    book.add(LOSS_MS + 400, Event::EffectsEnded(Executed { decision: seq, outcomes }));
    book.0
}

//! Events and directories for the unit tests of this crate.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
};
use valkeeper_core::{
    decision::{Decision, Reason, Scope, Standing, StepName},
    event::{BaselineOrigin, CloseReason, Event},
    ids::{Digest, MemberId, Seq, ShardId},
    observation::{Evidence, Executed, NodeFacts, ObjectFacts, ObjectKind, ObjectRef, Observed, SpecFact},
    slots::{SLOTS, SlotSet},
    weights::SlotWeights,
};

/// One event of each kind, in the order of their numbers.
pub(crate) fn one_of_each() -> Vec<Event> {
    let decision = Decision::new(StepName::Failover, Scope::Shard(ShardId(0)), Reason::PrimaryGone);
    let object = ObjectRef { kind: ObjectKind::Service, name: "orders".to_owned() };
    let facts = ObjectFacts {
        wanted: Digest("ab".to_owned()),
        wanted_revision: None,
        shard: None,
        vital: false,
        surplus: false,
        live: Observed::Absent,
    };
    let node = NodeFacts {
        id: "ab".repeat(20).parse().unwrap(),
        primary: None,
        epoch: 1,
        slots: SlotSet::all(),
        knows: BTreeMap::new(),
        meeting: BTreeSet::new(),
        failed: BTreeSet::new(),
        covered: SLOTS,
        exports: Vec::new(),
        exports_unread: false,
        import_failed: None,
        migrating: BTreeMap::new(),
        importing: BTreeMap::new(),
        down: false,
    };
    vec![
        Event::Baseline {
            cluster_uid: "uid-1".to_owned(),
            namespace: "shop".to_owned(),
            name: "orders".to_owned(),
            origin: BaselineOrigin::Empty,
        },
        Event::EpochStarted {
            writer: "valkeeper-0".to_owned(),
            version: "0.1.0".to_owned(),
            lost_through: None,
        },
        Event::SpecChanged(SpecFact::Invalid("shards: 0 is not allowed".to_owned())),
        Event::PodChanged { member: MemberId::new(0, 1), pod: Observed::Absent },
        Event::ServerChanged { member: MemberId::new(0, 1), server: Observed::Absent },
        Event::RouteChanged { shard: ShardId(0), route: Observed::Absent },
        Event::ObjectChanged { object, facts },
        Event::Decided { decision: Box::new(decision), evidence: Evidence::default() },
        Event::EffectsEnded(Executed { decision: Seq(8), outcomes: Vec::new() }),
        Event::DecisionClosed { decision: Seq(8), how: CloseReason::Superseded },
        Event::StandingChanged { standing: Standing::default(), evidence: Evidence::default() },
        Event::AgentChanged { member: MemberId::new(0, 1), agent: Observed::Absent },
        Event::Trimmed {
            through: Seq(5),
            hash: Digest("ab".repeat(32)),
            folded: Digest("cd".repeat(32)),
            archive: None,
        },
        Event::LevelRaised { level: 1, version: "0.1.0".to_owned() },
        Event::NodeChanged { member: MemberId::new(0, 1), node },
        Event::SlotsWeighed {
            member: MemberId::new(0, 1),
            weights: Some(SlotWeights::sum_up(&[(0, 3), (1, 0)], 4_096)),
        },
    ]
}

/// A directory that is removed at the end of the test.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// A new, empty directory.
    pub fn new(name: &str) -> Scratch {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("valkeeper-{}-{name}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    /// A path within.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

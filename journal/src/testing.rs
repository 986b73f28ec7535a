//! Events for the unit tests of this crate.

use valkeeper_core::{
    decision::{Decision, Reason, Scope, Standing, StepName},
    event::{BaselineOrigin, CloseReason, Event},
    ids::{Digest, MemberId, Seq, ShardId},
    observation::{Evidence, Executed, ObjectFacts, ObjectKind, ObjectRef, Observed, SpecFact},
};

/// One event of each kind, in the order of their numbers.
pub(crate) fn one_of_each() -> Vec<Event> {
    let decision = Decision::new(StepName::Failover, Scope::Shard(ShardId(0)), Reason::PrimaryGone);
    let object = ObjectRef {
        kind: ObjectKind::Service,
        name: "orders".to_owned(),
    };
    let facts = ObjectFacts {
        wanted: Digest("ab".to_owned()),
        wanted_revision: None,
        shard: None,
        live: Observed::Absent,
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
        },
        Event::SpecChanged(SpecFact::Invalid("shards: 0 is not allowed".to_owned())),
        Event::PodChanged {
            member: MemberId::new(0, 1),
            pod: Observed::Absent,
        },
        Event::ServerChanged {
            member: MemberId::new(0, 1),
            server: Observed::Absent,
        },
        Event::RouteChanged {
            shard: ShardId(0),
            route: Observed::Absent,
        },
        Event::ObjectChanged { object, facts },
        Event::Decided {
            decision: Box::new(decision),
            evidence: Evidence::default(),
        },
        Event::EffectsEnded(Executed {
            decision: Seq(8),
            outcomes: Vec::new(),
        }),
        Event::DecisionClosed {
            decision: Seq(8),
            how: CloseReason::Superseded,
        },
        Event::StandingChanged {
            standing: Standing::default(),
            evidence: Evidence::default(),
        },
    ]
}

//! /healthz, /readyz and /metrics: what a kubelet and a Prometheus ask. Label values are reason codes and verbs; nothing
//! that grows with clusters' contents.

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use valkeeper_core::{decision::Decision, effect::Outcome};

/// Buckets of 1 ms doubling up to 8 s: the goals are tens of milliseconds, and what exceeds the bounds of calls is an error.
const BUCKETS: (f64, f64, u16) = (0.001, 2.0, 14);

/// Reason of a decision.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    reason: &'static str,
}

/// Kind and end of an effect.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByOutcome {
    effect: &'static str,
    outcome: &'static str,
}

/// What became of records that were carried to the archive.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCarry {
    outcome: &'static str,
}

/// Part of a failover's outage.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPart {
    part: &'static str,
}

/// The parts into which the outage of a failover falls, as far as the operator can measure them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutagePart {
    /// From waking to the end of the look.
    Look,
    /// The durable append of the decision.
    Append,
    /// The effects, up to the verified route.
    Effects,
}

impl OutagePart {
    fn as_str(self) -> &'static str {
        match self {
            OutagePart::Look => "look",
            OutagePart::Append => "append",
            OutagePart::Effects => "effects",
        }
    }
}

/// Everything measured, and what the probes answer.
pub struct Metrics {
    registry: Registry,
    turns: Counter,
    decisions: Family<ByReason, Counter>,
    effects: Family<ByOutcome, Counter>,
    outage: Family<ByPart, Histogram>,
    append: Histogram,
    carries: Family<ByCarry, Counter>,
    segments: Counter,
    journals_left: Gauge,
    journals_stuck: Gauge,
    journals_removed: Counter,
    leader: Gauge,
    clusters: Gauge,
    restarts: Counter,
    ready: AtomicBool,
}

fn latency() -> Histogram {
    let (start, factor, length) = BUCKETS;
    Histogram::new(exponential_buckets(start, factor, length))
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Metrics {
            registry: Registry::with_prefix("valkeeper"),
            turns: Counter::default(),
            decisions: Family::default(),
            effects: Family::default(),
            outage: Family::new_with_constructor(latency),
            append: latency(),
            carries: Family::default(),
            segments: Counter::default(),
            journals_left: Gauge::default(),
            journals_stuck: Gauge::default(),
            journals_removed: Counter::default(),
            leader: Gauge::default(),
            clusters: Gauge::default(),
            restarts: Counter::default(),
            ready: AtomicBool::new(false),
        };
        let r = &mut metrics.registry;
        r.register("reconcile_turns", "Turns of all clusters", metrics.turns.clone());
        r.register("decisions", "Decisions recorded, by reason", metrics.decisions.clone());
        r.register("effects", "Effects ended, by kind and outcome", metrics.effects.clone());
        let text = "Parts of the outage of a failover that the operator can measure";
        r.register_with_unit("failover_outage", text, Unit::Seconds, metrics.outage.clone());
        r.register_with_unit("journal_append", "Durable appends", Unit::Seconds, metrics.append.clone());
        let text = "Times that records were carried to the archive, by outcome";
        r.register("archive_carries", text, metrics.carries.clone());
        r.register("archive_segments", "Segments written to the archive", metrics.segments.clone());
        r.register(
            "journals_left",
            "Journals of deleted clusters that are kept",
            metrics.journals_left.clone(),
        );
        let text = "Journals of deleted clusters that were to be removed and could not be";
        r.register("journals_stuck", text, metrics.journals_stuck.clone());
        let text = "Journals of deleted clusters that were removed";
        r.register("journals_removed", text, metrics.journals_removed.clone());
        r.register("leader", "1 while this process leads", metrics.leader.clone());
        r.register("clusters", "Clusters with a running task", metrics.clusters.clone());
        r.register(
            "task_restarts",
            "Tasks of clusters that ended with an error or a panic",
            metrics.restarts.clone(),
        );
        // Both are there from the start: an alert on a rise needs the zero.
        metrics.carries.get_or_create(&TAKEN).inc_by(0);
        metrics.carries.get_or_create(&REFUSED).inc_by(0);
        metrics
    }
}

const TAKEN: ByCarry = ByCarry { outcome: "taken" };
const REFUSED: ByCarry = ByCarry { outcome: "refused" };

impl Metrics {
    /// A turn was run.
    pub fn turn(&self) {
        self.turns.inc();
    }

    /// A decision was recorded.
    pub fn decided(&self, decision: &Decision) {
        self.decisions.get_or_create(&ByReason { reason: decision.reason.code() }).inc();
    }

    /// An effect ended.
    pub fn ended(&self, effect: &'static str, outcome: &Outcome) {
        let outcome = match outcome {
            Outcome::Verified => "verified",
            Outcome::Superseded(_) => "superseded",
            Outcome::Failed(_) | Outcome::Refused(_) | Outcome::Futile(_) => "failed",
            Outcome::Skipped => "skipped",
        };
        self.effects.get_or_create(&ByOutcome { effect, outcome }).inc();
    }

    /// A part of a failover took this long.
    pub fn outage(&self, part: OutagePart, took: Duration) {
        self.outage.get_or_create(&ByPart { part: part.as_str() }).observe(took.as_secs_f64());
    }

    /// An append took this long.
    pub fn appended(&self, took: Duration) {
        self.append.observe(took.as_secs_f64());
    }

    /// The archive has taken records, in so many new segments.
    pub fn archived(&self, segments: usize) {
        self.carries.get_or_create(&TAKEN).inc();
        self.segments.inc_by(u64::try_from(segments).unwrap_or(u64::MAX));
    }

    /// The archive has not taken records.
    pub fn not_archived(&self) {
        self.carries.get_or_create(&REFUSED).inc();
    }

    /// What a look at the journals of deleted clusters found. Counts.
    pub fn journals_left(&self, left: usize, removed: usize, stuck: usize) {
        self.journals_left.set(i64::try_from(left).unwrap_or(i64::MAX));
        self.journals_stuck.set(i64::try_from(stuck).unwrap_or(i64::MAX));
        self.journals_removed.inc_by(u64::try_from(removed).unwrap_or(u64::MAX));
    }

    /// This process leads.
    pub fn leads(&self) {
        self.leader.set(1);
    }

    /// This process does not lead.
    pub fn stands_by(&self) {
        self.leader.set(0);
        self.clusters.set(0);
    }

    /// Number of clusters with a running task.
    pub fn clusters(&self, count: usize) {
        self.clusters.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// A cluster's task ended with an error or a panic.
    pub fn restarted(&self) {
        self.restarts.inc();
    }

    /// The caches are filled: the process can lead, or stand by.
    pub fn ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
    }
}

/// Serves the probes and metrics until the process ends.
///
/// # Errors
/// The address cannot be listened on.
pub async fn serve(listen: SocketAddr, metrics: Arc<Metrics>) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind(listen).await?;
    valkeeper_agent::pages::serve(listener, router(metrics)).await;
    Ok(())
}

fn router(metrics: Arc<Metrics>) -> Router {
    Router::new()
        // The runtime turns if this answers; everything else has its own bound and ends by itself.
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(scrape))
        .with_state(metrics)
}

async fn readyz(State(metrics): State<Arc<Metrics>>) -> impl IntoResponse {
    if metrics.ready.load(Ordering::Relaxed) {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the watches have not brought their first lists yet\n")
    }
}

async fn scrape(State(metrics): State<Arc<Metrics>>) -> impl IntoResponse {
    const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let mut text = String::new();
    match encode(&mut text, &metrics.registry) {
        Ok(()) => (StatusCode::OK, [("content-type", CONTENT_TYPE)], text),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, [("content-type", "text/plain")], error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_core::decision::{Reason, Scope, StepName};

    #[test]
    fn metrics_are_named_with_their_base_units() {
        let metrics = Metrics::default();
        metrics.turn();
        metrics.decided(&Decision::new(StepName::Failover, Scope::Cluster, Reason::PrimaryGone));
        metrics.ended("promote", &Outcome::Verified);
        metrics.outage(OutagePart::Append, Duration::from_millis(6));
        metrics.appended(Duration::from_millis(6));
        metrics.archived(3);
        metrics.not_archived();
        metrics.not_archived();
        metrics.leads();
        let mut text = String::new();
        encode(&mut text, &metrics.registry).unwrap();
        for line in [
            "valkeeper_reconcile_turns_total 1",
            "valkeeper_decisions_total{reason=\"PrimaryGone\"} 1",
            "valkeeper_effects_total{effect=\"promote\",outcome=\"verified\"} 1",
            "valkeeper_failover_outage_seconds_count{part=\"append\"} 1",
            "valkeeper_journal_append_seconds_count 1",
            "valkeeper_archive_carries_total{outcome=\"taken\"} 1",
            "valkeeper_archive_carries_total{outcome=\"refused\"} 2",
            "valkeeper_archive_segments_total 3",
            "valkeeper_leader 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}

//! Where the time of a failover went, part by part: the moment of the fault and the first writes after it by the client's
//! clock, what lies between by the times in the journal and by what the operator measures of itself.

use super::{
    load::{Log, maximum, median},
    operator::Operator,
    wait::until,
};
use anyhow::{Context, bail};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Bound on the operator's figures after clients are served again: they are there when its turn ends.
const PATIENCE: Duration = Duration::from_secs(10);
/// The parts, in the order in which they follow each other.
const PARTS: [&str; 9] = [
    "detection: until a turn begins",
    "witness: a second sign of the death, and the choice",
    "decision durable in the journal",
    "promises of the others",
    "promoted",
    "  first write of the client that asks for roles",
    "slice moved (EndpointSlice update)",
    "  Service programmed, first write through it",
    "whole failover, fault to first write through the Service",
];

/// The wall clock, moved on by the monotonic one as the operator's is.
pub struct Clock {
    at: Instant,
    unix_ns: i64,
}

impl Clock {
    /// Reads both clocks.
    pub fn start() -> anyhow::Result<Clock> {
        let at = Instant::now();
        Ok(Clock { at, unix_ns: i64::try_from(std::time::UNIX_EPOCH.elapsed()?.as_nanos())? })
    }

    /// The wall clock's time of a moment, in nanoseconds since the Unix epoch.
    pub fn unix_ns(&self, moment: Instant) -> i64 {
        let nanos = |d: Duration| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX);
        let ahead = moment.checked_duration_since(self.at).map(nanos);
        self.unix_ns + ahead.unwrap_or_else(|| -nanos(self.at - moment))
    }

    /// The moment of a time of the wall clock.
    pub fn moment(&self, unix_ns: i64) -> Instant {
        let ahead = Duration::from_nanos(unix_ns.abs_diff(self.unix_ns));
        if unix_ns >= self.unix_ns { self.at + ahead } else { self.at - ahead }
    }
}

/// What the operator has measured of all failovers since it started, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    failovers: f64,
    look_ms: f64,
    append_ms: f64,
}

impl Measured {
    /// Asks the operator.
    pub async fn now(operator: &Operator) -> anyhow::Result<Measured> {
        let text = operator.metrics().await?;
        // A series appears with its first failover.
        let value = |series: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(series));
            line.and_then(|rest| rest.trim().parse::<f64>().ok()).unwrap_or_default()
        };
        let part = |of: &str, part: &str| {
            value(&format!("valkeeper_failover_outage_seconds_{of}{{part=\"{part}\"}}"))
        };
        Ok(Measured {
            failovers: part("count", "append"),
            look_ms: part("sum", "look") * 1000.0,
            append_ms: part("sum", "append") * 1000.0,
        })
    }

    /// Waits for the figures of the failover after these; what it took alone.
    pub async fn next(self, operator: &Operator) -> anyhow::Result<Measured> {
        let found = until("the operator's figures of the failover", PATIENCE, || async {
            let now = Measured::now(operator).await?;
            if now.failovers > self.failovers { Ok(now) } else { bail!("{} failovers", now.failovers) }
        });
        let now = found.await?.0;
        let failovers = now.failovers - self.failovers;
        Ok(Measured {
            failovers,
            look_ms: (now.look_ms - self.look_ms) / failovers,
            append_ms: (now.append_ms - self.append_ms) / failovers,
        })
    }
}

/// The parts of a series of failovers, in milliseconds.
#[derive(Debug, Default)]
pub struct Breakdown {
    rows: Vec<[f64; PARTS.len()]>,
}

impl Breakdown {
    /// Adds each fault, with what the operator measured of its failover.
    pub fn of(
        clock: &Clock,
        records: &[Value],
        logs: &[Log],
        faults: &[(Instant, Measured)],
    ) -> anyhow::Result<Breakdown> {
        let mut breakdown = Breakdown::default();
        for (i, (fault, measured)) in faults.iter().enumerate() {
            let fault_ns = clock.unix_ns(*fault);
            let failover = Failover::after(records, fault_ns).with_context(|| format!("fault {}", i + 1))?;
            // Before the promotion only the old primary can have acknowledged anything.
            let promoted = clock.moment(failover.promoted_ns);
            let served = |client: &str| -> anyhow::Result<i64> {
                let log = logs.iter().find(|log| log.client == client).context("no such client")?;
                Ok(clock.unix_ns(log.first_since(promoted).context("nothing was acknowledged since")?))
            };
            breakdown.rows.push(failover.parts(fault_ns, measured, served("roles")?, served("service")?));
        }
        Ok(breakdown)
    }

    /// Lines of a table: median and maximum of each part.
    pub fn lines(&self) -> Vec<String> {
        let line = |(i, name): (usize, &&str)| {
            let values: Vec<f64> = self.rows.iter().filter_map(|row| row.get(i)).copied().collect();
            format!("  {name:<58} median {:7.1}  maximum {:7.1}", median(&values), maximum(&values))
        };
        PARTS.iter().enumerate().map(line).collect()
    }
}

/// What the journal says of a failover; nanoseconds since the Unix epoch.
struct Failover {
    /// The first turn that saw anything of it.
    seen_ns: i64,
    /// The turn that decided.
    decided_ns: i64,
    /// Ends of the effect before the promotion, if there is one, of the promotion, and of the move of the write route.
    promised_ns: Option<i64>,
    promoted_ns: i64,
    routed_ns: i64,
}

impl Failover {
    /// The first promotion that was decided after a moment.
    fn after(records: &[Value], fault_ns: i64) -> anyhow::Result<Failover> {
        let time = |record: &Value| record.get("time").and_then(Value::as_i64).unwrap_or_default();
        let later = || records.iter().filter(|record| time(record) >= fault_ns);
        let seen =
            later().find(|record| is_news(record)).context("the journal has nothing after the fault")?;
        let effects = |record: &Value| -> Option<Vec<Value>> {
            Some(record.pointer("/event/Decided/decision/effects")?.as_array()?.clone())
        };
        let position = |effects: &[Value], verb: &str| effects.iter().position(|e| e.get(verb).is_some());
        let promotes = |record: &&Value| effects(record).is_some_and(|e| position(&e, "Promote").is_some());
        let decided = later().find(promotes).context("no promotion was decided after the fault")?;
        let effects = effects(decided).unwrap_or_default();
        let outcomes = later()
            .filter_map(|record| record.pointer("/event/EffectsEnded"))
            .find(|ended| ended.get("decision") == decided.get("seq"))
            .and_then(|ended| ended.get("outcomes")?.as_array())
            .context("the promotion's outcome is not in the journal")?;
        let end = |i: usize| outcomes.get(i).and_then(|o| o.get(0)?.as_i64()).context("no outcome");
        let promote = position(&effects, "Promote").context("no promotion")?;
        let route = position(&effects, "Route").context("the promotion moves no route")?;
        Ok(Failover {
            seen_ns: time(seen),
            decided_ns: time(decided),
            promised_ns: promote.checked_sub(1).map(end).transpose()?,
            promoted_ns: end(promote)?,
            routed_ns: end(route)?,
        })
    }

    fn parts(
        &self,
        fault_ns: i64,
        measured: &Measured,
        roles_ns: i64,
        service_ns: i64,
    ) -> [f64; PARTS.len()] {
        let ms = |from: i64, to: i64| (to - from) as f64 / 1e6;
        let Failover { seen_ns, decided_ns, promised_ns, promoted_ns, routed_ns } = *self;
        // Where the first turn decided, it began one look before; else the second witness took until the one that did.
        let (detection, witness) = if seen_ns == decided_ns {
            (ms(fault_ns, decided_ns) - measured.look_ms, measured.look_ms)
        } else {
            (ms(fault_ns, seen_ns), ms(seen_ns, decided_ns))
        };
        let durable_ns = decided_ns + (measured.append_ms * 1e6) as i64;
        let begun_ns = promised_ns.unwrap_or(durable_ns);
        [
            detection,
            witness,
            measured.append_ms,
            ms(durable_ns, begun_ns),
            ms(begun_ns, promoted_ns),
            ms(promoted_ns, roles_ns),
            ms(promoted_ns, routed_ns),
            ms(routed_ns, service_ns),
            ms(fault_ns, service_ns),
        ]
    }
}

/// True for records of what a look brought about servers and agents.
fn is_news(record: &Value) -> bool {
    ["/event/ServerChanged", "/event/AgentChanged", "/event/Decided"]
        .iter()
        .any(|kind| record.pointer(kind).is_some())
}

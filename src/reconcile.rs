//! The driver: observe, turn, append, execute, publish. One task runs it for one cluster; everything else in this crate
//! is called from here.

use crate::{
    claim::{self, Before},
    cluster::{Cluster, ClusterId, PROBE_PERIOD, Pace, Shell},
    execute,
    health::OutagePart,
    k8s,
    keeping::Tending,
    links::Links,
    observe, publish,
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use valkeeper_core::{
    event::Event,
    ids::{Timestamp, WriterEpoch},
    observation::Executed,
    projection::reason::StatusReason,
    turn::turn,
};
use valkeeper_journal::{Appended, Parts, parts};

/// First pause before a journal that gave no certain answer is asked again.
const RESOLVE_PAUSE_FIRST: Duration = Duration::from_millis(200);

/// Longest such pause: the stream stands still meanwhile, so it is short; one read per cluster in it is no load.
const RESOLVE_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Longest time for work on a journal's store in a quiet moment: a silent server is to be noticed within the detection window all the
/// same. What is not done by then is tried again.
const QUIET_MAX: Duration = Duration::from_secs(1);

/// Pause before the next look after something was recorded: what has just changed mostly changes on. It doubles from look to look until
/// something is decided, or slots that go one by one would have us look, and record, all the time.
const NEWS_PAUSE_FIRST: Duration = Duration::from_millis(50);

/// How a cluster's task ends without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The resource is gone, or has been let go of.
    Gone,
}

/// Runs the cluster until it is gone.
///
/// # Errors
/// What keeps this task from going on; [`Error::class`] says how to go on without it.
pub async fn run(shell: &Arc<Shell>, id: &ClusterId, before: Before) -> Result<Ended, Error> {
    let mut cluster = claim::claim(shell, id, before).await?;
    let (mut pace, mut again) = (Pace::Normal, PROBE_PERIOD);
    loop {
        let woken_at = Instant::now();
        let Some(seen) = observe::look(&mut cluster, pace).await? else { return close(&mut cluster).await };
        let decided_at = Instant::now();
        let turn = turn(&cluster.state, &seen, cluster.clock.now());
        shell.metrics.turn();
        let Parts { appends, postponed } = parts(turn.events);
        cluster.withdraw_grants(appends.iter().flatten());
        let Appended { records, decisions } = record(&mut cluster, appends, turn.now).await?;
        let appended_at = Instant::now();
        let news = cluster.fold(&records);
        cluster.publish_grants();
        let executed = execute::all(&cluster, &decisions, decided_at).await;
        if decisions.iter().any(|d| d.value().promotes()) {
            shell.metrics.outage(OutagePart::Look, decided_at - woken_at);
            shell.metrics.outage(OutagePart::Append, appended_at - decided_at);
            shell.metrics.outage(OutagePart::Effects, appended_at.elapsed());
        }
        publish::turn(&mut cluster, news);
        if records.is_empty() {
            tend(&mut cluster).await?;
        }
        again = if postponed { NEWS_PAUSE_FIRST } else { news_pause(again, records.len(), decisions.len()) };
        pace = if postponed {
            // What had to be done still has to, and is decided again at once, as it would have been.
            pace
        } else if executed.is_empty() {
            cluster.wait(turn.wake_at, again, pace).await
        } else {
            // Outcomes change what is to be done next: look again at once.
            Pace::Urgent
        };
        cluster.executed = executed;
    }
}

/// How soon to look again after a turn with so many records and decisions. `last`: after the turn before.
fn news_pause(last: Duration, records: usize, decisions: usize) -> Duration {
    let calm = last >= PROBE_PERIOD;
    if decisions > 0 || records > 0 && calm { NEWS_PAUSE_FIRST } else { (last * 2).min(PROBE_PERIOD) }
}

/// The last record of a cluster that is gone: what became of its last decision.
async fn close(cluster: &mut Cluster) -> Result<Ended, Error> {
    let owed = cluster.executed.iter().cloned().map(Event::EffectsEnded).collect();
    let now = cluster.clock.now();
    record(cluster, parts(owed).appends, now).await?;
    Ok(Ended::Gone)
}

/// Tidies the journal's store in a quiet moment, and lets go of what need not be kept. What does not work now stays for the next one.
async fn tend(cluster: &mut Cluster) -> Result<(), Error> {
    if !cluster.tending.is_due() {
        return Ok(());
    }
    let (shell, now) = (Arc::clone(&cluster.shell), cluster.clock.now());
    shell.leadership.check()?;
    let tidied = quietly(&cluster.links, cluster.journal.maintain()).await;
    untroubled(&mut cluster.tending, tidied)?;
    let stream = cluster.journal.stream().clone();
    let retention = cluster.tending.retention(&shell, &stream, now).await;
    let Some(Some(retention)) = untroubled(&mut cluster.tending, Some(retention))? else { return Ok(()) };
    cluster.journal.retain(retention);
    let excess = quietly(&cluster.links, cluster.journal.excess(now)).await;
    let Some(excess) = untroubled(&mut cluster.tending, excess)? else { return Ok(()) };
    let Some(folded) = excess else {
        cluster.tending.done();
        return Ok(());
    };
    shell.leadership.check()?;
    let answer = cluster.journal.cut(folded, now).await;
    let trimmed = match settle(cluster, answer).await {
        Err(Error::Journal(error)) => untroubled(&mut cluster.tending, Some(Err(error)))?.unwrap_or_default(),
        other => other?,
    };
    if let Some(cut) = trimmed.records.last() {
        cluster.tending.done();
        tracing::info!(j = cut.seq.0, "trimmed the journal");
        let news = cluster.fold(&trimmed.records);
        publish::turn(cluster, news);
    }
    Ok(())
}

/// Work that is given up when a member is lost, or when it takes too long: nobody may wait for it. `None`: it was.
async fn quietly<T>(links: &Links, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        () = links.lost.notified() => {
            // The turn that follows must hear of it, too.
            links.lost.notify_one();
            None
        }
        done = tokio::time::timeout(QUIET_MAX, work) => done.ok(),
    }
}

/// What came of work for a journal's store. What failed is tried again later, unless the journal cannot be used on.
fn untroubled<T>(
    tending: &mut Tending,
    done: Option<Result<T, valkeeper_journal::Error>>,
) -> Result<Option<T>, Error> {
    match done {
        Some(Ok(done)) => Ok(Some(done)),
        Some(Err(error)) if !error.is_certain() => Err(error.into()),
        Some(Err(error)) => {
            tracing::warn!(
                error = k8s::chain(&error),
                "the journal could not be tidied or read; it will be tried again"
            );
            tending.failed();
            Ok(None)
        }
        None => {
            tending.given_up();
            Ok(None)
        }
    }
}

/// Makes the events durable. What was executed before is among them, and is no longer owed afterwards. While the journal gives no
/// certain answer, nothing is decided and nothing is done: the same records are sent until they are settled.
async fn record(cluster: &mut Cluster, parts: Vec<Vec<Event>>, now: Timestamp) -> Result<Appended, Error> {
    if parts.iter().all(Vec::is_empty) {
        return Ok(Appended::default());
    }
    let (shell, sent_at) = (Arc::clone(&cluster.shell), Instant::now());
    let mut appended = Appended::default();
    for part in parts {
        shell.leadership.check()?;
        let answer = cluster.journal.append(part, now).await;
        let Appended { records, decisions } = settle(cluster, answer).await?;
        appended.records.extend(records);
        appended.decisions.extend(decisions);
    }
    shell.metrics.appended(sent_at.elapsed());
    cluster.executed = Vec::<Executed>::new();
    Ok(appended)
}

/// What became of a batch, in the end.
async fn settle(
    cluster: &mut Cluster,
    mut answer: Result<Appended, valkeeper_journal::Error>,
) -> Result<Appended, Error> {
    let mut pause = RESOLVE_PAUSE_FIRST;
    while let Err(doubt @ valkeeper_journal::Error::Unresolved(_)) = answer {
        publish::journal_in_doubt(cluster, &Error::Journal(doubt));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RESOLVE_PAUSE_MAX);
        answer = cluster.journal.resolve().await.map(Option::unwrap_or_default);
    }
    Ok(answer?)
}

/// What kind of trouble an error is, and with it how to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It may be over by itself.
    Transient,
    /// Someone must change something.
    Permanent,
    /// Another writer has taken over.
    Fenced,
    /// Agents know a later writer, and this one leads and writes its journal all the same: that is probably younger than their
    /// memory. The next claim goes above it.
    Deposed,
    /// Something that cannot be, was.
    Bug,
}

impl Class {
    /// Pause before the task begins anew after `failures` of them in a row.
    pub fn requeue(self, failures: u32) -> Duration {
        let (first_s, max_s) = match self {
            // A blip of the API server is over in a second; an outage need not be asked about more than twice a minute.
            Class::Transient => (1, 30),
            // Nothing changes by itself: look once a minute whether someone changed it.
            Class::Permanent | Class::Bug => (10, 60),
            // The other one may be right: only come back when it has had time to go.
            Class::Fenced => (30, 60),
            // Long enough for a Lease that was lost to be noticed, if it was.
            Class::Deposed => (2, 60),
        };
        let doubled =
            1_u64.checked_shl(failures.saturating_sub(1)).unwrap_or(u64::MAX).saturating_mul(first_s);
        Duration::from_secs(doubled.min(max_s))
    }
}

/// Why a cluster's task ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The journal.
    #[error("the journal")]
    Journal(#[from] valkeeper_journal::Error),
    /// The API server.
    #[error("the API server")]
    Kubernetes(#[from] k8s::Error),
    /// Leadership ended.
    #[error(transparent)]
    NotLeader(#[from] crate::lease::NotLeader),
    /// The vault was not opened.
    #[error("the operator has no identity yet")]
    NoIdentity,
    /// An agent knows a higher writer epoch.
    #[error("an agent obeys a later writer, of epoch {theirs}")]
    Deposed {
        /// Highest epoch that an agent knows.
        theirs: WriterEpoch,
    },
}

impl Error {
    /// What kind of trouble it is.
    pub fn class(&self) -> Class {
        match self {
            Error::Journal(e) if e.is_fenced() => Class::Fenced,
            Error::Journal(e) if e.is_transient() => Class::Transient,
            Error::Journal(e) if e.is_broken() || matches!(e, valkeeper_journal::Error::Full { .. }) => {
                Class::Permanent
            }
            Error::Journal(_) => Class::Bug,
            Error::Kubernetes(
                k8s::Error::Refused { .. } | k8s::Error::NamespaceEnds { .. } | k8s::Error::Settings(_),
            ) => Class::Permanent,
            Error::Kubernetes(k8s::Error::Malformed { .. }) => Class::Bug,
            Error::Kubernetes(
                k8s::Error::NotFound { .. } | k8s::Error::Conflict { .. } | k8s::Error::Ambiguous { .. },
            )
            | Error::NoIdentity => Class::Transient,
            Error::NotLeader(_) => Class::Fenced,
            Error::Deposed { theirs: _ } => Class::Deposed,
        }
    }

    /// What the next run must know of this end; `None`: no more than before.
    pub fn before(&self) -> Option<Before> {
        match self {
            Error::Deposed { theirs } => Some(Before::DeposedBy(*theirs)),
            Error::Journal(valkeeper_journal::Error::Full { .. }) => Some(Before::Full),
            Error::Journal(_) | Error::Kubernetes(_) | Error::NotLeader(_) | Error::NoIdentity => None,
        }
    }

    /// The reason under which it is shown.
    pub fn reason(&self) -> StatusReason {
        match self {
            Error::Journal(e) if e.is_fenced() => StatusReason::Fenced,
            Error::Journal(e) if e.is_unresolved() => StatusReason::AppendUnresolved,
            Error::Journal(e) if e.is_newer() => StatusReason::JournalNewer,
            Error::Journal(e) if e.is_broken() => StatusReason::JournalBroken,
            Error::Journal(valkeeper_journal::Error::Full { .. }) => StatusReason::JournalFull,
            Error::Journal(e) if e.is_transient() => StatusReason::JournalUnavailable,
            Error::Journal(_) => StatusReason::JournalRefused,
            Error::Kubernetes(k8s::Error::Refused { .. } | k8s::Error::NamespaceEnds { .. }) => {
                StatusReason::ApiRefused
            }
            Error::Kubernetes(_) => StatusReason::ApiUnavailable,
            Error::NoIdentity => StatusReason::NoIdentity,
            Error::NotLeader(_) => StatusReason::NotLeader,
            Error::Deposed { theirs: _ } => StatusReason::Fenced,
        }
    }

    /// True if the journal is not to be trusted, or cannot be written, as it is.
    pub fn concerns_journal(&self) -> bool {
        matches!(self, Error::Journal(e) if !e.is_fenced())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_core::ids::Seq;

    #[test]
    fn a_pause_doubles_and_has_a_limit() {
        assert_eq!(Class::Transient.requeue(1), Duration::from_secs(1));
        assert_eq!(Class::Transient.requeue(3), Duration::from_secs(4));
        assert_eq!(Class::Transient.requeue(u32::MAX), Duration::from_secs(30));
        assert_eq!(Class::Fenced.requeue(1), Duration::from_secs(30));
    }

    #[test]
    fn a_fenced_journal_is_no_broken_one() {
        let fenced = Error::Journal(valkeeper_journal::Error::Fenced { by: WriterEpoch(4) });
        assert_eq!((fenced.class(), fenced.concerns_journal()), (Class::Fenced, false));
        let broken =
            Error::Journal(valkeeper_journal::Error::HeadMoved { expected: "5".into(), actual: "3".into() });
        assert_eq!((broken.class(), broken.reason()), (Class::Permanent, StatusReason::JournalBroken));
        assert!(broken.concerns_journal());
    }

    #[test]
    fn in_a_quiet_moment_damage_ends_the_task_and_a_blip_only_makes_it_wait() {
        use valkeeper_journal::{BackendError, Error as OfJournal, Problem};
        let gap = Problem::Gap { after: Seq(1), found: Seq(3) };
        for damage in
            [OfJournal::Broken(gap), OfJournal::Backend(BackendError::Corrupt("object journal-1".to_owned()))]
        {
            let ended = untroubled::<()>(&mut Tending::default(), Some(Err(damage))).unwrap_err();
            assert_eq!((ended.class(), ended.reason()), (Class::Permanent, StatusReason::JournalBroken));
        }
        for blip in [BackendError::Unavailable("timeout".to_owned()), BackendError::Moved] {
            let mut tending = Tending::default();
            let done = untroubled::<()>(&mut tending, Some(Err(OfJournal::Backend(blip)))).unwrap();
            assert_eq!((done, tending.is_due()), (None, false));
        }
    }

    #[test]
    fn a_doubt_is_transient_and_says_its_own_reason() {
        let doubt = Error::Journal(valkeeper_journal::Error::Unresolved("timeout".into()));
        assert_eq!((doubt.class(), doubt.reason()), (Class::Transient, StatusReason::AppendUnresolved));
    }

    #[test]
    fn after_news_it_is_looked_ever_more_calmly_until_something_is_decided() {
        let mut last = PROBE_PERIOD;
        let turns = [(0, 0), (3, 0), (1, 0), (0, 0), (2, 1), (1, 0), (0, 0), (0, 0), (0, 0), (1, 0), (1, 0)];
        let pauses = turns.map(|(records, decisions)| {
            last = news_pause(last, records, decisions);
            last.as_millis()
        });
        assert_eq!(pauses, [1_000, 50, 100, 200, 50, 100, 200, 400, 800, 1_000, 50]);
    }
}

//! What people and tools see: conditions, status fields and Kubernetes Events, all from the same typed reasons.
//! Handed to a task of its own, so that telling never delays doing; written only when it differs from what is there.

mod news;

pub use news::news;

use crate::{
    api::v1alpha1::{
        CertificateStatus, JournalPosition, ReshardingStatus, ValkeyCluster, ValkeyClusterStatus,
    },
    cluster::{Cluster, ClusterId, Shell},
    k8s::{
        self, apply,
        events::{News, Severity},
        watch,
    },
    keeping::Archiving,
    objects,
    reconcile::{Class, Error},
};
use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff,
};
use kube::Resource;
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::mpsc, task::JoinSet};
use valkeeper_core::{
    ids::{Seq, Timestamp},
    observation::CertificateFacts,
    projection::{
        reason::{ConditionReason, StatusReason},
        status as projection,
    },
    state::ClusterState,
};
use valkeeper_journal::Head;

/// Editions that may wait. One is made per turn that changed something, and the task takes all at once; more than this only
/// gather while the API server is away, and then the newest status and the journal say everything.
const EDITIONS_MAX: usize = 64;

/// A status that was handed over and does not show on the server is handed over again after this long: the bound of one
/// call and a little.
const REPUBLISH: Duration = Duration::from_secs(6);

/// First number of the Events about the archive at one record: more than there are about the record itself, which has an effect per
/// member and object at most.
const ARCHIVE_NEWS_FROM: usize = 10_000;

/// What a turn gives to the public.
#[derive(Debug)]
struct Edition {
    status: Option<ValkeyClusterStatus>,
    news: Vec<News>,
}

/// The publishing task of one cluster; ends when dropped.
pub struct Press {
    editions: mpsc::Sender<Edition>,
    handed_over: Option<(ValkeyClusterStatus, Instant)>,
    _task: JoinSet<()>,
}

impl Press {
    /// Starts the task.
    pub fn start(shell: &Arc<Shell>, id: &ClusterId) -> Press {
        let (editions, waiting) = mpsc::channel(EDITIONS_MAX);
        let mut task = JoinSet::new();
        task.spawn(print(Arc::clone(shell), id.clone(), waiting));
        Press { editions, handed_over: None, _task: task }
    }

    fn hand_over(&mut self, status: ValkeyClusterStatus, live: &ValkeyCluster, news: Vec<News>) {
        let shown = live.status.as_ref().is_some_and(|s| same(s, &status));
        let under_way =
            self.handed_over.as_ref().is_some_and(|(s, at)| same(s, &status) && at.elapsed() < REPUBLISH);
        let status = (!shown && !under_way).then_some(status);
        if status.is_none() && news.is_empty() {
            return;
        }
        let handed = status.clone().map(|s| (s, Instant::now()));
        match self.editions.try_send(Edition { status, news }) {
            Ok(()) => self.handed_over = handed.or_else(|| self.handed_over.take()),
            // The status is handed over again at the next turn; the news are in the journal.
            Err(refused) => tracing::warn!(error = %refused, "publishing lags behind"),
        }
    }
}

/// After a turn: its news, and the status if it changed.
pub fn turn(cluster: &mut Cluster, mut news: Vec<News>) {
    let Some(live) = cluster.shell.resource(&cluster.id) else { return };
    let status = told(cluster, &live, None);
    if let Some(number) = cluster.tending.archiving_news() {
        news.extend(archive_news(&live, &status, cluster.state.head, number));
    }
    cluster.press.hand_over(status, &live, news);
}

/// While the journal gives no certain answer.
pub fn journal_in_doubt(cluster: &mut Cluster, error: &Error) {
    tracing::warn!(error = k8s::chain(error), "no effects until the journal has answered");
    let Some(live) = cluster.shell.resource(&cluster.id) else { return };
    let status = told(cluster, &live, Some(error));
    cluster.press.hand_over(status, &live, Vec::new());
}

/// After a task has ended with an error: says so in the conditions, leaving the other fields as they were.
pub async fn trouble(shell: &Shell, id: &ClusterId, error: &Error) {
    let Some(live) = shell.resource(id) else { return };
    let mut status = live.status.clone().unwrap_or_default();
    let intact = status.conditions.iter().find(|c| c.type_ == JOURNAL_INTACT).cloned();
    let generation = live.metadata.generation;
    let mut conditions = troubled(error, generation);
    if !error.concerns_journal() {
        conditions.extend(intact);
    }
    conditions.extend(archived(&Archiving::Unknown, shell.keeping.place(), &live, generation));
    conditions.extend(status.conditions.iter().find(|c| c.type_ == CERTIFICATES_VALID).cloned());
    // Nobody looks while the task is stopped: what was said of the primary is no longer known.
    let mut available = condition(PRIMARY_AVAILABLE, false, error.reason(), "not looked at", generation);
    "Unknown".clone_into(&mut available.status);
    conditions.push(available);
    status.conditions = dated(conditions, &status.conditions);
    status.message = k8s::chain(error);
    status.observed_generation = generation;
    if !live.status.as_ref().is_some_and(|s| same(s, &status)) {
        write(shell, id, &live, &status).await;
    }
}

const JOURNAL_INTACT: &str = "JournalIntact";
const JOURNAL_ARCHIVED: &str = "JournalArchived";
const PRIMARY_AVAILABLE: &str = "PrimaryAvailable";
const CERTIFICATES_VALID: &str = "CertificatesValid";

/// Part of a certificate's life that is left when its renewal is overdue: it was due at half.
const OVERDUE: u32 = 4;

/// The status that a cluster's state amounts to, and where its journal stands.
fn told(cluster: &Cluster, live: &ValkeyCluster, doubt: Option<&Error>) -> ValkeyClusterStatus {
    let mut status = status(&cluster.state, live, doubt);
    let (archiving, place) = (cluster.tending.archiving(), cluster.shell.keeping.place());
    let archived = archived(archiving, place, live, status.observed_generation);
    let now = cluster.clock.now();
    let ends = served(&cluster.state).map(|(pod, certificate)| (pod, certificate.not_after));
    let certified = certified(ends, cluster.shell.vault.leaf_lifetime(), now, status.observed_generation);
    let conditions = status.conditions.into_iter().chain(archived).chain(certified);
    status.conditions = dated(conditions.collect(), known(live));
    status.journal = cluster.journal.head().map(|head| position(cluster, head));
    status
}

fn known(live: &ValkeyCluster) -> &[Condition] {
    live.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default()
}

/// Whether the certificates that pods serve with are renewed in time. Not shown before any agent has said when its own ends.
fn certified(
    ends: impl Iterator<Item = (String, Timestamp)>,
    lifetime: Duration,
    now: Timestamp,
    generation: Option<i64>,
) -> Option<Condition> {
    let (pod, first) = ends.min_by_key(|(_, end)| *end)?;
    let left = i64::try_from((lifetime / OVERDUE).as_millis()).unwrap_or(i64::MAX);
    let (holds, reason, message) = if now.plus_millis(left) < first {
        (true, StatusReason::CertificatesRenewed, "certificates are renewed at half of their life".to_owned())
    } else {
        (false, StatusReason::CertificateEnds, format!("the certificate of {pod} ends at {first}"))
    };
    Some(condition(CERTIFICATES_VALID, holds, reason, &message, generation))
}

/// The certificates that the agents serve with which answer, by pod.
fn served(state: &ClusterState) -> impl Iterator<Item = (String, &CertificateFacts)> {
    let answering = state.members.iter().filter_map(|(id, member)| Some((id, &member.agent()?.certificate)));
    let known = answering.filter(|(_, certificate)| !certificate.thumbprint.is_empty());
    known.map(|(id, certificate)| (objects::names::pod(&state.name, *id), certificate))
}

/// Whether the archive takes what leaves the journal. Not shown where there is no archive; what was shown stays until something had to go.
fn archived(
    archiving: &Archiving,
    place: Option<&str>,
    live: &ValkeyCluster,
    generation: Option<i64>,
) -> Option<Condition> {
    let place = place?;
    let kind = JOURNAL_ARCHIVED;
    match archiving {
        Archiving::Unknown => known(live).iter().find(|c| c.type_ == kind).cloned(),
        Archiving::Takes => {
            let message = format!("{place} has what left the journal");
            Some(condition(kind, true, StatusReason::Archived, &message, generation))
        }
        Archiving::Refuses { kind: _, why } => {
            Some(condition(kind, false, StatusReason::ArchiveRefused, why, generation))
        }
    }
}

/// What is to be told of the archive, if the live status does not say it yet: a task that begins anew finds what it found before.
fn archive_news(
    live: &ValkeyCluster,
    status: &ValkeyClusterStatus,
    head: Seq,
    number: usize,
) -> Option<News> {
    let find = |conditions: &[Condition]| conditions.iter().find(|c| c.type_ == JOURNAL_ARCHIVED).cloned();
    let (before, now) = (find(known(live)), find(&status.conditions)?);
    let takes = now.status == "True";
    // That it takes what it always took is no news.
    let is_known = before.map_or(takes, |before| (before.status, before.reason) == (now.status, now.reason));
    (!is_known).then(|| News {
        severity: if takes { Severity::Normal } else { Severity::Warning },
        reason: if takes { StatusReason::Archived } else { StatusReason::ArchiveRefused }.code(),
        action: "Archive".to_owned(),
        note: now.message,
        seq: head,
        index: ARCHIVE_NEWS_FROM + number,
    })
}

fn position(cluster: &Cluster, head: &Head) -> JournalPosition {
    let Head { seq, epoch, time: _, hash } = head;
    let stream = cluster.journal.stream().0.clone();
    // What is lost with the process is nothing that the next one must find.
    let hash = if cluster.shell.keeping.survives { hash.to_string() } else { String::new() };
    JournalPosition { stream, seq: signed(seq.0), epoch: signed(epoch.0), hash }
}

/// The status that a state amounts to.
fn status(state: &ClusterState, live: &ValkeyCluster, doubt: Option<&Error>) -> ValkeyClusterStatus {
    let projection::Status { conditions, primaries, members_ready, members_wanted, generation, resharding } =
        projection::status(state);
    // A refused spec has been observed, too: kstatus shall say Failed and not wait for ever.
    let observed = if state.spec_error.is_some() { live.metadata.generation } else { generation };
    let message = conditions
        .iter()
        .find(|c| c.kind == projection::ConditionKind::Ready && !c.holds)
        .map(|c| c.message.clone())
        .unwrap_or_default();
    let mut shown: Vec<Condition> = conditions
        .iter()
        .map(|c| condition(c.kind.as_str(), c.holds, c.reason, &c.message, observed))
        .collect();
    match doubt {
        None => shown.push(condition(
            JOURNAL_INTACT,
            true,
            StatusReason::Intact,
            "every record is chained to the one before",
            observed,
        )),
        Some(error) => {
            let troubled = troubled(error, observed);
            shown.retain(|c| !troubled.iter().any(|t| t.type_ == c.type_));
            shown.extend(troubled);
        }
    }
    let pod = |member| objects::names::pod(&state.name, member);
    let primaries: Vec<(String, String)> = primaries.iter().map(|(s, m)| (s.to_string(), pod(*m))).collect();
    ValkeyClusterStatus {
        observed_generation: observed,
        conditions: dated(shown, known(live)),
        primary: primaries.iter().map(|(_, pod)| pod.as_str()).collect::<Vec<_>>().join(","),
        primaries: primaries.into_iter().collect(),
        ready_members: i32::try_from(members_ready).unwrap_or(i32::MAX),
        members: i32::try_from(members_wanted).unwrap_or(i32::MAX),
        ready: format!("{members_ready}/{members_wanted}"),
        certificates: certificates(state),
        resharding: resharding.map(shown_resharding),
        journal: None,
        message: if let Some(error) = doubt { k8s::chain(error) } else { message },
    }
}

/// What the agents that answer serve with, by pod.
fn certificates(state: &ClusterState) -> BTreeMap<String, CertificateStatus> {
    let status = |CertificateFacts { thumbprint, not_after }: &CertificateFacts| CertificateStatus {
        thumbprint: thumbprint.clone(),
        not_after: not_after.to_string(),
    };
    served(state).map(|(pod, certificate)| (pod, status(certificate))).collect()
}

fn shown_resharding(resharding: projection::Resharding) -> ReshardingStatus {
    let projection::Resharding { slots_moved, slots_left, seconds_left, message } = resharding;
    ReshardingStatus {
        slots_moved: i64::from(slots_moved),
        slots_left: i64::from(slots_left),
        seconds_left: seconds_left.map(signed),
        message,
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The conditions of a task that an error keeps from going on.
fn troubled(error: &Error, generation: Option<i64>) -> Vec<Condition> {
    let (reason, message) = (error.reason(), k8s::chain(error));
    let stalled = match error.class() {
        Class::Permanent | Class::Bug => true,
        Class::Transient | Class::Fenced | Class::Deposed => false,
    };
    let mut conditions = vec![
        condition("Ready", false, reason, &message, generation),
        condition("Reconciling", !stalled, reason, &message, generation),
        condition("Stalled", stalled, reason, &message, generation),
    ];
    if error.concerns_journal() {
        conditions.push(condition(JOURNAL_INTACT, false, reason, &message, generation));
    }
    conditions
}

fn condition(
    kind: &str,
    holds: bool,
    reason: impl Into<ConditionReason>,
    message: &str,
    generation: Option<i64>,
) -> Condition {
    Condition {
        type_: kind.to_owned(),
        status: if holds { "True" } else { "False" }.to_owned(),
        reason: reason.into().code().to_owned(),
        message: message.to_owned(),
        observed_generation: generation,
        last_transition_time: Time(jiff::Timestamp::UNIX_EPOCH),
    }
}

/// Gives each condition the time since which it has its status.
fn dated(mut conditions: Vec<Condition>, known: &[Condition]) -> Vec<Condition> {
    let now = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap_or_default();
    for condition in &mut conditions {
        let before = known.iter().find(|k| k.type_ == condition.type_ && k.status == condition.status);
        condition.last_transition_time = before.map_or(Time(now), |k| k.last_transition_time.clone());
    }
    conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
    conditions
}

/// True if two statuses say the same, whenever they began to.
fn same(a: &ValkeyClusterStatus, b: &ValkeyClusterStatus) -> bool {
    let undated = |status: &ValkeyClusterStatus| {
        let mut status = status.clone();
        status.conditions.sort_by(|x, y| x.type_.cmp(&y.type_));
        for condition in &mut status.conditions {
            condition.last_transition_time = Time(jiff::Timestamp::UNIX_EPOCH);
        }
        status
    };
    undated(a) == undated(b)
}

async fn print(shell: Arc<Shell>, id: ClusterId, mut editions: mpsc::Receiver<Edition>) {
    let mut batch = Vec::new();
    while editions.recv_many(&mut batch, EDITIONS_MAX).await > 0 {
        let Some(live) = shell.resource(&id) else { return };
        let mut newest = None;
        for Edition { status, news } in batch.drain(..) {
            for item in news {
                if shell.leadership.check().is_ok()
                    && let Err(error) = shell.publisher.publish(&item, &live.object_ref(&())).await
                {
                    tracing::warn!(j = item.seq.0, error = k8s::chain(&error), "an Event was not published");
                }
            }
            newest = status.or(newest);
        }
        if let Some(status) = newest {
            write(&shell, &id, &live, &status).await;
        }
    }
}

async fn write(shell: &Shell, id: &ClusterId, live: &ValkeyCluster, status: &ValkeyClusterStatus) {
    if shell.leadership.check().is_err() {
        return;
    }
    let status = serde_json::to_value(status).unwrap_or_default();
    match apply::apply_status(&shell.clients.requests, live, status).await {
        Ok(written) => {
            shell.world.clusters.written(&written);
            // The watch is silent about what came in with this answer.
            if !watch::asks_the_same(live, &written) {
                shell.wakers.of(&id.owner).notify_one();
            }
        }
        Err(error) if error.is_not_found() => {}
        Err(error) => tracing::warn!(error = k8s::chain(&error), "the status was not published"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_journal::archive::ArchiveError;

    fn resource() -> ValkeyCluster {
        let spec = serde_json::json!({ "topology": "Replication" });
        let mut cluster = ValkeyCluster::new("orders", serde_json::from_value(spec).unwrap());
        cluster.metadata.generation = Some(3);
        cluster
    }

    fn shown<'a>(status: &'a ValkeyClusterStatus, kind: &str) -> &'a Condition {
        status.conditions.iter().find(|c| c.type_ == kind).unwrap()
    }

    #[test]
    fn every_status_has_the_three_conditions_of_kstatus_and_our_own() {
        let status = status(&ClusterState::default(), &resource(), None);
        let kinds: Vec<&str> = status.conditions.iter().map(|c| c.type_.as_str()).collect();
        assert_eq!(kinds, ["JournalIntact", "PrimaryAvailable", "Ready", "Reconciling", "Stalled"]);
        assert_eq!(shown(&status, "Ready").status, "False");
        assert_eq!(shown(&status, "JournalIntact").status, "True");
    }

    #[test]
    fn a_refused_spec_is_observed_and_stalled() {
        let state = ClusterState {
            spec_error: Some("spec.shards: 99".into()),
            spec_seen: true,
            ..ClusterState::default()
        };
        let status = status(&state, &resource(), None);
        assert_eq!(status.observed_generation, Some(3));
        assert_eq!(shown(&status, "Stalled").status, "True");
        assert_eq!(shown(&status, "Stalled").reason, "SpecInvalid");
    }

    #[test]
    fn slots_on_their_way_are_counted_and_what_nobody_knows_is_left_out() {
        let shown = |resharding| serde_json::to_value(shown_resharding(resharding)).unwrap();
        let begun = projection::Resharding { slots_left: 3_277, ..projection::Resharding::default() };
        assert_eq!(shown(begun.clone()), serde_json::json!({ "slotsMoved": 0, "slotsLeft": 3277 }));
        let message = Some("0-0: -NOAUTH".to_owned());
        let failed = projection::Resharding { slots_moved: 12, seconds_left: Some(40), message, ..begun };
        assert_eq!(
            shown(failed),
            serde_json::json!({ "slotsMoved": 12, "slotsLeft": 3277, "secondsLeft": 40, "message": "0-0: -NOAUTH" })
        );
        let quiet = serde_json::to_value(status(&ClusterState::default(), &resource(), None)).unwrap();
        assert_eq!(quiet.get("resharding"), None);
    }

    #[test]
    fn a_broken_journal_is_not_ready_and_says_why() {
        let broken = valkeeper_journal::Error::HeadMoved { expected: "7".into(), actual: "5".into() };
        let status = status(&ClusterState::default(), &resource(), Some(&Error::Journal(broken)));
        let intact = shown(&status, "JournalIntact");
        assert_eq!((intact.status.as_str(), intact.reason.as_str()), ("False", "JournalBroken"));
        assert!(intact.message.contains("expected 7, found 5"), "{}", intact.message);
        assert_eq!(shown(&status, "Stalled").status, "True");
        assert_eq!(status.conditions.iter().filter(|c| c.type_ == "Ready").count(), 1);
    }

    #[test]
    fn a_condition_keeps_its_time_until_its_status_changes() {
        let mut live = resource();
        let first = status(&ClusterState::default(), &live, None);
        live.status = Some(first.clone());
        if let Some(s) = &mut live.status {
            for c in &mut s.conditions {
                c.last_transition_time = Time(jiff::Timestamp::UNIX_EPOCH);
            }
        }
        let second = status(&ClusterState::default(), &live, None);
        assert!(same(&first, &second));
        assert_eq!(shown(&second, "Ready").last_transition_time.0, jiff::Timestamp::UNIX_EPOCH);
    }

    #[test]
    fn a_certificate_that_was_not_renewed_is_named_with_its_end() {
        let at = |s: i64| Timestamp(0).plus_millis(s * 1_000);
        let shows = |ends: &[(&str, i64)], after_s: i64| {
            let ends = ends.iter().map(|(pod, end)| ((*pod).to_owned(), at(*end)));
            let shown = certified(ends, Duration::from_secs(400), at(after_s), Some(3))?;
            Some((shown.status, shown.reason, shown.message))
        };
        assert_eq!(shows(&[], 0), None);
        let both = [("orders-0-0", 1_000), ("orders-0-1", 400)];
        assert_eq!(shows(&both, 299).map(|(status, ..)| status).as_deref(), Some("True"));
        let (status, reason, message) = shows(&both, 300).unwrap();
        assert_eq!((status.as_str(), reason.as_str()), ("False", "CertificateEnds"));
        assert!(message.contains("orders-0-1") && message.contains("1970-01-01T00:06:40"), "{message}");
    }

    #[test]
    fn a_refusing_archive_is_shown_until_it_takes_records_again_and_told_when_that_changes() {
        let mut live = resource();
        let place = Some("s3://journals/prod");
        let mut show = |archiving: &Archiving, place: Option<&str>| {
            let mut now = status(&ClusterState::default(), &live, None);
            now.conditions.extend(archived(archiving, place, &live, Some(3)));
            let news = archive_news(&live, &now, Seq(42), 1);
            let changed = !live.status.as_ref().is_some_and(|before| same(before, &now));
            live.status = Some(now.clone());
            let found = now.conditions.into_iter().find(|c| c.type_ == "JournalArchived");
            let told = news.map(|news| (news.severity, news.reason, news.note));
            (found.map(|c| (c.status, c.reason, c.message)), told, changed)
        };
        let says = |status: &str, reason: &str, message: &str| {
            Some((status.to_owned(), reason.to_owned(), message.to_owned()))
        };
        let kind = std::mem::discriminant(&ArchiveError::Nothing);
        let refuses = |why: &str| Archiving::Refuses { kind, why: why.to_owned() };
        let taken = says("True", "Archived", "s3://journals/prod has what left the journal");
        assert_eq!(show(&Archiving::Unknown, place), (None, None, true));
        assert_eq!(show(&Archiving::Takes, place), (taken.clone(), None, true), "as it should be: no news");
        let refused = says("False", "ArchiveRefused", "403");
        let warned = Some((Severity::Warning, "ArchiveRefused", "403".to_owned()));
        assert_eq!(show(&refuses("403"), place), (refused.clone(), warned, true));
        assert_eq!(show(&refuses("403"), place), (refused.clone(), None, false), "nothing is written again");
        // The task begins anew.
        assert_eq!(show(&Archiving::Unknown, place), (refused, None, false));
        let (shown, told, _) = show(&Archiving::Takes, place);
        assert_eq!((shown, told.map(|(severity, ..)| severity)), (taken, Some(Severity::Normal)));
        // There is no archive any more.
        assert_eq!(show(&Archiving::Takes, None), (None, None, true));
    }
}

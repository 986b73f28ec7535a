//! Leader election: who may try to act. (Who may write is said by the journal's head.) By hand on a Lease, because what
//! matters is not the holding but its end: every task of the process must have stopped before anyone else may start.
//!
//! All arithmetic is on this process's monotonic clock. The times inside the Lease are for people: another holder's
//! clock is never compared with ours; its lease has expired when it did not change for its duration *as we saw it*.

use crate::k8s::{self, lease::LeaseStore};
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff,
};
use std::time::Duration;
use tokio::{sync::watch, time::Instant};

/// Others wait this long after the last change they saw before they take over: the usual value of controllers.
pub const LEASE_DURATION: Duration = Duration::from_secs(15);

/// Leadership ends this long after the *sending* of the last renewal that was confirmed. The 5 s to [`LEASE_DURATION`] are
/// for the tasks to stop and for one call of the API server under way ([`k8s::API_CALL_MAX`]).
pub const RENEW_DEADLINE: Duration = Duration::from_secs(10);

/// Pause between two attempts: five renewals fit into [`RENEW_DEADLINE`], so a few lost ones cost nothing.
pub const RETRY_PERIOD: Duration = Duration::from_secs(2);

/// Until when this process may act; the sender is the campaign.
#[derive(Clone, Debug)]
pub struct Leadership {
    until: watch::Receiver<Option<Instant>>,
}

/// The process is not, or no longer, the leader.
#[derive(Debug, thiserror::Error)]
#[error("this process is not the leader")]
pub struct NotLeader;

impl Leadership {
    /// Checks that leadership has not run out. Asked before every effect: a process that was stopped and thaws
    /// runs its tasks before its timers have told it how late it is.
    ///
    /// # Errors
    /// [`NotLeader`].
    pub fn check(&self) -> Result<(), NotLeader> {
        match *self.until.borrow() {
            Some(until) if Instant::now() < until => Ok(()),
            Some(_) | None => Err(NotLeader),
        }
    }

    /// Of a process that leads until then, whatever happens: for the tests of what needs it.
    #[cfg(test)]
    pub fn until(end: Instant) -> Leadership {
        Leadership { until: watch::channel(Some(end)).1 }
    }

    /// Returns when this process leads.
    pub async fn gained(&mut self) {
        while self.check().is_err() {
            if self.until.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Returns when leadership has ended: another holder was seen, or no renewal was confirmed in time.
    pub async fn lost(&mut self) {
        loop {
            let Some(until) = *self.until.borrow_and_update() else {
                return;
            };
            tokio::select! {
                () = tokio::time::sleep_until(until) => if self.check().is_err() { return },
                changed = self.until.changed() => if changed.is_err() { return },
            }
        }
    }
}

/// The state of one candidate. Pure: what to do next with the Lease that was read.
#[derive(Debug)]
pub struct Candidate {
    holder: String,
    /// How the names of this process's predecessors in the same pod begin: kubelet starts a container only when the one
    /// before it has ended, so whoever of them holds the Lease is no more.
    predecessors: Option<String>,
    /// The Lease as it was when it last changed, and when this process saw that.
    sighting: Option<(LeaseSpec, Instant)>,
}

/// What a candidate does with the Lease.
#[derive(Clone, Debug, PartialEq)]
pub enum Move {
    /// It is ours or free: write this.
    Write(LeaseSpec),
    /// Another holds it.
    Stand {
        /// Who.
        holder: String,
    },
}

impl Candidate {
    /// A candidate that writes `holder` into the Lease.
    pub fn new(holder: String) -> Self {
        Candidate { holder, predecessors: None, sighting: None }
    }

    /// The same, in a pod: names of processes in it begin with `pod`.
    pub fn in_pod(holder: String, pod: Option<String>) -> Self {
        Candidate { predecessors: pod, ..Candidate::new(holder) }
    }

    /// What to do with the Lease `live` (`None`: there is none), seen at `now`; `wall` is written into it for people.
    pub fn consider(&mut self, live: Option<&LeaseSpec>, now: Instant, wall: jiff::Timestamp) -> Move {
        let Some(spec) = live else {
            return Move::Write(self.spec(None, wall));
        };
        let seen_at = match &self.sighting {
            Some((known, at)) if known == spec => *at,
            Some(_) | None => {
                self.sighting = Some((spec.clone(), now));
                now
            }
        };
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let lasts = spec
            .lease_duration_seconds
            .and_then(|s| u64::try_from(s).ok())
            .map_or(LEASE_DURATION, Duration::from_secs);
        let is_predecessor = self.predecessors.as_ref().is_some_and(|pod| holder.starts_with(pod));
        if holder.is_empty() || holder == self.holder || is_predecessor || now >= seen_at + lasts {
            Move::Write(self.spec(Some(spec), wall))
        } else {
            Move::Stand { holder }
        }
    }

    fn spec(&self, live: Option<&LeaseSpec>, wall: jiff::Timestamp) -> LeaseSpec {
        let ours = live.is_some_and(|l| l.holder_identity.as_deref() == Some(&self.holder));
        let transitions = live.and_then(|l| l.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.holder.clone()),
            lease_duration_seconds: i32::try_from(LEASE_DURATION.as_secs()).ok(),
            acquire_time: if ours {
                live.and_then(|l| l.acquire_time.clone())
            } else {
                Some(MicroTime(wall))
            },
            renew_time: Some(MicroTime(wall)),
            lease_transitions: Some(if ours || live.is_none() {
                transitions
            } else {
                transitions.saturating_add(1)
            }),
            preferred_holder: None,
            strategy: None,
        }
    }
}

/// Campaigns until dropped. The receiver says until when the process leads.
pub struct Campaign {
    store: LeaseStore,
    candidate: Candidate,
    namespace: String,
    /// The Lease as last written or read; spares a read per renewal.
    known: Option<Lease>,
    until: watch::Sender<Option<Instant>>,
}

impl Campaign {
    /// A campaign for the Lease in `store`, and the handle that tells its state.
    pub fn new(
        store: LeaseStore,
        namespace: &str,
        holder: String,
        pod: Option<String>,
    ) -> (Self, Leadership) {
        let (until, receiver) = watch::channel(None);
        let campaign = Campaign {
            store,
            candidate: Candidate::in_pod(holder, pod),
            namespace: namespace.to_owned(),
            known: None,
            until,
        };
        (campaign, Leadership { until: receiver })
    }

    /// Tries to get and to keep the Lease, for ever.
    pub async fn run(&mut self) {
        let mut standing_behind = String::new();
        loop {
            let sent_at = Instant::now();
            match self.attempt().await {
                Ok(Move::Write(_)) => {
                    if self.until.send_replace(Some(sent_at + RENEW_DEADLINE)).is_none() {
                        tracing::info!(holder = %self.candidate.holder, "leading");
                    }
                    standing_behind.clear();
                }
                Ok(Move::Stand { holder }) => {
                    self.until.send_replace(None);
                    if standing_behind != holder {
                        tracing::info!(%holder, "another leads");
                        standing_behind = holder;
                    }
                }
                // Leadership goes on until its deadline: an answer that was lost says nothing about the Lease.
                Err(error) => {
                    self.known = None;
                    tracing::warn!(error = k8s::chain(&error), "the Lease could not be renewed");
                }
            }
            tokio::time::sleep(RETRY_PERIOD).await;
        }
    }

    async fn attempt(&mut self) -> Result<Move, k8s::Error> {
        let live = match self.known.take() {
            Some(lease) => Some(lease),
            None => self.store.get().await?,
        };
        let now = Instant::now();
        let live_spec = live.as_ref().map(|l| l.spec.clone().unwrap_or_default());
        let next = self.candidate.consider(live_spec.as_ref(), now, jiff::Timestamp::now());
        let Move::Write(spec) = &next else { return Ok(next) };
        let written = match live {
            Some(mut lease) => {
                lease.spec = Some(spec.clone());
                self.store.replace(&lease).await
            }
            None => self.store.create(&self.fresh(spec.clone())).await,
        };
        match written {
            Ok(lease) => {
                self.known = Some(lease);
                Ok(next)
            }
            Err(error) if error.is_conflict() => {
                // Someone wrote it in between: read it and see who.
                let spec = self.store.get().await?.and_then(|l| l.spec).unwrap_or_default();
                Ok(match self.candidate.consider(Some(&spec), Instant::now(), jiff::Timestamp::now()) {
                    Move::Stand { holder } => Move::Stand { holder },
                    // Ours or free, but nothing was written: not leading by this attempt.
                    Move::Write(_) => return Err(error),
                })
            }
            Err(error) => Err(error),
        }
    }

    fn fresh(&self, spec: LeaseSpec) -> Lease {
        let mut lease = Lease { spec: Some(spec), ..Lease::default() };
        lease.metadata.name = Some(self.store.name().to_owned());
        lease.metadata.namespace = Some(self.namespace.clone());
        lease.metadata.labels = Some([(k8s::MANAGED_BY.to_owned(), k8s::FIELD_MANAGER.to_owned())].into());
        lease
    }

    /// Gives the Lease back, so that a successor need not wait for its expiry. Only to be called when every task has stopped.
    pub async fn release(mut self) {
        self.until.send_replace(None);
        let Some(mut lease) = self.known.take() else {
            return;
        };
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
        }
        if let Err(error) = self.store.replace(&lease).await {
            tracing::warn!(error = k8s::chain(&error), "the Lease was not given back; it expires by itself");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wall() -> jiff::Timestamp {
        jiff::Timestamp::UNIX_EPOCH
    }

    fn held_by(holder: &str, renewed_s: i64) -> LeaseSpec {
        let renewed = jiff::Timestamp::from_second(renewed_s).unwrap();
        LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(15),
            renew_time: Some(MicroTime(renewed)),
            lease_transitions: Some(4),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn a_predecessor_in_the_same_pod_is_not_waited_for() {
        let now = Instant::now();
        let held = LeaseSpec { holder_identity: Some("op.uid-1_a".into()), ..LeaseSpec::default() };
        let mut same = Candidate::in_pod("op.uid-1_b".into(), Some("op.uid-1_".into()));
        assert!(matches!(same.consider(Some(&held), now, jiff::Timestamp::UNIX_EPOCH), Move::Write(_)));
        let mut other = Candidate::in_pod("op.uid-2_b".into(), Some("op.uid-2_".into()));
        assert!(matches!(other.consider(Some(&held), now, jiff::Timestamp::UNIX_EPOCH), Move::Stand { .. }));
    }

    #[test]
    fn a_missing_lease_is_taken() {
        let mut me = Candidate::new("me".into());
        assert!(
            matches!(me.consider(None, Instant::now(), wall()), Move::Write(s) if s.lease_transitions == Some(0))
        );
    }

    #[test]
    fn a_foreign_lease_expires_by_our_clock_and_not_by_its_times() {
        let mut me = Candidate::new("me".into());
        let start = Instant::now();
        // Its renewTime is in 1970: that alone says nothing.
        let theirs = held_by("they", 0);
        assert_eq!(me.consider(Some(&theirs), start, wall()), Move::Stand { holder: "they".into() });
        let just_before = start + LEASE_DURATION - Duration::from_millis(1);
        assert_eq!(me.consider(Some(&theirs), just_before, wall()), Move::Stand { holder: "they".into() });
        let Move::Write(spec) = me.consider(Some(&theirs), start + LEASE_DURATION, wall()) else {
            panic!("the lease has expired")
        };
        assert_eq!((spec.holder_identity.as_deref(), spec.lease_transitions), (Some("me"), Some(5)));
    }

    #[test]
    fn every_renewal_that_is_seen_starts_the_wait_anew() {
        let mut me = Candidate::new("me".into());
        let start = Instant::now();
        me.consider(Some(&held_by("they", 0)), start, wall());
        let later = start + LEASE_DURATION - Duration::from_secs(1);
        me.consider(Some(&held_by("they", 14)), later, wall());
        let at = start + LEASE_DURATION + Duration::from_secs(5);
        assert_eq!(
            me.consider(Some(&held_by("they", 14)), at, wall()),
            Move::Stand { holder: "they".into() }
        );
    }

    #[test]
    fn a_lease_that_was_given_back_is_taken_at_once() {
        let mut me = Candidate::new("me".into());
        assert!(matches!(me.consider(Some(&held_by("", 0)), Instant::now(), wall()), Move::Write(_)));
    }

    #[test]
    fn renewing_is_no_transition() {
        let mut me = Candidate::new("me".into());
        let Move::Write(spec) = me.consider(Some(&held_by("me", 0)), Instant::now(), wall()) else {
            panic!("it is ours")
        };
        assert_eq!(spec.lease_transitions, Some(4));
    }

    #[tokio::test(start_paused = true)]
    async fn leadership_ends_by_itself_when_no_renewal_is_confirmed() {
        let (until, receiver) = watch::channel(Some(Instant::now() + RENEW_DEADLINE));
        let mut leadership = Leadership { until: receiver };
        assert!(leadership.check().is_ok());
        let start = Instant::now();
        leadership.lost().await;
        assert!(start.elapsed() >= RENEW_DEADLINE && start.elapsed() < LEASE_DURATION);
        assert!(leadership.check().is_err());
        drop(until);
    }

    #[tokio::test(start_paused = true)]
    async fn a_thawed_process_knows_that_it_no_longer_leads_before_any_timer_ran() {
        let (_until, receiver) = watch::channel(Some(Instant::now() + RENEW_DEADLINE));
        let leadership = Leadership { until: receiver };
        tokio::time::advance(Duration::from_secs(20)).await;
        assert!(leadership.check().is_err());
    }
}

//! Connections to the members of one cluster: made and dropped as pods come and go, and asked all at once.

use crate::{
    cluster::Pace,
    valkey::{self, Credentials, Look, MemberLink, Secret, Target, Way},
};
use futures::{StreamExt, future::join_all, stream::FuturesUnordered};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};
use tokio::{sync::Notify, time::Instant};
use valkeeper_core::{
    config::PORT, ids::MemberId, observation::Observed, slots::SlotSet, spec::Topology, weights::SlotWeights,
};

/// What was counted in the slots of members, or why one does not tell.
pub type Weighed = BTreeMap<MemberId, Result<SlotWeights, valkey::Error>>;

/// A member that was too slow to count so often in a row does not tell.
const COUNTS_MAX: u32 = 5;

/// How long a look waits for a silent member when there is something to act on: the others have answered after about a
/// millisecond, and each millisecond here is one of outage.
const SILENT_WAIT_URGENT: Duration = Duration::from_millis(50);

/// How long a look waits for a silent member otherwise. The link's own bound is a little longer than a stall by fork and
/// a little shorter than this.
const SILENT_WAIT_NORMAL: Duration = Duration::from_millis(600);

/// The connections.
pub struct Links {
    way: Arc<dyn Way>,
    links: BTreeMap<MemberId, MemberLink>,
    credentials: Option<Credentials>,
    answered: BTreeMap<MemberId, Instant>,
    /// How often in a row a member was too slow to count.
    slow: BTreeMap<MemberId, u32>,
    /// Woken when a held connection ends.
    pub lost: Arc<Notify>,
}

impl Links {
    /// None yet. They lead this way.
    pub fn new(way: Arc<dyn Way>) -> Links {
        Links {
            way,
            links: BTreeMap::new(),
            credentials: None,
            answered: BTreeMap::new(),
            slow: BTreeMap::new(),
            lost: Arc::default(),
        }
    }

    /// The connection to a member.
    pub fn get(&self, member: MemberId) -> Option<&MemberLink> {
        self.links.get(&member)
    }

    /// Logs in by this name and password from now on. Connections that there are stay: what has lived can be seen to die.
    pub fn log_in_as(&mut self, user: &str, password: &str) {
        self.credentials = Some(Credentials::new(user, Secret::new(password)));
    }

    /// Brings the connections in line with the members' addresses.
    pub fn follow(&mut self, addresses: &BTreeMap<MemberId, IpAddr>, topology: Topology) {
        let Some(credentials) = &self.credentials else { return };
        self.links.retain(|member, link| {
            let Target { member: _, address, port: _, topology: asked } = link.target();
            addresses.get(member) == Some(&address)
                && asked == topology
                && !link.is_refused_with_other(credentials)
        });
        self.answered.retain(|member, _| self.links.contains_key(member));
        for (member, address) in addresses {
            self.links.entry(*member).or_insert_with(|| {
                let target = Target { member: *member, address: *address, port: PORT, topology };
                MemberLink::connect(
                    target,
                    Arc::clone(&self.way),
                    credentials.clone(),
                    Arc::clone(&self.lost),
                )
            });
        }
    }

    /// Looks at all members at once. Who has not answered when the wait is over is not in the answer: nobody
    /// looked. If a connection ends meanwhile, the wait becomes the urgent one and another turn will follow.
    pub async fn look(&mut self, pace: Pace) -> BTreeMap<MemberId, Observed<Look>> {
        let start = Instant::now();
        let mut until = match pace {
            Pace::Urgent => start + SILENT_WAIT_URGENT,
            Pace::Normal => start + SILENT_WAIT_NORMAL,
        };
        let mut looks: FuturesUnordered<_> =
            self.links.iter().map(|(member, link)| async move { (*member, link.look().await) }).collect();
        let mut answers = BTreeMap::new();
        let mut lost_meanwhile = false;
        while !looks.is_empty() {
            tokio::select! {
                biased;
                Some((member, look)) = looks.next() => {
                    answers.insert(member, look);
                }
                () = self.lost.notified() => {
                    lost_meanwhile = true;
                    until = until.min(Instant::now() + SILENT_WAIT_URGENT);
                }
                () = tokio::time::sleep_until(until) => break,
            }
        }
        drop(looks);
        let spoke =
            |(member, look): (&MemberId, &Observed<Look>)| Some((*member, look.present()?.answered_at));
        self.answered.extend(answers.iter().filter_map(spoke));
        if lost_meanwhile {
            // Whose connection ended may have answered just before: look again after this turn.
            self.lost.notify_one();
        }
        answers
    }

    /// Has members count what is in their slots, all at once. If a connection ends meanwhile nobody has been asked: each millisecond
    /// here may be one of outage. Who is too slow is left out a few times.
    pub async fn weigh(&mut self, slots: &BTreeMap<MemberId, SlotSet>) -> Weighed {
        let weighed = self.weigh_once(slots).await;
        without_slow(&mut self.slow, weighed)
    }

    async fn weigh_once(&self, slots: &BTreeMap<MemberId, SlotSet>) -> Weighed {
        let asked = slots.iter().filter_map(|(member, slots)| Some((member, slots, self.links.get(member)?)));
        let weighed = asked.map(|(member, slots, link)| async move { (*member, link.weigh(slots).await) });
        tokio::select! {
            biased;
            () = self.lost.notified() => {
                // The turn that follows must hear of it, too.
                self.lost.notify_one();
                Weighed::new()
            }
            weighed = join_all(weighed) => weighed.into_iter().collect(),
        }
    }

    /// When a member answered last at the address where it is now, in this task.
    pub fn answered_at(&self, member: MemberId) -> Option<Instant> {
        self.answered.get(&member).copied()
    }
}

/// Leaves out who is to be asked again, as he was too slow: a server that forks, or works off a burst, counts a moment later. `slow`: how
/// often in a row each was.
fn without_slow(slow: &mut BTreeMap<MemberId, u32>, mut weighed: Weighed) -> Weighed {
    weighed.retain(|member, told| {
        if *told != Err(valkey::Error::Silent) {
            slow.remove(member);
            return true;
        }
        let tries = slow.entry(*member).or_default();
        *tries = tries.saturating_add(1);
        let gives_up = *tries >= COUNTS_MAX;
        if gives_up {
            slow.remove(member);
        }
        gives_up
    });
    weighed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_too_slow_to_count_is_asked_five_times_in_a_row() {
        let (quick, busy) = (MemberId::new(0, 0), MemberId::new(1, 0));
        let counted = || Ok(SlotWeights::sum_up(&[(0, 1)], 1));
        let told = |slow: &mut BTreeMap<_, _>, by_busy: Result<SlotWeights, valkey::Error>| {
            let weighed = without_slow(slow, Weighed::from([(quick, counted()), (busy, by_busy)]));
            assert_eq!(weighed.get(&quick), Some(&counted()));
            weighed.contains_key(&busy)
        };
        let mut slow = BTreeMap::new();
        let silent = || Err(valkey::Error::Silent);
        for _ in 0..2 {
            assert_eq!([0; 4].map(|_| told(&mut slow, silent())), [false; 4]);
            assert!(told(&mut slow, silent()), "the fifth time in a row it does not tell");
        }
        assert!(!told(&mut slow, silent()));
        assert!(told(&mut slow, counted()), "a moment later");
        assert_eq!([0; 4].map(|_| told(&mut slow, silent())), [false; 4], "and counted from the first again");
        assert!(told(&mut BTreeMap::new(), Err(valkey::Error::Closed)), "that is another's business");
    }
}

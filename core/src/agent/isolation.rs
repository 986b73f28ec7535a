//! How long a primary may accept writes without being confirmed. A confirmation counts from when the request for it was
//! sent: it arrives late, repeated or never, and none of that makes it younger.

use super::ledger::Brief;
use crate::ids::{MemberId, Seq, Timestamp};
use std::collections::BTreeMap;

/// Members below which there is no window: two cannot outvote one, so the holder goes on and the operator must fence it.
pub const MEMBERS_MIN: usize = 3;

/// An answer to a request for confirmation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nobody with a higher grant is known there.
    Confirmed,
    /// Not confirmed, and no higher grant is known there either.
    Refused,
    /// A higher grant is known there.
    Deposed {
        /// That grant.
        grant: Seq,
    },
}

impl Answer {
    /// The answer of a peer that knows `known`, to a holder of `mine`.
    pub fn of(confirmed: bool, known: Seq, mine: Seq) -> Self {
        match confirmed {
            true => Answer::Confirmed,
            false if known > mine => Answer::Deposed { grant: known },
            false => Answer::Refused,
        }
    }
}

/// The confirmations of a holder's grant. Times are of one clock, which never goes back: the agent's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confirmations {
    window_ms: i64,
    /// Peers whose confirmation makes a majority together with the holder itself.
    needed: usize,
    /// When the grant was received: the operator spoke then.
    granted_at: Timestamp,
    by_peer: BTreeMap<MemberId, Timestamp>,
    deposed: Option<Seq>,
}

impl Confirmations {
    /// A grant received at `now` by a member of a roster of `members`. `window_ms` 0: no window.
    pub fn new(members: usize, window_ms: i64, now: Timestamp) -> Self {
        let window_ms = if members < MEMBERS_MIN { 0 } else { window_ms };
        // A majority of `members` is members / 2 + 1, the holder among them.
        Confirmations {
            window_ms,
            needed: members / 2,
            granted_at: now,
            by_peer: BTreeMap::new(),
            deposed: None,
        }
    }

    /// What a member knows after it was told whose the grant is: its own window if it is its own; no writes if it is another's
    /// while its server is still primary; nothing to watch otherwise.
    pub fn told(me: MemberId, brief: &Brief, is_primary: bool, now: Timestamp) -> Option<Self> {
        let own = Confirmations::new(brief.roster.len(), brief.isolation_ms, now);
        if brief.holder == Some(me) {
            Some(own)
        } else {
            is_primary.then_some(Confirmations { deposed: Some(brief.grant), ..own })
        }
    }

    /// The terms of the same grant have changed. That confirms nothing and takes nothing back; a window that was not running begins at
    /// `now`.
    pub fn retold(&mut self, brief: &Brief, now: Timestamp) {
        let new = Confirmations::new(brief.roster.len(), brief.isolation_ms, now);
        if !self.has_window() {
            self.granted_at = self.granted_at.max(now);
        }
        (self.window_ms, self.needed) = (new.window_ms, new.needed);
    }

    /// The operator confirmed a request sent at `sent`.
    pub fn by_operator(&mut self, sent: Timestamp) {
        self.granted_at = self.granted_at.max(sent);
    }

    /// A peer answered a request sent at `sent`.
    pub fn by_peer(&mut self, peer: MemberId, sent: Timestamp, answer: Answer) {
        match answer {
            Answer::Confirmed => {
                let last = self.by_peer.entry(peer).or_insert(sent);
                *last = (*last).max(sent);
            }
            Answer::Refused => {}
            Answer::Deposed { grant } => self.deposed = self.deposed.max(Some(grant)),
        }
    }

    /// Since when the grant is confirmed: the latest time such that the operator, or enough peers, confirmed a request that
    /// was sent then or later.
    pub fn confirmed_at(&self) -> Timestamp {
        let mut sent: Vec<Timestamp> = self.by_peer.values().copied().collect();
        sent.sort_unstable_by(|a, b| b.cmp(a));
        let by_majority = self.needed.checked_sub(1).and_then(|n| sent.get(n)).copied();
        by_majority.map_or(self.granted_at, |at| at.max(self.granted_at))
    }

    /// Until when writes may be accepted, `None` for as long as nobody says otherwise.
    pub fn until(&self) -> Option<Timestamp> {
        (self.window_ms > 0).then(|| self.confirmed_at().plus_millis(self.window_ms))
    }

    /// True while writes may be accepted.
    pub fn may_write(&self, now: Timestamp) -> bool {
        self.deposed.is_none() && self.until().is_none_or(|until| now < until)
    }

    /// The higher grant that someone knows of, if someone does.
    pub fn deposed(&self) -> Option<Seq> {
        self.deposed
    }

    /// Whether confirmations matter at all.
    pub fn has_window(&self) -> bool {
        self.window_ms > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp(0).plus_millis(ms)
    }

    fn peer(ordinal: u16) -> MemberId {
        MemberId::new(0, ordinal)
    }

    #[test]
    fn one_of_two_peers_is_a_majority_of_three() {
        let mut known = Confirmations::new(3, 2_000, at(0));
        assert!(known.may_write(at(1_999)) && !known.may_write(at(2_000)));
        known.by_peer(peer(1), at(1_500), Answer::Confirmed);
        assert!(known.may_write(at(3_499)) && !known.may_write(at(3_500)));
    }

    #[test]
    fn two_of_four_peers_are_needed_and_the_older_counts() {
        let mut known = Confirmations::new(5, 2_000, at(0));
        known.by_peer(peer(1), at(5_000), Answer::Confirmed);
        assert_eq!(known.confirmed_at(), at(0));
        known.by_peer(peer(2), at(4_000), Answer::Confirmed);
        assert_eq!(known.confirmed_at(), at(4_000));
    }

    #[test]
    fn a_late_or_repeated_answer_does_not_make_a_confirmation_younger() {
        let mut known = Confirmations::new(3, 2_000, at(0));
        known.by_peer(peer(1), at(1_000), Answer::Confirmed);
        known.by_peer(peer(1), at(500), Answer::Confirmed);
        known.by_peer(peer(1), at(1_000), Answer::Confirmed);
        assert_eq!(known.until(), Some(at(3_000)));
        assert!(!known.may_write(at(3_000)));
    }

    #[test]
    fn who_is_deposed_writes_no_more_whoever_confirms() {
        let mut known = Confirmations::new(3, 2_000, at(0));
        known.by_peer(peer(1), at(100), Answer::Deposed { grant: Seq(9) });
        known.by_peer(peer(2), at(100), Answer::Confirmed);
        known.by_operator(at(100));
        assert!(!known.may_write(at(101)));
    }

    #[test]
    fn a_primary_that_is_told_of_another_holder_writes_no_more() {
        let brief = |holder| Brief { grant: Seq(9), holder: Some(holder), roster: vec![], isolation_ms: 0 };
        let told = |holder, is_primary| Confirmations::told(peer(0), &brief(holder), is_primary, at(0));
        assert!(told(peer(1), true).is_some_and(|c| !c.may_write(at(1))));
        assert!(told(peer(0), true).is_some_and(|c| c.may_write(at(1))));
        assert_eq!(told(peer(1), false), None);
    }

    #[test]
    fn who_is_told_again_of_the_same_grant_is_neither_confirmed_nor_absolved() {
        let brief = |isolation_ms| Brief {
            grant: Seq(9),
            holder: Some(peer(0)),
            roster: vec![peer(0), peer(1), peer(2)],
            isolation_ms,
        };
        let mut known = Confirmations::new(3, 2_000, at(0));
        known.retold(&brief(3_000), at(1_500));
        assert_eq!(known.until(), Some(at(3_000)));
        known.by_peer(peer(1), at(100), Answer::Deposed { grant: Seq(9) });
        known.retold(&brief(2_000), at(1_600));
        assert!(!known.may_write(at(1_601)));
        let mut known = Confirmations::new(3, 0, at(0));
        known.retold(&brief(2_000), at(5_000));
        assert_eq!(known.until(), Some(at(7_000)));
    }

    #[test]
    fn two_members_have_no_window() {
        let known = Confirmations::new(2, 2_000, at(0));
        assert!(known.may_write(at(1_000_000)) && known.until().is_none());
    }
}

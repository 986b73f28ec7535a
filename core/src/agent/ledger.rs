//! What an agent remembers on its data volume, and by that refuses. Every change is on disk before it is acted on or
//! answered: a restarted agent never obeys someone it has refused before.

use super::gate::History;
use crate::ids::{MemberId, Seq, WriterEpoch};
use serde::{Deserialize, Serialize};

/// How much longer than a holder's window its confirmation keeps a member from promising another its support: at the window's end
/// the holder's agent begins to stop the writes, and kills a server that does not obey in 200 ms. Milliseconds.
pub const PROMISE_MARGIN_MS: i64 = 500;

/// How far above what the operator has said a member's own word may be. A member that was promoted while others did not hear the operator asks
/// them by its new number, and nobody records a million decisions meanwhile; without a bound one member could use all numbers up.
pub const GRANT_AHEAD_MAX: u64 = 1_000_000;

/// Who holds a shard's grant, and under which terms. Given by the operator; peers pass it on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Brief {
    /// Number of the grant: the sequence of the deciding record.
    pub grant: Seq,
    /// The member that holds it.
    pub holder: Option<MemberId>,
    /// The shard's recorded members, in order.
    pub roster: Vec<MemberId>,
    /// How long the holder may accept writes without being confirmed, in milliseconds; 0: for ever.
    pub isolation_ms: i64,
}

/// An agent's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Highest writer epoch that has spoken to it.
    #[serde(default)]
    pub epoch: WriterEpoch,
    /// The highest grant it knows, and its terms.
    #[serde(default)]
    pub brief: Brief,
    /// The highest grant that the operator has spoken of; 0 if it was not remembered.
    #[serde(default, skip_serializing_if = "is_none")]
    pub told: Seq,
    /// How often it has consented to a holder's return. A promotion decided before the last consent is refused.
    #[serde(default)]
    pub consents: u64,
    /// History and offset of its data as its server left it, if that ended in order. `None` while a server runs.
    #[serde(default)]
    pub left: Option<History>,
    /// Its server was started without data and has not got any since: whatever files are there are of that start.
    #[serde(default)]
    pub blank: bool,
}

fn is_none(told: &Seq) -> bool {
    *told == Seq(0)
}

/// Why an agent does not do as it is told. Display names both numbers: it goes into the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A later writer has spoken to this agent.
    #[error("epoch {given} is deposed: the agent already knows epoch {known}")]
    Deposed {
        /// Epoch of the caller.
        given: WriterEpoch,
        /// Epoch in the ledger.
        known: WriterEpoch,
    },
    /// A higher grant is known.
    #[error("grant {given} is old: the agent already knows grant {known}")]
    OldGrant {
        /// Grant of the caller.
        given: Seq,
        /// Grant in the ledger.
        known: Seq,
    },
    /// Nobody has told this agent of any grant.
    #[error("this agent knows of no grant yet")]
    Untold,
    /// A member's own word is too far above what the operator has said.
    #[error("grant {given} is nobody's: the operator has spoken of none above {known}")]
    FarAhead {
        /// Grant of the caller.
        given: Seq,
        /// The highest of the operator's.
        known: Seq,
    },
    /// The same number is known as another member's.
    #[error("grant {grant} is {holder}'s")]
    OtherHolder {
        /// The number.
        grant: Seq,
        /// Whose it is in the ledger.
        holder: MemberId,
    },
    /// Since the caller looked, the agent has consented to a holder's return.
    #[error("decided before the agent's consent number {known} to a holder's return ({given} was known)")]
    Consented {
        /// Consents the caller knew of.
        given: u64,
        /// Consents in the ledger.
        known: u64,
    },
    /// The present holder was confirmed too lately to be given up.
    #[error("the holder was confirmed {ago_ms} ms ago, its window is {window_ms} ms")]
    Confirmed {
        /// Milliseconds since the last confirmation.
        ago_ms: i64,
        /// Milliseconds that must have passed.
        window_ms: i64,
    },
}

impl Ledger {
    /// A writer of `epoch` speaks: it is remembered, or refused if a later one has spoken before.
    ///
    /// # Errors
    /// [`Refusal::Deposed`].
    pub fn obey(&mut self, epoch: WriterEpoch) -> Result<(), Refusal> {
        if epoch < self.epoch {
            return Err(Refusal::Deposed { given: epoch, known: self.epoch });
        }
        self.epoch = epoch;
        Ok(())
    }

    /// Takes over a grant and its terms, if it is not older than what is known. The terms of the same grant may change.
    ///
    /// # Errors
    /// [`Refusal::OldGrant`], [`Refusal::OtherHolder`].
    pub fn learn(&mut self, brief: &Brief) -> Result<(), Refusal> {
        self.take(brief)?;
        self.told = self.told.max(brief.grant);
        Ok(())
    }

    fn take(&mut self, brief: &Brief) -> Result<(), Refusal> {
        let known = &self.brief;
        if brief.grant < known.grant {
            return Err(Refusal::OldGrant { given: brief.grant, known: known.grant });
        }
        match known.holder {
            Some(holder) if brief.grant == known.grant && brief.holder != Some(holder) => {
                return Err(Refusal::OtherHolder { grant: known.grant, holder });
            }
            Some(_) | None => {}
        }
        self.brief = brief.clone();
        Ok(())
    }

    /// Promises not to support lower grants than this one any more, unless the present holder may still be writing because
    /// this agent confirmed it: `confirmed_ago_ms` is how long ago that was, or, if it was not since the agent runs, for
    /// how long it has been running, because its predecessor may have.
    ///
    /// # Errors
    /// [`Refusal::Confirmed`], and those of [`Ledger::learn`].
    pub fn promise(&mut self, brief: &Brief, confirmed_ago_ms: i64) -> Result<(), Refusal> {
        let (ago_ms, window_ms) = (confirmed_ago_ms, brief.isolation_ms + PROMISE_MARGIN_MS);
        if ago_ms < window_ms && brief.grant > self.brief.grant {
            return Err(Refusal::Confirmed { ago_ms, window_ms });
        }
        self.learn(brief)
    }

    /// Takes a grant for this member itself. `consents` is what the decision was made from.
    ///
    /// # Errors
    /// [`Refusal::Consented`], and those of [`Ledger::learn`].
    pub fn accept(&mut self, brief: &Brief, consents: u64) -> Result<(), Refusal> {
        if consents != self.consents {
            return Err(Refusal::Consented { given: consents, known: self.consents });
        }
        self.learn(brief)
    }

    /// A restarted holder asks whether it may go on under its grant. From the answer on, no promotion that was decided
    /// before it is accepted here.
    ///
    /// # Errors
    /// Those of [`Ledger::support`].
    pub fn consent(&mut self, holder: MemberId, grant: Seq) -> Result<(), Refusal> {
        self.support(holder, grant)?;
        self.consents = self.consents.saturating_add(1);
        Ok(())
    }

    /// Answers a holder that asks to be confirmed: it is, if nobody has a higher grant here. An agent that nobody has told
    /// anything (its volume is new) supports nobody: it may have promised something and forgotten it.
    ///
    /// # Errors
    /// [`Refusal::Untold`], [`Refusal::FarAhead`], [`Refusal::OldGrant`], [`Refusal::OtherHolder`].
    pub fn support(&mut self, holder: MemberId, grant: Seq) -> Result<(), Refusal> {
        if self.brief.holder.is_none() {
            return Err(Refusal::Untold);
        }
        let known = if self.told == Seq(0) { self.brief.grant } else { self.told };
        if grant.0 > known.0.saturating_add(GRANT_AHEAD_MAX) {
            return Err(Refusal::FarAhead { given: grant, known });
        }
        let Brief { roster, isolation_ms, .. } = self.brief.clone();
        self.take(&Brief { grant, holder: Some(holder), roster, isolation_ms })
    }

    /// Other members of the shard that must be asked.
    pub fn peers(&self, me: MemberId) -> impl Iterator<Item = MemberId> + use<'_> {
        self.brief.roster.iter().copied().filter(move |id| *id != me)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: MemberId = MemberId { shard: crate::ids::ShardId(0), ordinal: 0 };
    const B: MemberId = MemberId { shard: crate::ids::ShardId(0), ordinal: 1 };

    fn brief(grant: u64, holder: MemberId) -> Brief {
        Brief { grant: Seq(grant), holder: Some(holder), roster: vec![A, B], isolation_ms: 2_000 }
    }

    #[test]
    fn a_deposed_writer_is_refused_and_the_same_one_is_not() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.obey(WriterEpoch(4)), Ok(()));
        assert_eq!(ledger.obey(WriterEpoch(4)), Ok(()));
        assert!(ledger.obey(WriterEpoch(3)).is_err());
        assert_eq!(ledger.epoch, WriterEpoch(4));
    }

    #[test]
    fn a_lower_grant_is_refused_and_changes_nothing() {
        let mut ledger = Ledger::default();
        ledger.learn(&brief(7, B)).unwrap();
        assert_eq!(ledger.learn(&brief(5, A)), Err(Refusal::OldGrant { given: Seq(5), known: Seq(7) }));
        assert_eq!(ledger.learn(&brief(7, A)), Err(Refusal::OtherHolder { grant: Seq(7), holder: B }));
        assert_eq!(ledger.brief, brief(7, B));
    }

    #[test]
    fn a_promotion_decided_before_a_consent_is_refused() {
        let mut ledger = Ledger::default();
        ledger.learn(&brief(5, A)).unwrap();
        ledger.consent(A, Seq(5)).unwrap();
        assert_eq!(ledger.accept(&brief(9, B), 0), Err(Refusal::Consented { given: 0, known: 1 }));
        assert_eq!(ledger.accept(&brief(9, B), 1), Ok(()));
        assert!(ledger.consent(A, Seq(5)).is_err(), "whoever took a higher grant consents no more");
    }

    #[test]
    fn an_agent_without_memory_supports_nobody() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.support(A, Seq(5)), Err(Refusal::Untold));
        assert_eq!(ledger.consent(A, Seq(5)), Err(Refusal::Untold));
        ledger.learn(&brief(5, A)).unwrap();
        assert_eq!(ledger.support(A, Seq(5)), Ok(()));
    }

    #[test]
    fn a_members_own_word_uses_no_numbers_up() {
        let mut ledger = Ledger::default();
        ledger.learn(&brief(5, A)).unwrap();
        let most = Seq(5 + GRANT_AHEAD_MAX);
        let far = Refusal::FarAhead { given: most.next(), known: Seq(5) };
        assert_eq!(
            (ledger.support(B, most.next()), ledger.consent(B, Seq(u64::MAX)).is_err()),
            (Err(far), true)
        );
        assert_eq!(ledger.support(B, most), Ok(()));
        assert!(ledger.support(B, most.next()).is_err(), "nor step by step");
        // The operator hears of it, and goes on above it.
        assert_eq!(ledger.learn(&brief(most.0 + 1, A)), Ok(()));
        assert_eq!(ledger.support(A, most.next()), Ok(()));
    }

    #[test]
    fn a_promise_waits_until_the_holder_cannot_be_writing_any_more() {
        let mut ledger = Ledger::default();
        ledger.learn(&brief(5, A)).unwrap();
        assert!(ledger.promise(&brief(9, B), 2_000 + PROMISE_MARGIN_MS - 1).is_err());
        assert_eq!(ledger.promise(&brief(9, B), 2_000 + PROMISE_MARGIN_MS), Ok(()));
        assert!(ledger.support(A, Seq(5)).is_err());
        // Repeated, whatever was confirmed since.
        assert_eq!(ledger.promise(&brief(9, B), 0), Ok(()));
    }
}

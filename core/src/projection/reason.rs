//! Every reason that a condition can have. Most are the codes of `decision.rs`; those that no step decides, waits or is blocked for
//! are here, and their doc comments are the text of `explain CODE`, too.

use crate::decision::{BlockReason, Reason, WaitReason, reasons};
use serde::{Deserialize, Serialize};

reasons! {
    /// Why a condition is as it is, if no step is the cause: operations under way, the journal, its archive, and what keeps the
    /// operator from working for a cluster.
    StatusReason {
        /// It is as the spec wants it: every member serves and is routed, nothing is under way and nothing is blocked.
        AsWanted,
        /// No member of the shard is seen to be primary and routed, and no step says why. The next looks say more.
        PrimaryUnknown,
        /// An annotation of the resource cannot be used, and counts as not there. Everything else of the
        /// resource is in force, and done. The message names the annotation, what it says and what is
        /// allowed.
        AnnotationRefused,
        /// The servers are of another version than spec.version says, by which the operator chooses directives and ways to hand slots
        /// over. Correct it, or leave it out where the image's tag says the version. Everything else goes on.
        VersionDiffers,
        /// An unplanned promotion is under way.
        Failover,
        /// Members are being restarted, one after the other.
        Rollout,
        /// Slots are being handed from shard to shard, so that each has its share, or a shard that shall go has none.
        Reshard,
        /// Every record of the journal is chained to the one before.
        Intact,
        /// The journal is not the one that was written: records are gone or changed, or its store cannot be believed. Nothing is done
        /// for this cluster, no failover either; Valkey goes on. Read the message first: it names the object and the record, and if
        /// they can be put back as they were, it heals within a minute. Else have it written anew from the mirror, if there is one
        /// (journal tiered), by the annotation valkeeper.io/repair-journal, or go on without what is gone by
        /// valkeeper.io/accept-journal-loss; the value of each is the first 12 digits of .status.journal.hash, or all of them.
        JournalBroken,
        /// A newer version of the operator wrote to the journal what this one cannot read. Nothing is damaged, and nothing is done
        /// for this cluster. Run that version again, or a later one.
        JournalNewer,
        /// The journal has reached its limit, because its archive does not take what is to go. Nothing is done for this cluster until
        /// it does, or is switched off: JournalArchived says what to correct. It then goes on by itself.
        JournalFull,
        /// The journal's store, the API server or a disk, does not answer. Nothing was written and nothing is done for this cluster
        /// meanwhile; it is tried again, and goes on by itself when the store answers.
        JournalUnavailable,
        /// The journal did not take what the operator gave it, for a reason that should not occur; the message says which. Nothing
        /// was written, and the cluster is begun with anew at least once a minute. If it stays, report it with the message.
        JournalRefused,
        /// It is not known whether the last records were written. Nothing is done for this cluster until the store says so: it is
        /// asked every few seconds, and goes on by itself.
        AppendUnresolved,
        /// Another operator has claimed the cluster later than this one, which does nothing for it meanwhile and tries again within a
        /// minute. Usual while one takes over from another; if it stays, two of them run: stop one.
        Fenced,
        /// The API server refused what the operator asked of it: a permission, an admission rule, a quota, or an object of that name
        /// that is not the operator's, as the message says. Nothing is done for this cluster until someone corrects that; it is tried
        /// again at least once a minute.
        ApiRefused,
        /// The API server does not answer, or not with what was asked for. It is tried again at least once a minute, and goes on by
        /// itself; Valkey goes on meanwhile.
        ApiUnavailable,
        /// The operator has not opened its certificate authority yet, and without an identity no agent listens to it. It is tried
        /// again and goes on by itself; if it stays, the operator's log says what keeps the authority closed.
        NoIdentity,
        /// The operator does not hold its Lease any more and does nothing; whoever holds it speaks for the cluster. It goes on when
        /// it leads again.
        NotLeader,
        /// The certificate of every member that answers is renewed in time.
        CertificatesRenewed,
        /// A member's certificate has not been renewed in time: three quarters of its life are over, and half would have been due. Once it has ended,
        /// nobody listens to that member's agent, and nobody confirms it as primary. The message names the member and the time. The
        /// operator's log says why: the authority in its own namespace cannot be read, the Secret `<name>-identity-<shard>` cannot be
        /// written, or kubelet does not bring it into the pod.
        CertificateEnds,
        /// The archive has what left the journal.
        Archived,
        /// The archive does not take what is to leave the journal. Nothing is lost and the operator works on; the journal keeps all,
        /// until it is full. Correct what the message names: the address, the credentials, or what is there. It is tried again by
        /// itself.
        ArchiveRefused,
    }
}

/// The reason of a condition: whichever it is, `explain` knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConditionReason {
    /// That of a decision.
    Decision(Reason),
    /// A step waits.
    Wait(WaitReason),
    /// A step is blocked.
    Block(BlockReason),
    /// No step is the cause.
    Status(StatusReason),
}

impl ConditionReason {
    /// The code, as it appears in the condition.
    pub fn code(self) -> &'static str {
        match self {
            ConditionReason::Decision(reason) => reason.code(),
            ConditionReason::Wait(reason) => reason.code(),
            ConditionReason::Block(reason) => reason.code(),
            ConditionReason::Status(reason) => reason.code(),
        }
    }
}

impl From<StatusReason> for ConditionReason {
    fn from(reason: StatusReason) -> Self {
        ConditionReason::Status(reason)
    }
}

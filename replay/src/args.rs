//! The command line.

use clap::{Args, Parser, Subcommand};
use regex_lite::Regex;
use std::path::PathBuf;
use valkeeper_core::ids::Seq;
use valkeeper_replay::{
    blame::Slot,
    log::{Filter, Order},
    moment::Moment,
    report::Format,
    rules::Policy,
    why::Subject,
};

/// Reads Valkeeper journals offline: what was seen, what was decided, why, and whether this version would decide the same.
///
/// Exit codes: 0 ok, 1 error, 2 usage, 3 divergence or violation found.
#[derive(Debug, Parser)]
#[command(name = "valkeeper-replay", version, after_help = EXAMPLES)]
pub struct CommandLine {
    /// Sled or archive directory, export file or `kubectl get configmaps -o json`; `-` is standard input
    #[arg(short, long, global = true, value_name = "PATH", default_value = "-")]
    pub journal: PathBuf,
    /// Directory with a copy of the archive: records that left the journal are read from there
    #[arg(long, global = true, value_name = "DIR")]
    pub archive: Option<PathBuf>,
    /// The cluster, if the journal holds several: NAMESPACE/NAME (the newest of that name) or UID
    #[arg(long, global = true, value_name = "NAMESPACE/NAME|UID")]
    pub cluster: Option<String>,
    /// Format of the answer
    #[arg(short, long, global = true, value_enum, default_value_t)]
    pub output: Format,
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

const EXAMPLES: &str = "Examples:
  kubectl get configmaps -n valkeeper -l valkeeper.io/journal -o json | valkeeper-replay log --cluster demo/orders -n 50
  valkeeper-replay -j /var/lib/valkeeper show 1842
  valkeeper-replay -j orders.jsonl log -S 03:12 -U 03:15 -g decided
  valkeeper-replay -j orders.jsonl at 03:12:44 -o json
  valkeeper-replay -j orders.jsonl diverge
  valkeeper-replay -j ledger.jsonl audit reshard
  valkeeper-replay -j ledger.jsonl blame slot 4711
  valkeeper-replay -j orders.jsonl --archive ./archive verify --deep";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// The timeline, one line per record
    Log(LogArgs),
    /// One record in full: evidence, candidates, effects, outcomes
    Show {
        /// Its sequence, as in `[j:1842]`
        #[arg(value_parser = seq)]
        seq: Seq,
    },
    /// Check chain, epochs, anchor and invariants; exit code 3 if something is wrong
    Verify {
        /// File with the place of the last acknowledged record; a sled store's own is found beside it
        #[arg(long, value_name = "FILE")]
        anchor: Option<PathBuf>,
        /// Fold everything again, and compare it with what cuts left behind
        #[arg(long)]
        deep: bool,
    },
    /// What was known at a moment
    At {
        /// Sequence, time (UTC) or -15m before the end
        #[arg(value_name = "SEQ|TIME", allow_hyphen_values = true)]
        moment: Moment,
    },
    /// Decide every recorded turn again with this version; exit code 3 if anything differs
    Diverge {
        /// Decide by a policy that is wrong on purpose
        #[arg(long, value_enum, value_name = "POLICY", hide = true, default_value_t)]
        mutate: Policy,
    },
    /// Audit reports
    #[command(subcommand)]
    Audit(Audit),
    /// Which decisions made something what it is
    Why {
        /// Member (0-1), shard (shard/0) or object (StatefulSet/orders-0)
        #[arg(value_name = "MEMBER|SHARD|OBJECT")]
        subject: Subject,
    },
    /// Who was answerable for something, from when to when, and why
    #[command(subcommand)]
    Blame(Blame),
    /// What a reason code means; all of them without a code
    Explain {
        /// The code, e.g. PrimaryGone
        code: Option<String>,
    },
    /// The stream as JSON Lines that verify anywhere
    Export,
}

/// Audit reports.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Audit {
    /// Every failover: detection, evidence, choice, milliseconds, outage, loss
    Failover,
    /// Every time that slots were evened out: plan, jobs, milliseconds, stalls; exit code 3 if slots were not kept as they must be
    Reshard,
}

/// What can be blamed on somebody.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Blame {
    /// The owners of a slot of a Valkey Cluster
    Slot {
        /// The slot, 0 to 16383, as CLUSTER KEYSLOT says of a key
        slot: Slot,
    },
}

/// Flags of `log`, as journalctl has them.
#[derive(Debug, Args)]
pub struct LogArgs {
    /// At most so many lines, the last ones
    #[arg(short = 'n', long, value_name = "N")]
    lines: Option<usize>,
    /// Newest first
    #[arg(short, long)]
    reverse: bool,
    /// From this moment: sequence, time (UTC) or -15m before the end
    #[arg(short = 'S', long, value_name = "SEQ|TIME", allow_hyphen_values = true)]
    since: Option<Moment>,
    /// Up to this moment, included
    #[arg(short = 'U', long, value_name = "SEQ|TIME", allow_hyphen_values = true)]
    until: Option<Moment>,
    /// Only lines (kind and text) that match; case matters only if the pattern has capitals
    #[arg(short, long, value_name = "PATTERN", value_parser = pattern)]
    grep: Option<Regex>,
}

impl LogArgs {
    /// The filter that the flags ask for.
    pub fn filter(self) -> Filter {
        let LogArgs { lines, reverse, since, until, grep } = self;
        let order = if reverse { Order::NewestFirst } else { Order::OldestFirst };
        Filter { lines_max: lines, since, until, pattern: grep, order }
    }
}

fn pattern(text: &str) -> Result<Regex, regex_lite::Error> {
    let insensitive = if text.chars().any(char::is_uppercase) { "" } else { "(?i)" };
    Regex::new(&format!("{insensitive}{text}"))
}

/// A sequence, also as Kubernetes Events carry it.
fn seq(text: &str) -> Result<Seq, std::num::ParseIntError> {
    text.trim_start_matches("[j:").trim_end_matches(']').parse().map(Seq)
}

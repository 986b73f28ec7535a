//! `verify`: is this what was written? The hash chain, sequence, epochs and times, the anchor if there is one, and the
//! invariants that hold of every journal.

use crate::{
    Error,
    deep::Deep,
    history::Gone,
    report::{Finding, Report},
    rules,
    source::{Origin, Stream},
    table::Table,
};
use serde::{Deserialize, Serialize};
use std::{fmt::Write, path::Path};
use valkeeper_core::ids::{Seq, WriterEpoch};
use valkeeper_journal::{Hash, Problem};

/// The place of the last acknowledged record, kept outside of the store: what tells a truncated journal from a short one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Anchor {
    /// Its sequence.
    pub seq: Seq,
    /// Its epoch.
    pub epoch: WriterEpoch,
    /// Its hash.
    pub hash: Hash,
}

impl Anchor {
    /// Reads an anchor file: the newest of its lines of JSON with `seq`, `epoch` and `hash`. Errors: it cannot be read,
    /// or no line is an anchor.
    pub fn read(path: &Path) -> Result<Anchor, Error> {
        let failed = |source| Error::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(failed)?;
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Anchor>(line.trim()).ok());
        lines.max_by_key(|anchor| anchor.seq).ok_or(Error::NotAnAnchor { path: path.to_owned() })
    }
}

/// What was checked and what was found.
#[derive(Clone, Debug, Serialize)]
pub struct Verified {
    /// The cluster: `namespace/name (uid ...)`.
    pub cluster: String,
    /// Number of records.
    pub records: usize,
    /// What left the store, if the beginning was cut.
    pub trimmed: Option<Gone>,
    /// Number of records from an archive: the first ones.
    pub archived: usize,
    /// What the archive has besides: lineages that the stream left, or other ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub other_lineages: Vec<String>,
    /// First sequence.
    pub first: Option<Seq>,
    /// Last sequence.
    pub last: Option<Seq>,
    /// Hash of the last record: covers everything before.
    pub head_hash: Option<Hash>,
    /// Epochs, each with its first record.
    pub epochs: Vec<(WriterEpoch, Seq)>,
    /// What the end of the stream was compared with: an anchor named by the user, or those beside the store.
    pub anchor: Option<String>,
    /// The stream is not what was written.
    pub problems: Vec<String>,
    /// What was folded again and compared, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deep: Option<Deep>,
    /// It is, but it breaks an invariant.
    pub violations: Vec<(Seq, String)>,
}

/// Checks a stream.
pub fn verify(stream: &Stream, anchor: Option<Anchor>) -> Verified {
    let history = stream.history();
    let Origin { folded, records } = stream.origin();
    let report = valkeeper_journal::verify(folded, records);
    let valkeeper_journal::Report { records, trimmed: _, first, last, epochs, head, problems } = report;
    let mut problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
    problems.extend(beginning(stream));
    problems.extend(stream.troubles.clone());
    problems.extend(anchor.and_then(|anchor| behind(stream, anchor)));
    Verified {
        cluster: stream.title(),
        records,
        trimmed: stream.gone(),
        archived: stream.archived.len(),
        other_lineages: stream.other_lineages.clone(),
        first,
        last,
        head_hash: head.map(|h| h.hash),
        epochs,
        anchor: anchor.map(|a| format!("record {}", a.seq)).or_else(|| stream.anchored.clone()),
        problems,
        deep: None,
        violations: rules::violations(&history),
    }
}

/// What the store begins with must be named by a record of the store, also where an archive has what was before.
fn beginning(stream: &Stream) -> Vec<String> {
    if stream.archived.is_empty() {
        return Vec::new();
    }
    let report = valkeeper_journal::verify(stream.folded.as_ref(), &stream.stored);
    let unnamed = report.problems.into_iter().filter(|p| matches!(p, Problem::Unnamed { .. }));
    unnamed.map(|problem| problem.to_string()).collect()
}

fn behind(stream: &Stream, anchor: Anchor) -> Option<String> {
    let Anchor { seq, epoch, hash } = anchor;
    let Origin { folded, records } = stream.origin();
    let last = records.last().map(|s| s.record.seq).unwrap_or_default();
    match records.iter().find(|s| s.record.seq == seq) {
        Some(stored) if stored.hash == hash && stored.record.epoch == epoch => None,
        Some(_) => {
            Some(format!("record {seq} is not the one that was acknowledged: the anchor names {hash}"))
        }
        None if last < seq => {
            Some(format!("the stream ends at {last}, but record {seq} was acknowledged: its end is missing"))
        }
        // Acknowledged long ago, and cut since: the chain of what came after is all that can be asked for.
        None if folded.is_some_and(|folded| seq <= folded.head().seq) => None,
        None => Some(format!("record {seq}, which the anchor names, is not in the stream")),
    }
}

impl Report for Verified {
    fn text(&self) -> String {
        let Verified {
            cluster,
            records,
            trimmed,
            archived,
            other_lineages,
            first,
            last,
            head_hash,
            epochs,
            anchor,
            problems,
            deep,
            violations,
        } = self;
        let mut text = format!("{cluster}\n");
        let seq = |s: &Option<Seq>| s.map_or_else(|| "-".to_owned(), |s| s.to_string());
        let _ = writeln!(text, "records     {records} ({} to {})", seq(first), seq(last));
        if let Some(gone) = trimmed {
            let _ = writeln!(text, "trimmed     {gone}");
        }
        if *archived > 0 {
            let _ = writeln!(text, "archived    {archived} records come from the archive");
        }
        for other in other_lineages {
            let _ = writeln!(text, "besides     {other}");
        }
        if let Some(hash) = head_hash {
            let _ = writeln!(text, "head        {hash}");
        }
        let each: Vec<String> = epochs.iter().map(|(epoch, from)| format!("{epoch} from {from}")).collect();
        let _ = writeln!(text, "epochs      {}", each.join(", "));
        let compared = anchor.as_deref().unwrap_or("none: a missing end would not show");
        let _ = writeln!(text, "anchor      {compared}");
        let _ = writeln!(text, "chain       {}", if problems.is_empty() { "intact" } else { "BROKEN" });
        for problem in problems {
            let _ = writeln!(text, "  {problem}");
        }
        let _ = writeln!(text, "invariants  {}", if violations.is_empty() { "hold" } else { "VIOLATED" });
        for (seq, violation) in violations {
            let _ = writeln!(text, "  record {seq}: {violation}");
        }
        text.push_str(&deep.as_ref().map(Deep::text).unwrap_or_default());
        text
    }

    fn csv(&self) -> Option<String> {
        let mut table = Table::new(["seq", "what", "text"]);
        for problem in &self.problems {
            table.push([String::new(), "problem".to_owned(), problem.clone()]);
        }
        for (seq, violation) in &self.violations {
            table.push([seq.to_string(), "violation".to_owned(), violation.clone()]);
        }
        Some(table.csv())
    }

    fn finding(&self) -> Finding {
        let deep = self.deep.as_ref().map_or(Finding::Clean, Deep::finding);
        if self.problems.is_empty() && self.violations.is_empty() { deep } else { Finding::Found }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        source,
        story::{self, sealed},
    };
    use std::path::Path;

    fn stream_of(text: &str) -> Stream {
        source::parse(Path::new("-"), text).unwrap().remove(0)
    }

    fn lines() -> Vec<String> {
        let text = crate::export::export(None, &sealed(&story::failover()));
        text.lines().map(|line| format!("{line}\n")).collect()
    }

    fn problems(lines: &[String]) -> Vec<String> {
        verify(&stream_of(&lines.concat()), None).problems
    }

    #[test]
    fn what_was_written_is_intact() {
        let verified = verify(&stream_of(&lines().concat()), None);
        assert_eq!(verified.finding(), Finding::Clean, "{}", verified.text());
        assert!(verified.text().contains("records     22 (1 to 22)\n"));
        assert!(verified.text().contains("demo/orders (uid 5f0c1d2e-uid)\n"));
    }

    #[test]
    fn an_edited_line_is_found() {
        let mut edited = lines();
        edited[11] = edited[11].replace("0-0", "0-2");
        assert!(problems(&edited)[0].starts_with("record 12 was changed"), "{:?}", problems(&edited));
    }

    #[test]
    fn a_dropped_and_a_swapped_line_are_found() {
        let mut dropped = lines();
        dropped.remove(11);
        assert!(problems(&dropped)[0].contains("record 13 follows record 11"), "{:?}", problems(&dropped));
        let mut swapped = lines();
        swapped.swap(14, 15);
        assert!(!problems(&swapped).is_empty());
    }

    #[test]
    fn a_truncated_end_is_found_by_the_anchor_only() {
        let all = stream_of(&lines().concat());
        let last = all.stored[21].head();
        let anchor = Anchor { seq: last.seq, epoch: last.epoch, hash: last.hash };
        assert_eq!(verify(&all, Some(anchor)).finding(), Finding::Clean);
        let short = stream_of(&lines()[..20].concat());
        assert_eq!(verify(&short, None).finding(), Finding::Clean);
        let found = verify(&short, Some(anchor));
        assert_eq!(
            found.problems,
            ["the stream ends at 20, but record 22 was acknowledged: its end is missing"]
        );
        let other = Anchor { hash: Hash::ZERO, ..anchor };
        assert_eq!(verify(&all, Some(other)).finding(), Finding::Found);
    }

    #[test]
    fn a_line_that_cannot_be_read_is_a_problem_and_what_is_before_it_is_kept() {
        let mut torn = lines();
        torn[20] = "{\"seq\":21,\n".to_owned();
        let stream = stream_of(&torn.concat());
        assert_eq!(stream.stored.len(), 20);
        assert!(verify(&stream, None).problems[0].contains("line 21"), "{:?}", stream.troubles);
    }

    #[test]
    fn a_broken_invariant_is_found_in_an_intact_chain() {
        let mut records = story::failover();
        records[11].event = story::server(0, "run-0", valkeeper_core::observation::ServerRole::Primary, 'a');
        let verified = verify(&stream_of(&crate::export::export(None, &sealed(&records))), None);
        assert_eq!((verified.problems.len(), verified.finding()), (0, Finding::Found));
        assert!(verified.text().contains("  record 13: promotes 0-1 while 0-0 is seen to be primary\n"));
    }
}

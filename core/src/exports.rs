//! `CLUSTER GETSLOTMIGRATIONS` to types: what a node is handing over (atomic slot migration, Valkey 9.0). The answer comes from a server
//! that may be anything, and it only adds to what is known: a job that does not parse is left out, and nothing here is an error.

use crate::{
    observation::{Export, ExportState, ImportFailed},
    words,
};

/// Most jobs of one node that are kept. One is begun at a time; more than one is someone else's doing, more than this are nobody's.
const EXPORTS_MAX: usize = 16;

/// Most characters of Valkey's own words that are kept: enough for every message it has, and a bound on what goes into the journal.
const WORDS_CHARS_MAX: usize = 160;

/// Names and values of one job.
pub type Fields = Vec<(String, String)>;

/// What of the jobs is recorded, newest first as Valkey tells them: whatever goes out and is not at its end, and the last that was to go
/// out if it came to nothing. In an order that says nothing, so that the same jobs are the same facts.
pub fn exports(jobs: &[Fields]) -> Vec<Export> {
    let outgoing = jobs.iter().filter(|job| value(job, "operation") == Some("EXPORT"));
    let kept = outgoing.enumerate().filter_map(|(age, job)| {
        let state = match (value(job, "state")?, age) {
            ("success", _) => return None,
            (end @ ("failed" | "cancelled"), 0) => ExportState::Failed(said(job, end)),
            ("failed" | "cancelled", _) => return None,
            (_, _) => ExportState::Running,
        };
        let (slots, to) =
            (value(job, "slot_ranges")?.parse().ok()?, value(job, "target_node")?.parse().ok()?);
        Some(Export { slots, to, state })
    });
    let mut exports: Vec<Export> = kept.take(EXPORTS_MAX).collect();
    let failure = |export: &Export| match &export.state {
        ExportState::Running => None,
        ExportState::Failed(words) => Some(words.clone()),
    };
    exports.sort_by_cached_key(|export| (failure(export), export.slots.clone(), export.to.clone()));
    exports
}

/// The last job that was to come in, if it came to nothing and its node says why.
pub fn import_failed(jobs: &[Fields]) -> Option<ImportFailed> {
    let last = jobs.iter().find(|job| value(job, "operation") == Some("IMPORT"))?;
    let from = value(last, "source_node")?.parse().ok()?;
    let words = said(last, "");
    (value(last, "state")? == "failed" && !words.is_empty()).then_some(ImportFailed { from, words })
}

/// Why it came to nothing; one that was cancelled needs no words.
fn said(job: &Fields, end: &str) -> String {
    let said = value(job, "message").unwrap_or_default();
    let kept = words::of_others(said, WORDS_CHARS_MAX);
    if kept.is_empty() { end.to_owned() } else { kept }
}

fn value<'a>(job: &'a Fields, name: &str) -> Option<&'a str> {
    job.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slots::SlotSet;
    use proptest::prelude::*;

    const A: &str = "a20fb87e91ed4771ac3bd6d803b9bd5b210f935f";
    const B: &str = "30b2e7d252ee2eac6e7baae14b2fa9a56842247e";
    const NOAUTH: &str = "Received error during handshake to target: -NOAUTH Authentication required.";

    /// As 9.1.2 answers.
    fn job(operation: &str, slots: &str, to: &str, state: &str, message: &str) -> Fields {
        let fields = [
            ("name", "e74564998a93bb69b3cfd24eae40bc441f92cfd4"),
            ("operation", operation),
            ("slot_ranges", slots),
            ("target_node", to),
            ("source_node", "5f31f5c0c57506b1ba9d41e58ad8582fffe249a3"),
            ("create_time", "1795319969"),
            ("last_update_time", "1795319969"),
            ("last_ack_time", "1795319969"),
            ("state", state),
            ("message", message),
            ("cow_size", "0"),
            ("remaining_repl_size", "0"),
        ];
        fields.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
    }

    fn told(jobs: &[Fields]) -> Vec<String> {
        let of = |export: &Export| match &export.state {
            ExportState::Running => format!("{} to {}", export.slots, &export.to.to_string()[..2]),
            ExportState::Failed(words) => format!("{} failed: {words}", export.slots),
        };
        exports(jobs).iter().map(of).collect()
    }

    #[test]
    fn what_goes_out_is_kept_until_it_is_at_its_end() {
        let running = job("EXPORT", "0-10 20-30 77-77", A, "waiting-to-snapshot", "");
        assert_eq!(told(std::slice::from_ref(&running)), ["0-10 20-30 77 to a2"]);
        let failing_over = job("EXPORT", "100-110", B, "failover-granted", "");
        let both = [running.clone(), failing_over.clone()];
        assert_eq!(told(&both), ["0-10 20-30 77 to a2", "100-110 to 30"]);
        assert_eq!(exports(&both), exports(&[failing_over, running]), "the same jobs in another order");
        assert_eq!(told(&[job("EXPORT", "0-10", A, "success", "")]), [""; 0]);
        assert_eq!(told(&[job("IMPORT", "0-10", A, "snapshotting", "")]), [""; 0]);
    }

    #[test]
    fn a_failure_is_kept_while_no_later_job_has_been_begun() {
        let failed = job("EXPORT", "100-110", A, "failed", NOAUTH);
        let cancelled = job("EXPORT", "200-200", A, "cancelled", "");
        assert_eq!(told(&[failed.clone(), cancelled.clone()]), [format!("100-110 failed: {NOAUTH}")]);
        assert_eq!(told(&[cancelled.clone(), failed.clone()]), ["200 failed: cancelled"]);
        let came = job("IMPORT", "1-2", B, "success", "");
        assert_eq!(told(&[came, cancelled]), ["200 failed: cancelled"], "what comes in says nothing of it");
        let (later, done) =
            (job("EXPORT", "100-110", A, "connecting", ""), job("EXPORT", "1", A, "success", ""));
        assert_eq!(told(&[later, failed.clone()]), ["100-110 to a2"]);
        assert_eq!(told(&[done, failed]), [""; 0]);
    }

    #[test]
    fn what_did_not_come_in_says_so_in_its_own_words_until_the_next_job_does() {
        let failed = job("IMPORT", "0-10", A, "failed", "OOM");
        let words = |jobs: &[Fields]| import_failed(jobs).map(|failed| failed.words);
        let out = job("EXPORT", "200", B, "failed", NOAUTH);
        assert_eq!(words(&[out.clone(), failed.clone()]).as_deref(), Some("OOM"));
        assert_eq!(import_failed(std::slice::from_ref(&failed)).unwrap().from.to_string()[..3], *"5f3");
        assert_eq!(words(&[job("IMPORT", "0-10", A, "success", ""), failed]), None);
        assert_eq!(words(&[out, job("IMPORT", "0-10", A, "failed", "")]), None, "it does not say why");
    }

    #[test]
    fn a_job_that_cannot_be_understood_is_left_out_and_hides_no_other() {
        let running = || job("EXPORT", "5", A, "snapshotting", "");
        for strange in [
            Fields::new(),
            job("EXPORT", "5-4", A, "snapshotting", ""),
            job("EXPORT", "99999", A, "snapshotting", ""),
            job("EXPORT", "7", "nobody", "snapshotting", ""),
            running()[..3].to_vec(),
        ] {
            assert_eq!(told(&[strange, running()]), ["5 to a2"]);
        }
    }

    #[test]
    fn what_a_stranger_can_have_recorded_is_bounded() {
        let many: Vec<Fields> =
            (0..500).map(|slot: u16| job("EXPORT", &slot.to_string(), A, "x", "")).collect();
        assert_eq!(exports(&many).len(), EXPORTS_MAX);
        let long = job("EXPORT", "5", A, "failed", &format!("\n{}", "x".repeat(5_000)));
        assert_eq!(told(&[long]), [format!("5 failed: {}", "x".repeat(WORDS_CHARS_MAX))]);
    }

    proptest! {
        #[test]
        fn any_answer_gives_facts_that_say_no_more_than_it_does(
            jobs in prop::collection::vec(prop::collection::vec(("[a-z_]{1,11}", ".{0,20}"), 0..6), 0..6),
            slots in prop::collection::btree_set(0..crate::slots::SLOTS, 0..50), at in 0_usize..6,
        ) {
            let slots: SlotSet = slots.into_iter().collect();
            let mut jobs = jobs;
            jobs.insert(at.min(jobs.len()), job("EXPORT", &slots.to_string(), A, "snapshotting", ""));
            let told = exports(&jobs);
            prop_assert!(told.iter().any(|e| e.slots == slots && e.state == ExportState::Running));
            prop_assert!(told.len() <= jobs.len());
        }
    }
}

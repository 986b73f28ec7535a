//! `explain CODE`: what a reason code means. The text is the code's doc comment, the one source of its wording.

use crate::{
    Error,
    report::{Finding, Report},
    table::Table,
};
use serde::Serialize;
use std::fmt::Write;
use valkeeper_core::{
    decision::{BlockReason, HoldReason, Reason, RejectReason, WaitReason},
    projection::reason::StatusReason,
};

/// A reason code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Code {
    /// As in conditions, Kubernetes Events, metrics and replay.
    pub code: &'static str,
    /// What it is the reason of.
    pub kind: &'static str,
    /// Its meaning.
    pub text: &'static str,
}

/// Reason codes.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct Codes(pub Vec<Code>);

/// Every code there is.
pub fn all() -> Codes {
    let mut codes = Vec::new();
    codes.extend(Reason::ALL.iter().map(|r| Code { code: r.code(), kind: "decision", text: r.explain() }));
    codes.extend(WaitReason::ALL.iter().map(|r| Code { code: r.code(), kind: "wait", text: r.explain() }));
    codes.extend(BlockReason::ALL.iter().map(|r| Code { code: r.code(), kind: "block", text: r.explain() }));
    codes.extend(RejectReason::ALL.iter().map(|r| Code {
        code: r.code(),
        kind: "rejection",
        text: r.explain(),
    }));
    codes.extend(HoldReason::ALL.iter().map(|r| Code { code: r.code(), kind: "hold", text: r.explain() }));
    codes.extend(StatusReason::ALL.iter().map(|r| Code {
        code: r.code(),
        kind: "condition",
        text: r.explain(),
    }));
    Codes(codes)
}

/// The meaning of a code, whatever its case. Errors: [`Error::NoSuchCode`] with codes that look alike.
pub fn explain(code: &str) -> Result<Codes, Error> {
    let Codes(codes) = all();
    let found: Vec<Code> = codes.iter().filter(|c| c.code.eq_ignore_ascii_case(code)).cloned().collect();
    if !found.is_empty() {
        return Ok(Codes(found));
    }
    let wanted = code.to_lowercase();
    let alike = |c: &&Code| {
        let has = c.code.to_lowercase();
        has.contains(&wanted) || common_prefix(&has, &wanted) >= ALIKE_PREFIX_MIN
    };
    let alike: Vec<&str> = codes.iter().filter(alike).map(|c| c.code).collect();
    Err(Error::NoSuchCode { code: code.to_owned(), alike: alike.join(", ") })
}

/// Codes that share so many first letters are offered instead: fewer match half of the table.
const ALIKE_PREFIX_MIN: usize = 4;

fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).count()
}

impl Report for Codes {
    fn text(&self) -> String {
        let mut text = String::new();
        for Code { code, kind, text: meaning } in &self.0 {
            let _ = writeln!(text, "{code} ({kind}): {meaning}");
        }
        text
    }

    fn csv(&self) -> Option<String> {
        let mut table = Table::new(["code", "kind", "text"]);
        for Code { code, kind, text } in &self.0 {
            table.push([(*code).to_owned(), (*kind).to_owned(), (*text).to_owned()]);
        }
        Some(table.csv())
    }

    fn finding(&self) -> Finding {
        Finding::Clean
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_core::projection::reason::ConditionReason;

    /// Every reason of that one's kind.
    fn kin(of: ConditionReason) -> Vec<ConditionReason> {
        match of {
            ConditionReason::Decision(_) => {
                Reason::ALL.iter().copied().map(ConditionReason::Decision).collect()
            }
            ConditionReason::Wait(_) => WaitReason::ALL.iter().copied().map(ConditionReason::Wait).collect(),
            ConditionReason::Block(_) => {
                BlockReason::ALL.iter().copied().map(ConditionReason::Block).collect()
            }
            ConditionReason::Status(_) => {
                StatusReason::ALL.iter().copied().map(ConditionReason::from).collect()
            }
        }
    }

    #[test]
    fn every_reason_that_a_condition_can_have_is_explained() {
        let kinds = [
            ConditionReason::Decision(Reason::Bootstrap),
            ConditionReason::Wait(WaitReason::NotObserved),
            ConditionReason::Block(BlockReason::Paused),
            ConditionReason::Status(StatusReason::JournalBroken),
        ];
        for reason in kinds.into_iter().flat_map(kin) {
            let Codes(found) = explain(reason.code()).unwrap();
            assert_eq!(found.iter().map(|c| c.code).collect::<Vec<_>>(), [reason.code()]);
        }
        let text = explain("JournalBroken").unwrap().text();
        for way_out in
            ["valkeeper.io/repair-journal", "valkeeper.io/accept-journal-loss", ".status.journal.hash"]
        {
            assert!(text.contains(way_out), "{text}");
        }
    }

    #[test]
    fn every_code_is_explained_in_sentences_and_is_unique() {
        let Codes(codes) = all();
        for Code { code, text, .. } in &codes {
            assert!(text.ends_with('.') && !text.contains("  "), "{code}: {text}");
        }
        let names: std::collections::BTreeSet<_> = codes.iter().map(|c| c.code).collect();
        assert_eq!(names.len(), codes.len());
    }

    #[test]
    fn case_does_not_matter() {
        let text = explain("primarygone").unwrap().text();
        assert!(text.starts_with("PrimaryGone (decision): The primary's process is proven gone"), "{text}");
    }

    #[test]
    fn an_unknown_code_is_answered_with_those_that_look_alike() {
        let error = explain("PrimaryDead").unwrap_err();
        assert!(error.is_usage());
        assert!(error.to_string().contains("PrimaryGone, PrimaryRestarted"), "{error}");
    }
}

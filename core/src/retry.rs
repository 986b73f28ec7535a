//! When what failed is tried again, and for how long another is preferred.

use crate::{decide::View, ids::Timestamp};

/// First pause before an effect that failed is tried again; doubles with each failure. Milliseconds: short
/// enough to go unnoticed when a conflict was the cause.
const RETRY_FIRST_MS: i64 = 200;
/// Longest such pause: a repaired cause is noticed within it, and what is refused for ever costs the journal
/// a few records an hour. Milliseconds.
const RETRY_MAX_MS: i64 = 300_000;

/// How long a member whose part in a promotion came to nothing is passed over where another serves as well.
/// Longer than the first seven pauses between two tries, in which whatever passes by itself has passed; short
/// enough that one that was mended comes first again before anyone asks why it does not. Milliseconds.
const PASSED_OVER_MS: i64 = 30_000;

/// When an effect that failed `count` times, last at `last`, may be tried again.
pub fn retry_at(count: u32, last: Timestamp) -> Timestamp {
    let doubled = RETRY_FIRST_MS.saturating_mul(1_i64 << count.saturating_sub(1).min(20));
    last.plus_millis(doubled.min(RETRY_MAX_MS))
}

/// How often a promotion or a handover must have come to nothing before another member is preferred: once may
/// be chance, and the next try is 200 ms away. Count.
const CHANCES: u32 = 2;

/// When a promotion or a handover that has failed lately, and over and over, may be tried again; `None` if
/// none has.
pub fn failing_until(view: &View<'_>, key: &str) -> Option<Timestamp> {
    refusals(view, key).filter(|(count, _)| *count >= CHANCES).map(|(count, last)| retry_at(count, last))
}

/// How often what was told under this key has come to nothing, and when it did last, if that was lately or is
/// not due again.
pub fn refusals(view: &View<'_>, key: &str) -> Option<(u32, Timestamp)> {
    let failed = view.state.failures.get(key).copied();
    failed.filter(|(count, last)| {
        view.now.millis_since(*last) < PASSED_OVER_MS || retry_at(*count, *last) > view.now
    })
}

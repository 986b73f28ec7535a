//! The one clock of the process: the wall clock as it was at start, moved on by the monotonic one. It never jumps, so
//! durations between its times are right whatever is done to the wall clock meanwhile.

use std::time::{SystemTime, UNIX_EPOCH};
use tokio::time::Instant;
use valkeeper_core::ids::Timestamp;

/// The wall clock as it is now. For certificates only: whoever verifies them goes by it, and it may have been wrong at the
/// start of the process, or have gone on while the process was suspended.
pub fn wall() -> Timestamp {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since_epoch.as_nanos()).unwrap_or(i64::MAX))
}

/// The clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    wall_at_start: Timestamp,
    start: Instant,
}

impl Clock {
    /// A clock that begins with the wall clock's time.
    pub fn start() -> Self {
        Clock { wall_at_start: wall(), start: Instant::now() }
    }

    /// This clock, set forward if it is behind `time`. An earlier writer's wall clock may have been ahead of ours: times of
    /// what is looked at now must not lie before what it has recorded.
    #[must_use]
    pub fn not_before(self, time: Timestamp) -> Self {
        let behind = time.0.saturating_sub(self.now().0).max(0);
        Clock { wall_at_start: Timestamp(self.wall_at_start.0.saturating_add(behind)), ..self }
    }

    /// Now.
    pub fn now(&self) -> Timestamp {
        self.at(Instant::now())
    }

    /// The time of a moment.
    pub fn at(&self, moment: Instant) -> Timestamp {
        let elapsed = moment.saturating_duration_since(self.start).as_nanos();
        Timestamp(self.wall_at_start.0.saturating_add(i64::try_from(elapsed).unwrap_or(i64::MAX)))
    }

    /// The moment of a time; a time before the start is the start.
    pub fn moment(&self, time: Timestamp) -> Instant {
        let nanos = u64::try_from(time.0.saturating_sub(self.wall_at_start.0)).unwrap_or(0);
        self.start + std::time::Duration::from_nanos(nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_and_its_moment_are_the_same() {
        let clock = Clock::start();
        let later = clock.now().plus_millis(1_500);
        assert_eq!(clock.at(clock.moment(later)), later);
    }

    #[test]
    fn a_clock_behind_an_earlier_writers_is_set_forward_and_one_ahead_stays() {
        let clock = Clock::start();
        let ahead = clock.now().plus_millis(60_000);
        let set = clock.not_before(ahead);
        assert!(set.now() >= ahead && set.now() < ahead.plus_millis(30_000));
        assert_eq!(set.moment(set.at(set.start)), set.start);
        assert_eq!(clock.not_before(Timestamp(0)).wall_at_start, clock.wall_at_start);
    }

    #[test]
    fn a_time_before_the_start_is_now_due() {
        let clock = Clock::start();
        assert!(clock.moment(Timestamp(0)) <= Instant::now());
    }
}

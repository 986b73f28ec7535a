//! Group commit: appends that wait while another is synced go together, with one sync for all of them. There is no thread
//! of its own: the first that finds nobody at work leads, and goes on until nobody waits. First come, first served; a
//! writer sends one append at a time, so none can crowd out the others.

use super::{Shared, live::Write};
use crate::{backend::AppendError, record::BATCH_BYTES_MAX};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::oneshot;

/// Appends that may wait: one of each of a thousand clusters, which is what one operator is made for.
pub const WAITING_APPENDS_MAX: usize = 1024;

/// Bytes that may wait: 64 of the largest batches.
pub const WAITING_BYTES_MAX: usize = 64 * BATCH_BYTES_MAX;

/// Appends that share a sync. More would add little: at 64 the sync is already a small part of what each takes.
pub const GROUP_APPENDS_MAX: usize = 64;

/// Bytes that share a sync, unless one append alone has more. Half of sled's segment: sled reuses a segment when two later
/// ones were written, and it must not do so before our sync has made those durable.
pub const GROUP_BYTES_MAX: usize = BATCH_BYTES_MAX;

type Answer = oneshot::Sender<Result<(), AppendError>>;

/// Appends that wait.
#[derive(Default)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    waiting: VecDeque<(Write, Answer)>,
    bytes: usize,
    is_led: bool,
}

impl Queue {
    /// Lets an append wait. Whoever finds that nobody leads has to.
    fn push(&self, write: Write, answer: Answer) -> Result<IsLed, AppendError> {
        let mut inner = self.lock();
        let (appends, bytes) = (inner.waiting.len() + 1, inner.bytes + write.frames.len());
        if appends > WAITING_APPENDS_MAX || bytes > WAITING_BYTES_MAX {
            return Err(AppendError::Io(format!("{} appends wait already", inner.waiting.len())));
        }
        inner.bytes = bytes;
        inner.waiting.push_back((write, answer));
        Ok(if std::mem::replace(&mut inner.is_led, true) { IsLed::Yes } else { IsLed::No })
    }

    /// The next group; empty if nobody waits.
    fn take(&self) -> Vec<(Write, Answer)> {
        let mut inner = self.lock();
        let (mut group, mut bytes) = (Vec::new(), 0);
        while let Some((write, _)) = inner.waiting.front() {
            bytes += write.frames.len();
            let is_full = group.len() == GROUP_APPENDS_MAX || (bytes > GROUP_BYTES_MAX && !group.is_empty());
            if is_full {
                break;
            }
            group.extend(inner.waiting.pop_front());
        }
        inner.bytes -= group.iter().map(|(write, _)| write.frames.len()).sum::<usize>();
        group
    }

    /// Ends the lead if nobody waits.
    fn end(&self) -> IsLed {
        let mut inner = self.lock();
        inner.is_led = !inner.waiting.is_empty();
        if inner.is_led { IsLed::Yes } else { IsLed::No }
    }

    /// Ends the lead whoever waits: they are not answered.
    fn abandon(&self) {
        let mut inner = self.lock();
        *inner = Inner::default();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here leaves it half-changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum IsLed {
    Yes,
    No,
}

/// Appends, in a group with whoever waits as well.
pub(super) async fn append(shared: &Arc<Shared>, write: Write) -> Result<(), AppendError> {
    let (answer, answered) = oneshot::channel();
    if let IsLed::No = shared.queue.push(write, answer)? {
        let lead = Lead(Some(Arc::clone(shared)));
        tokio::task::spawn_blocking(move || lead.run());
    }
    // Not answered: the runtime is shutting down.
    answered.await.unwrap_or_else(|_| Err(AppendError::Ambiguous("the writer went away".to_owned())))
}

/// The duty to write for all who wait. Given up if it is dropped.
struct Lead(Option<Arc<Shared>>);

impl Lead {
    fn run(mut self) {
        while let Some(shared) = self.0.take() {
            let (writes, answers): (Vec<Write>, Vec<Answer>) = shared.queue.take().into_iter().unzip();
            let results = shared.write(writes);
            // The store is let go of before the last answer: whoever gets it may close the store and open it again.
            if let IsLed::Yes = shared.queue.end() {
                self.0 = Some(shared);
            } else {
                drop(shared);
            }
            for (answer, result) in answers.into_iter().zip(results) {
                // Nobody listens if the caller dropped its append.
                let _ = answer.send(result);
            }
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.queue.abandon();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Hash, Head, StreamId};
    use valkeeper_core::ids::{Seq, Timestamp, WriterEpoch};

    fn write(number: usize, bytes: usize) -> (Write, Answer) {
        let head = Head { seq: Seq(1), epoch: WriterEpoch(1), time: Timestamp(1), hash: Hash::ZERO };
        let (stream, frames) = (StreamId(format!("uid-{number:04}")), vec![0; bytes]);
        (Write { stream, expected: None, first: Seq(1), head, frames, cut: None }, oneshot::channel().0)
    }

    fn names(group: &[(Write, Answer)]) -> Vec<&str> {
        group.iter().map(|(write, _)| write.stream.0.as_str()).collect()
    }

    #[test]
    fn who_came_first_goes_first_and_a_group_ends_at_its_limits() {
        let queue = Queue::default();
        for number in 0..GROUP_APPENDS_MAX + 1 {
            let (write, answer) = write(number, 1);
            let led = queue.push(write, answer).unwrap();
            assert_eq!(matches!(led, IsLed::No), number == 0);
        }
        let (large, answer) = write(9_000, GROUP_BYTES_MAX + 1);
        queue.push(large, answer).unwrap();
        let group = queue.take();
        assert_eq!(group.len(), GROUP_APPENDS_MAX);
        assert_eq!(names(&group)[..2], ["uid-0000", "uid-0001"]);
        assert_eq!(names(&queue.take()), ["uid-0064"]);
        assert!(matches!(queue.end(), IsLed::Yes));
        assert_eq!(names(&queue.take()), ["uid-9000"]);
        assert!(matches!(queue.end(), IsLed::No));
        assert_eq!(queue.lock().bytes, 0);
    }

    #[test]
    fn a_full_queue_refuses_and_nothing_was_written() {
        let queue = Queue::default();
        let push = |bytes: usize| {
            let (write, answer) = write(1, bytes);
            queue.push(write, answer).map(drop)
        };
        for _ in 0..WAITING_APPENDS_MAX {
            push(1).unwrap();
        }
        assert!(matches!(push(1), Err(AppendError::Io(_))));
        queue.abandon();
        push(WAITING_BYTES_MAX).unwrap();
        assert!(matches!(push(1), Err(AppendError::Io(_))));
    }
}

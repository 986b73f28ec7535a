//! Journals that are left of deleted clusters. They count among those for which there is room; after a while each is carried to the archive,
//! every record of it, and removed.

use crate::{api::v1alpha1::ValkeyCluster, cluster::Shell, k8s, k8s::apply};
use std::{collections::HashSet, error::Error as StdError, sync::Arc, time::Duration};
use valkeeper_core::{event::Event, ids::Timestamp, observation::SpecFact};
use valkeeper_journal::{
    Backend, BackendError, Error, Journal, Retired, StreamId,
    archive::{Archive, ArchiveError},
    retire,
};

/// How often the operator looks for them: what is kept for days goes an hour later at most, and each look asks for one object a journal.
const LOOK_PERIOD: Duration = Duration::from_secs(3_600);

/// Journals that are tried in one look, each of them read as a whole: nobody else shall wait for it. A thousand are gone in two days.
const TRIED_MAX: usize = 20;

type Failure = Box<dyn StdError + Send + Sync>;

/// Looks after them as long as this process leads. Never returns.
pub async fn look_after(shell: &Shell) {
    let keeping = &shell.keeping;
    let mut desk = Desk {
        backend: Arc::clone(&shell.backend),
        archive: keeping.archive(),
        keep: keeping.keep_deleted,
        writer: &shell.writer,
        after: None,
    };
    let uid_of = async |namespace: &str, name: &str| -> Result<Option<String>, Failure> {
        // An operator that watches some namespaces only cannot know, and is refused here.
        let live = apply::meta::<ValkeyCluster>(&shell.clients.requests, namespace, name).await?;
        Ok(live.and_then(|live| live.uid))
    };
    let leads = || -> Result<(), Failure> { Ok(shell.leadership.check()?) };
    loop {
        let clusters = shell.world.clusters.all();
        let known = clusters.iter().filter_map(|live| live.metadata.uid.clone()).collect();
        match desk.look(&known, shell.clock.now(), &uid_of, &leads).await {
            Ok(Look { left, removed, stuck }) => {
                tracing::info!(left, removed, stuck, "journals of deleted clusters");
                shell.metrics.journals_left(left, removed, stuck);
            }
            Err(error) => {
                tracing::warn!(error = k8s::chain(&error), "journals that are left cannot be listed")
            }
        }
        tokio::time::sleep(LOOK_PERIOD).await;
    }
}

/// What a look found. Counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Look {
    /// Journals that stay.
    left: usize,
    /// Those that were removed.
    removed: usize,
    /// Those that were to be removed and could not be, or of which nobody can say how old they are.
    stuck: usize,
}

/// What became of a journal whose time is over.
enum Done {
    /// It is gone.
    Removed(Retired),
    /// Its cluster lives, by the API server's own word.
    Lives,
    /// It did not say that its cluster is deleted. It does now, and its time counts from here.
    Noted,
}

/// Where journals are kept and go, and for how long.
struct Desk<'a> {
    backend: Arc<dyn Backend>,
    archive: Option<&'a Archive>,
    /// `None` for ever.
    keep: Option<Duration>,
    writer: &'a str,
    /// The one that was tried last: the next look goes on behind it, so that those which cannot go keep no other from it.
    after: Option<StreamId>,
}

impl Desk<'_> {
    /// Looks at each once, which makes it count, and removes what is due and can go.
    async fn look(
        &mut self,
        known: &HashSet<String>,
        now: Timestamp,
        uid_of: &impl AsyncFn(&str, &str) -> Result<Option<String>, Failure>,
        leads: &impl Fn() -> Result<(), Failure>,
    ) -> Result<Look, BackendError> {
        let is_left = |stream: &StreamId| !known.contains(&stream.0);
        let mut found = Look::default();
        for stream in self.backend.half_removed().await?.into_iter().filter(is_left) {
            let ended = match leads() {
                Ok(()) => self.backend.remove(&stream).await.map_err(Failure::from),
                Err(deposed) => Err(deposed),
            };
            if let Err(error) = ended {
                found.stuck += 1;
                stays(&stream, error.as_ref());
            }
        }
        let all = self.backend.streams().await?.into_iter().filter(is_left);
        let (first, last): (Vec<_>, Vec<_>) =
            all.partition(|stream| self.after.as_ref().is_none_or(|after| stream > after));
        let mut tries = TRIED_MAX;
        for stream in first.into_iter().chain(last) {
            found.left += 1;
            let head = match self.backend.head(&stream).await {
                Ok(Some(head)) => head,
                Ok(None) => continue,
                Err(error) => {
                    found.stuck += 1;
                    stays(&stream, &error);
                    continue;
                }
            };
            if tries == 0 || !is_over(head.time, now, self.keep) {
                continue;
            }
            tries -= 1;
            match self.let_go(&stream, now, uid_of, leads).await {
                Ok(Done::Removed(Retired { head, records, segments })) => {
                    (found.left, found.removed) = (found.left - 1, found.removed + 1);
                    let (stream, last) = (&stream.0, head.seq.0);
                    tracing::info!(
                        stream,
                        last,
                        records,
                        segments,
                        "the journal of a deleted cluster is removed"
                    );
                }
                Ok(Done::Noted) => {
                    tracing::info!(
                        stream = stream.0,
                        "a journal says from now on that its cluster is deleted"
                    )
                }
                Ok(Done::Lives) => {}
                Err(error) => {
                    found.stuck += 1;
                    if is_archive_away(error.as_ref()) {
                        tries = 0;
                    }
                    stays(&stream, error.as_ref());
                }
            }
            self.after = Some(stream);
        }
        Ok(found)
    }

    async fn let_go(
        &self,
        stream: &StreamId,
        now: Timestamp,
        uid_of: &impl AsyncFn(&str, &str) -> Result<Option<String>, Failure>,
        leads: &impl Fn() -> Result<(), Failure>,
    ) -> Result<Done, Failure> {
        let (mut journal, state) = Journal::open(Arc::clone(&self.backend), stream.clone()).await?;
        if uid_of(&state.namespace, &state.name).await?.as_ref() == Some(&stream.0) {
            return Ok(Done::Lives);
        }
        leads()?;
        if !state.deleting {
            // Somebody took the finalizer off. The last record may be months older than that.
            journal.claim(None, self.writer, env!("CARGO_PKG_VERSION"), now).await?;
            journal.append(vec![Event::SpecChanged(SpecFact::Deleting)], now).await?;
            return Ok(Done::Noted);
        }
        let retired = retire(self.backend.as_ref(), stream, self.archive).await?;
        Ok(Done::Removed(retired.ok_or("it came and went")?))
    }
}

fn stays(stream: &StreamId, error: &(dyn StdError + 'static)) {
    tracing::warn!(stream = stream.0, error = k8s::chain(error), "the journal of a deleted cluster stays");
}

/// True if no other has to be tried now: each would wait for the archive as long.
fn is_archive_away(error: &(dyn StdError + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(Error::Archive(ArchiveError::Unavailable(_))))
}

/// True if a journal whose last record is of `last` is to go; `keep`: `None` for never.
fn is_over(last: Timestamp, now: Timestamp, keep: Option<Duration>) -> bool {
    let age_ms = u128::try_from(now.millis_since(last)).unwrap_or(0);
    keep.is_some_and(|keep| age_ms > keep.as_millis())
}

#[cfg(test)]
mod tests;

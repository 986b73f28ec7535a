//! Journals that are left of deleted clusters. They count among those for which there is room; after a while each is carried to the archive,
//! every record of it, and removed.

use crate::{api::v1alpha1::ValkeyCluster, cluster::Shell, k8s, k8s::apply};
use std::{collections::HashSet, time::Duration};
use valkeeper_core::{event::Event, ids::Timestamp};
use valkeeper_journal::{Backend, BackendError, Error, Retired, StreamId, archive::Archive, retire};

/// How often the operator looks for them: what is kept for days goes an hour later at most, and each look asks for one object a journal.
const LOOK_PERIOD: Duration = Duration::from_secs(3_600);

/// Journals that are removed in one such hour, each a few objects: nobody else shall wait for it. A thousand are gone in two days.
const REMOVED_MAX: usize = 20;

/// Looks after them as long as this process leads. Never returns.
pub async fn look_after(shell: &Shell) {
    loop {
        match look(shell).await {
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

/// What a look found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Look {
    /// Journals that stay. Count.
    left: usize,
    /// Those that were removed.
    removed: usize,
    /// Those among the former that were to be removed and could not be.
    stuck: usize,
}

async fn look(shell: &Shell) -> Result<Look, BackendError> {
    let backend = shell.backend.as_ref();
    for stream in backend.half_removed().await? {
        shell.leadership.check().map_err(|deposed| BackendError::Unavailable(deposed.to_string()))?;
        backend.remove(&stream).await?;
    }
    let known: HashSet<String> =
        shell.world.clusters.all().iter().filter_map(|live| live.metadata.uid.clone()).collect();
    let mut found = Look::default();
    for stream in backend.streams().await?.iter().filter(|stream| !known.contains(&stream.0)) {
        found.left += 1;
        match remove_if_due(shell, stream, found.removed).await {
            Ok(Some(Retired { head, records, segments })) => {
                found.left -= 1;
                found.removed += 1;
                let archive = shell.keeping.place().unwrap_or("none");
                let (stream, last) = (&stream.0, head.seq.0);
                tracing::info!(
                    stream,
                    last,
                    records,
                    segments,
                    archive,
                    "the journal of a deleted cluster is removed"
                );
            }
            Ok(None) => {}
            Err(error) => {
                found.stuck += 1;
                let error = k8s::chain(error.as_ref());
                tracing::warn!(stream = stream.0, error, "the journal of a deleted cluster stays");
            }
        }
    }
    Ok(found)
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Removes the journal, if its time is over and its cluster is gone by the API server's own word. Looking at it makes it count.
async fn remove_if_due(shell: &Shell, stream: &StreamId, removed: usize) -> Result<Option<Retired>, Failure> {
    let Some(head) = shell.backend.head(stream).await? else { return Ok(None) };
    if removed >= REMOVED_MAX || !is_over(head.time, shell.clock.now(), shell.keeping.keep_deleted) {
        return Ok(None);
    }
    let Some((namespace, name)) = owner(shell.backend.as_ref(), stream).await? else {
        return Err("it does not say whose it is".into());
    };
    // An operator that watches some namespaces only cannot know, and is refused here.
    let live = apply::meta::<ValkeyCluster>(&shell.clients.requests, &namespace, &name).await?;
    if live.is_some_and(|live| live.uid.as_deref() == Some(&stream.0)) {
        return Ok(None);
    }
    shell.leadership.check()?;
    let archive: Option<&Archive> = shell.keeping.archive();
    Ok(retire(shell.backend.as_ref(), stream, archive).await?)
}

/// True if a journal whose last record is of `last` is to go; `keep`: `None` for never.
fn is_over(last: Timestamp, now: Timestamp, keep: Option<Duration>) -> bool {
    let age_ms = u128::try_from(now.millis_since(last)).unwrap_or(0);
    keep.is_some_and(|keep| age_ms > keep.as_millis())
}

/// Namespace and name of the cluster, as the stream's beginning has them.
async fn owner(backend: &dyn Backend, stream: &StreamId) -> Result<Option<(String, String)>, Error> {
    let mut reader = backend.read(stream).await?;
    if let Some(folded) = reader.folded() {
        let state = folded.state();
        return Ok(Some((state.namespace.clone(), state.name.clone())));
    }
    let first = reader.page().await?.and_then(|page| page.records.into_iter().next());
    let Some(Event::Baseline { namespace, name, .. }) = first.map(|first| first.record.event) else {
        return Ok(None);
    };
    Ok(Some((namespace, name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_goes_when_its_last_record_is_old_enough_and_never_without_a_time() {
        let (last, keep) = (Timestamp(0), Some(Duration::from_secs(60)));
        let at = |seconds: i64| last.plus_millis(seconds * 1_000);
        assert_eq!([at(-5), at(60), at(61)].map(|now| is_over(last, now, keep)), [false, false, true]);
        assert!(!is_over(last, at(i64::from(i32::MAX)), None));
    }
}

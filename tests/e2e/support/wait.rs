//! Awaiting conditions, never a time alone.

use anyhow::bail;
use std::{
    future::Future,
    time::{Duration, Instant},
};

/// Between two looks. A tenth of a second is far below everything that is measured by looking; what is faster is
/// measured by the load's own times.
const PAUSE: Duration = Duration::from_millis(100);

/// Calls `check` until it succeeds, and gives how long that took. An error means "not yet" and says what is missing.
pub async fn until<T, F>(
    what: &str,
    patience: Duration,
    mut check: impl FnMut() -> F,
) -> anyhow::Result<(T, Duration)>
where
    F: Future<Output = anyhow::Result<T>>,
{
    let begun = Instant::now();
    loop {
        let missing = match check().await {
            Ok(found) => return Ok((found, begun.elapsed())),
            Err(missing) => missing,
        };
        if begun.elapsed() > patience {
            bail!("waited {} s for {what}: {missing:#}", patience.as_secs());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

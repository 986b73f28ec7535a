//! The mirror of `tiered` journals: only a copy, which is made again from the first store. So one that is missing or damaged
//! for good is put aside, and an empty one begins.

use crate::k8s;
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use valkeeper_journal::{BackendError, Sled};

/// Mirrors that are kept aside: enough to see whether it is the same damage each time. The oldest go.
const ASIDE_MAX: usize = 3;

/// Opens the mirror in `directory`, or begins an empty one. Blocks.
///
/// # Errors
/// What may pass (open elsewhere, a disk that does not answer, a newer version's store), and whatever the empty one says.
pub fn open(directory: &Path) -> Result<Sled, BackendError> {
    let refused = match Sled::open(directory) {
        Ok(mirror) => return Ok(mirror),
        Err(refused) => refused,
    };
    let is_lost = refused.is_damage() || matches!(refused, BackendError::StoreMissing { .. });
    if !is_lost {
        return Err(refused);
    }
    let aside = set_aside(directory).map_err(|source| BackendError::Io {
        what: format!("cannot put {} aside: {}", directory.display(), k8s::chain(&refused)),
        source,
    })?;
    tracing::warn!(
        error = k8s::chain(&refused),
        aside = %aside.display(),
        "the mirror of the journals was put aside, and begins empty"
    );
    Sled::open(directory)
}

/// Gives the store and its anchors, as far as they are there, the highest number; says which name the store has then.
fn set_aside(directory: &Path) -> io::Result<PathBuf> {
    let mut taken: Vec<PathBuf> = (1..=ASIDE_MAX).map(|number| named(directory, number)).collect();
    taken.retain(|store| pair(store).iter().any(|path| path.exists()));
    if taken.len() == ASIDE_MAX {
        for path in pair(&taken.remove(0)).iter().filter(|path| path.exists()) {
            fs::remove_dir_all(path)?;
        }
    }
    // The others close up, also after a crash in the middle of it: a higher number is a later one.
    for (store, number) in taken.iter().zip(1..) {
        rename(store, &named(directory, number))?;
    }
    let aside = named(directory, taken.len() + 1);
    rename(directory, &aside)?;
    Ok(aside)
}

/// A store and its anchors.
fn pair(store: &Path) -> [PathBuf; 2] {
    [store.to_owned(), Sled::anchors_of(store)]
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    for (from, to) in pair(from).iter().zip(pair(to)).filter(|(from, to)| *from != to && from.exists()) {
        fs::rename(from, to)?;
    }
    Ok(())
}

fn named(directory: &Path, number: usize) -> PathBuf {
    let mut name = directory.to_owned().into_os_string();
    name.push(format!(".aside-{number}"));
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use valkeeper_core::{
        event::{BaselineOrigin, Event},
        ids::Timestamp,
    };
    use valkeeper_journal::{Backend, Head, Journal, StreamId};

    /// A directory of its own, removed in the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let folder = std::env::temp_dir().join(format!("valkeeper-mirror-{}-{name}", std::process::id()));
            fs::create_dir_all(&folder).unwrap();
            Scratch(folder)
        }

        fn mirror(&self) -> PathBuf {
            self.0.join("mirror")
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = names.filter(|name| !name.contains("broken")).collect();
            names.sort();
            names
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            // What is left behind costs space in a directory for temporary files, no more.
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn stream() -> StreamId {
        StreamId("uid-1".to_owned())
    }

    /// Appends to a mirror, as many times as there are marks; where it ends then.
    async fn filled(mirror: Sled, marks: i64) -> Head {
        let baseline = Event::Baseline {
            cluster_uid: stream().0,
            namespace: "shop".to_owned(),
            name: "orders".to_owned(),
            origin: BaselineOrigin::Empty,
        };
        let (mut journal, _) = Journal::open(Arc::new(mirror), stream()).await.unwrap();
        let mut baseline = journal.head().is_none().then_some(baseline);
        for time in 0..marks {
            journal.claim(baseline.take(), "w", "v", Timestamp(time)).await.unwrap();
        }
        *journal.head().unwrap()
    }

    async fn head(mirror: &Sled) -> Option<Head> {
        mirror.head(&stream()).await.unwrap()
    }

    #[tokio::test]
    async fn a_mirror_that_is_missing_or_damaged_is_put_aside_and_begins_empty() {
        type Loss = fn(&Path);
        let losses: [(&str, Loss, &[&str]); 4] = [
            ("missing", |dir| fs::remove_dir_all(dir).unwrap(), &["mirror.aside-1.anchor"]),
            (
                "emptied",
                |dir| {
                    fs::remove_dir_all(dir).unwrap();
                    fs::create_dir(dir).unwrap();
                },
                &["mirror.aside-1", "mirror.aside-1.anchor"],
            ),
            (
                "damaged",
                |dir| {
                    let mut conf = fs::read(dir.join("conf")).unwrap();
                    conf[0] ^= 0xff;
                    fs::write(dir.join("conf"), conf).unwrap();
                },
                &["mirror.aside-1", "mirror.aside-1.anchor"],
            ),
            (
                "anchors damaged",
                |dir| fs::write(Sled::anchors_of(dir).join("slots"), [b'x'; 2048]).unwrap(),
                &["mirror.aside-1", "mirror.aside-1.anchor"],
            ),
        ];
        for (name, lose, aside) in losses {
            let scratch = Scratch::new(&name.replace(' ', "-"));
            let dir = scratch.mirror();
            filled(open(&dir).unwrap(), 2).await;
            lose(&dir);
            assert!(Sled::open(&dir).is_err(), "{name}: as the first store it stays refused");
            let mirror = open(&dir).unwrap();
            assert_eq!(head(&mirror).await, None, "{name}");
            for wanted in aside {
                assert!(scratch.names().iter().any(|found| found == wanted), "{name}: {:?}", scratch.names());
            }
            // From then on it is a mirror like any other.
            let end = filled(mirror, 1).await;
            assert_eq!(head(&open(&dir).unwrap()).await, Some(end), "{name}");
        }
    }

    #[tokio::test]
    async fn the_latest_that_were_put_aside_are_kept_and_no_more() {
        let scratch = Scratch::new("many");
        let dir = scratch.mirror();
        let mut ends = Vec::new();
        for round in 1..=5 {
            ends.push(filled(open(&dir).unwrap(), round).await);
            fs::write(Sled::anchors_of(&dir).join("slots"), [b'x'; 2048]).unwrap();
            open(&dir).unwrap();
            // A crash between two names leaves a gap.
            if round == 4 {
                for path in pair(&named(&dir, 2)) {
                    fs::remove_dir_all(path).unwrap();
                }
                ends.remove(2);
            }
        }
        let kept = (1..=3).map(|number| format!("mirror.aside-{number}"));
        let mut kept: Vec<String> = kept.flat_map(|name| [name.clone(), format!("{name}.anchor")]).collect();
        kept.extend(["mirror".to_owned(), "mirror.lock".to_owned()]);
        kept.sort();
        assert_eq!(scratch.names(), kept);
        for (number, end) in (1..=3).zip(&ends[ends.len() - 3..]) {
            let kept = named(&dir, number);
            // It was not the store that was damaged.
            fs::remove_dir_all(Sled::anchors_of(&kept)).unwrap();
            assert_eq!(head(&Sled::open(&kept).unwrap()).await.as_ref(), Some(end), "number {number}");
        }
    }

    #[tokio::test]
    async fn what_may_pass_puts_nothing_aside() {
        let scratch = Scratch::new("passes");
        let dir = scratch.mirror();
        let end = filled(open(&dir).unwrap(), 2).await;
        let held = Sled::open(&dir).unwrap();
        assert!(matches!(open(&dir), Err(BackendError::Locked { .. })));
        drop(held);
        let slots = Sled::anchors_of(&dir).join("slots");
        let bytes = fs::read(&slots).unwrap();
        fs::remove_file(&slots).unwrap();
        fs::create_dir(&slots).unwrap();
        assert!(matches!(open(&dir), Err(BackendError::Io { .. })));
        fs::remove_dir(&slots).unwrap();
        fs::write(&slots, bytes).unwrap();
        assert_eq!(scratch.names(), ["mirror", "mirror.anchor", "mirror.lock"]);
        assert_eq!(head(&open(&dir).unwrap()).await, Some(end));
    }
}

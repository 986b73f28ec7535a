//! Clients that write to a replica: connections that were made while the address was the primary's, or that were led here after. A library
//! takes `READONLY` for an answer and keeps the connection, so somebody else has to end it.

use super::{Error, Local, cmd};
use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

/// Commands beside those that Valkey calls writes, by which a client may write.
const MAY_WRITE: [&str; 4] = ["exec", "eval", "evalsha", "fcall"];
/// How often the connections are looked at for one rise of the count: a client shows the command that it sent last.
const SAMPLES: usize = 20;
/// Between two of these looks.
const SAMPLE_PAUSE: Duration = Duration::from_millis(5);

/// How often the server has answered `READONLY`, by the section errorstats of INFO.
pub(super) fn refused_writes(info: &str) -> u64 {
    let counted = info.lines().find_map(|line| line.strip_prefix("errorstat_READONLY:count="));
    counted.and_then(|count| count.trim_end().parse().ok()).unwrap_or(0)
}

/// Number and last command of a connection in `CLIENT LIST`, unless it is one of these users'.
fn client<'a>(line: &'a str, spared: &[&str]) -> Option<(&'a str, &'a str)> {
    let field = |name: &str| line.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    let user = field("user")?;
    (!spared.contains(&user)).then_some((field("id")?, field("cmd")?))
}

impl Local {
    /// Ends the connections whose last command was a write, but not this user's, as long as the server is a replica; how many.
    pub async fn end_writers(&self, spared: &str, is_replica: impl Fn() -> bool) -> Result<usize, Error> {
        let mut list = cmd("COMMAND");
        list.arg("LIST").arg("FILTERBY").arg("ACLCAT").arg("write");
        let mut writes: HashSet<String> = self.ask(&list).await?;
        writes.extend(MAY_WRITE.map(str::to_owned));
        let spared = [spared, self.user];
        let mut ended = BTreeSet::new();
        for _ in 0..SAMPLES {
            // Neither the link to the primary nor links of replicas, nor subscribers.
            let all: String = self.ask(cmd("CLIENT").arg("LIST").arg("TYPE").arg("normal")).await?;
            let found = all.lines().filter_map(|line| client(line, &spared));
            for (id, _) in found.filter(|(_, command)| writes.contains(*command)) {
                if is_replica() && ended.insert(id.to_owned()) {
                    let mut kill = cmd("CLIENT");
                    self.ask::<u64>(kill.arg("KILL").arg("ID").arg(id)).await?;
                }
            }
            tokio::time::sleep(SAMPLE_PAUSE).await;
        }
        Ok(ended.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_says_of_its_refusals_and_its_clients() {
        assert_eq!(refused_writes("# Errorstats\r\nerrorstat_READONLY:count=12\r\n"), 12);
        assert_eq!(refused_writes("# Errorstats\r\nerrorstat_ERR:count=3\r\n"), 0);
        let line = "id=7 addr=10.0.0.1:5 flags=N db=0 cmd=set user=app lib-name=";
        assert_eq!(client(line, &["valkeeper"]), Some(("7", "set")));
        assert_eq!(client(line, &["app"]), None);
        assert_eq!(client("", &[]), None);
    }
}

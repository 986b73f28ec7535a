//! Two writers, as applications are: one tries the members and asks for their role, one uses the write Service. In a Valkey Cluster
//! there is one for each shard, which asks the nodes who serves its slot. Each writes a new number about every millisecond and notes when
//! it was acknowledged; afterwards every acknowledged number is looked for.

use super::{
    resp::{Connection, Reach, Reply, Role},
    slots::{self, Tag},
    subject::Subject,
};
use anyhow::{Context, bail};
use std::{
    collections::HashSet,
    io,
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Pause between two writes of one writer.
const PACE: Duration = Duration::from_millis(1);
/// Bound on each wait of a writer where the cluster's network is within reach.
const TIMEOUT_DIRECT: Duration = Duration::from_millis(50);
/// The same through `kubectl exec`, which takes longer to begin.
const TIMEOUT_THROUGH: Duration = Duration::from_secs(3);
/// Bound on reading everything back.
pub const TIMEOUT_READ: Duration = Duration::from_secs(20);
/// An acknowledged write this close before its primary's end may not have left for the replicas yet: replication is
/// asynchronous. Valkey sends to clients and to replicas in one pass of its loop; a pass is far shorter than this.
pub const IN_FLIGHT: Duration = Duration::from_millis(10);
/// An acknowledgement that is read this long after the fault may have been sent before it: the fault's time is taken before the signal is
/// sent, and on two busy cores a writer's thread is late to read. What a successor loses is more than the writes of so short a time.
pub const READ_LATE: Duration = Duration::from_millis(50);

/// A number that was acknowledged, and when.
#[derive(Clone, Copy, Debug)]
struct Ack {
    at: Instant,
    id: u64,
}

/// What one writer saw.
#[derive(Debug)]
pub struct Log {
    /// `roles` or `service`; in a Valkey Cluster the shard.
    pub client: &'static str,
    /// Name of the set that it wrote to.
    pub key: String,
    acks: Vec<Ack>,
}

/// The writers, while they write.
pub struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Vec<(&'static str, Arc<AtomicUsize>)>,
    keys: Vec<String>,
    writers: Vec<JoinHandle<Log>>,
    addresses: Option<tokio::task::JoinHandle<()>>,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(task) = &self.addresses {
            task.abort();
        }
    }
}

impl Load {
    /// Starts both writers and waits for the first acknowledgement of each.
    pub async fn start(subject: &Subject) -> anyhow::Result<Load> {
        let members = Arc::new(Mutex::new(addresses(subject).await?));
        let service = subject.service_address("primary").await?;
        let targets =
            vec![("roles", Target::Members(Arc::clone(&members))), ("service", Target::Service(service))];
        let mut load = Load::on(targets, &subject.reach, &subject.password().await?)?;
        load.addresses = Some(tokio::spawn(follow_addresses(subject.clone(), members)));
        load.flows(Duration::from_secs(30)).await.context("the first writes")?;
        Ok(load)
    }

    /// Starts a writer for each tag of a Valkey Cluster and waits for the first acknowledgement of each.
    pub async fn on_slots(subject: &Subject, tags: Vec<(&'static str, Tag)>) -> anyhow::Result<Load> {
        let members = Arc::new(Mutex::new(addresses(subject).await?));
        let owner = |tag| Target::Owner { members: Arc::clone(&members), tag };
        let targets = tags.into_iter().map(|(client, tag)| (client, owner(tag))).collect();
        let mut load = Load::on(targets, &subject.reach, &subject.password().await?)?;
        load.addresses = Some(tokio::spawn(follow_addresses(subject.clone(), members)));
        load.flows(Duration::from_secs(30)).await.context("the first writes")?;
        Ok(load)
    }

    /// Starts a writer for each target.
    pub fn on(targets: Vec<(&'static str, Target)>, reach: &Reach, password: &str) -> anyhow::Result<Load> {
        let stop = Arc::new(AtomicBool::new(false));
        let run = format!("{:x}", std::time::UNIX_EPOCH.elapsed()?.as_nanos());
        let (mut acknowledged, mut writers, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        for (client, target) in targets {
            let key = match &target {
                Target::Owner { members: _, tag } | Target::PrimaryAt { member: _, tag } => {
                    tag.key(&format!("tests:{run}:{client}"))
                }
                Target::Members(_) | Target::Service(_) | Target::Member(_) => {
                    format!("tests:{run}:{client}")
                }
            };
            keys.push(key.clone());
            let count = Arc::new(AtomicUsize::new(0));
            let writer = Writer {
                target,
                reach: reach.clone(),
                password: password.to_owned(),
                stop: Arc::clone(&stop),
                acknowledged: Arc::clone(&count),
                log: Log { client, key, acks: Vec::new() },
            };
            acknowledged.push((client, count));
            writers.push(std::thread::Builder::new().name(client.to_owned()).spawn(|| writer.run())?);
        }
        Ok(Load { stop, acknowledged, keys, writers, addresses: None })
    }

    /// Names of the sets that are written.
    pub fn keys(&self) -> Vec<String> {
        self.keys.clone()
    }

    /// Waits until every writer has been acknowledged after this call.
    pub async fn flows(&self, patience: Duration) -> anyhow::Result<()> {
        let counts = || self.acknowledged.iter().map(|(client, n)| (*client, n.load(Ordering::Relaxed)));
        let before: Vec<_> = counts().collect();
        super::wait::until("acknowledged writes", patience, || async {
            match counts().zip(&before).find(|(now, then)| now == *then) {
                None => Ok(()),
                Some(((client, _), _)) => bail!("the {client} client is not served"),
            }
        })
        .await
        .map(|_| ())
    }

    /// Waits until every writer has been acknowledged so many times more.
    pub async fn grows_by(&self, writes: usize, patience: Duration) -> anyhow::Result<()> {
        self.grows(|_| true, writes, patience).await
    }

    /// The same for one of them.
    pub async fn grows_of(&self, client: &str, writes: usize, patience: Duration) -> anyhow::Result<()> {
        self.grows(|one| one == client, writes, patience).await
    }

    async fn grows(
        &self,
        which: impl Fn(&str) -> bool,
        writes: usize,
        patience: Duration,
    ) -> anyhow::Result<()> {
        let chosen = || self.acknowledged.iter().filter(|(client, _)| which(client));
        let count = |n: &AtomicUsize| n.load(Ordering::Relaxed);
        let wanted: Vec<usize> = chosen().map(|(_, n)| count(n) + writes).collect();
        super::wait::until("more acknowledged writes", patience, || async {
            match chosen().zip(&wanted).find(|((_, n), wanted)| count(n) < **wanted) {
                None => Ok(()),
                Some(((client, n), wanted)) => bail!("the {client} client has {} of {wanted}", count(n)),
            }
        })
        .await
        .map(|_| ())
    }

    /// Stops the writers.
    pub fn finish(mut self) -> anyhow::Result<Vec<Log>> {
        self.stop.store(true, Ordering::Relaxed);
        let writers = std::mem::take(&mut self.writers);
        writers.into_iter().map(|w| w.join().map_err(|_| anyhow::anyhow!("a writer panicked"))).collect()
    }
}

async fn addresses(subject: &Subject) -> anyhow::Result<Vec<IpAddr>> {
    Ok(subject.members().await?.iter().filter_map(|m| m.address).collect())
}

/// Keeps the role client's list of members as a client that asks DNS would have it.
async fn follow_addresses(subject: Subject, members: Arc<Mutex<Vec<IpAddr>>>) {
    loop {
        if let Ok(found) = addresses(&subject).await
            && let Ok(mut list) = members.lock()
        {
            *list = found;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Whom a writer writes to.
pub enum Target {
    /// Whichever of these says that it is the primary.
    Members(Arc<Mutex<Vec<IpAddr>>>),
    /// One address, wherever it leads.
    Service(IpAddr),
    /// One member, whatever it is: a refusal is no reason to connect again.
    Member(IpAddr),
    /// One node of a Valkey Cluster while it says that it is a primary, by a client that reaches no other.
    PrimaryAt {
        /// Its address.
        member: IpAddr,
        /// Tag of the writer's key.
        tag: Tag,
    },
    /// Whoever serves the slot of the tag, by what these nodes of a Valkey Cluster say.
    Owner {
        /// Addresses to ask.
        members: Arc<Mutex<Vec<IpAddr>>>,
        /// Tag of the writer's key.
        tag: Tag,
    },
}

struct Writer {
    target: Target,
    reach: Reach,
    password: String,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicUsize>,
    log: Log,
}

impl Writer {
    fn run(mut self) -> Log {
        let mut connection = None;
        let mut id = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let Some(open) = connection.as_mut() else {
                connection = self.connect();
                std::thread::sleep(PACE);
                continue;
            };
            // A new number for each try: one that was not acknowledged may be there or not.
            id += 1;
            let reply = write(open, &self.log.key, id);
            let asked = reply.as_ref().ok().and_then(slots::asked);
            let reply = asked.map_or(reply, |other| self.write_there(other, id));
            match (reply, &self.target) {
                (Ok(Reply::Integer(1)), _) => {
                    self.log.acks.push(Ack { at: Instant::now(), id });
                    self.acknowledged.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(PACE);
                }
                (Ok(Reply::Error(_)), Target::Member(_)) => std::thread::sleep(PACE),
                (Ok(refused @ Reply::Error(_)), Target::Owner { .. }) => {
                    connection = slots::moved(&refused).and_then(|owner| self.open(owner));
                    std::thread::sleep(PACE);
                }
                (Ok(_) | Err(_), _) => connection = None,
            }
        }
        self.log
    }

    /// Only this write goes there: the key has left, its slot has not.
    fn write_there(&self, other: IpAddr, id: u64) -> io::Result<Reply> {
        let mut connection = self.open(other).ok_or(io::ErrorKind::NotConnected)?;
        connection.call(&["ASKING"])?;
        write(&mut connection, &self.log.key, id)
    }

    fn open(&self, address: IpAddr) -> Option<Connection> {
        let timeout = match self.reach {
            Reach::Direct => TIMEOUT_DIRECT,
            Reach::Through { .. } => TIMEOUT_THROUGH,
        };
        Connection::open(&self.reach, address, &self.password, timeout).ok()
    }

    fn open_primary(&self, address: IpAddr) -> Option<Connection> {
        let mut connection = self.open(address)?;
        (connection.role().ok()? == Role::Primary).then_some(connection)
    }

    fn connect(&self) -> Option<Connection> {
        match &self.target {
            Target::Service(address) | Target::Member(address) => self.open(*address),
            Target::Members(members) => {
                let members = members.lock().ok()?.clone();
                members.into_iter().find_map(|address| self.open_primary(address))
            }
            Target::PrimaryAt { member, tag: _ } => self.open_primary(*member),
            Target::Owner { members, tag } => {
                let members = members.lock().ok()?.clone();
                self.connect_to_owner(members, tag)
            }
        }
    }

    /// Asks one node after the other who serves the slot, until one that is named answers.
    fn connect_to_owner(&self, members: Vec<IpAddr>, tag: &Tag) -> Option<Connection> {
        let mut silent: Vec<IpAddr> = Vec::new();
        for address in members {
            let Some(runs) = self.open(address).and_then(|mut node| slots::runs(&mut node).ok()) else {
                continue;
            };
            let Some(owner) = slots::owner(&runs, tag.slot).filter(|owner| !silent.contains(owner)) else {
                continue;
            };
            match self.open(owner) {
                Some(connection) => return Some(connection),
                None => silent.push(owner),
            }
        }
        None
    }
}

fn write(connection: &mut Connection, key: &str, id: u64) -> io::Result<Reply> {
    connection.call(&["SADD", key, &id.to_string()])
}

/// Acknowledged writes that are not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loss {
    /// Acknowledged in all.
    pub acknowledged: usize,
    /// Lost ones that a replica must have had.
    pub lost: usize,
    /// Lost ones that were acknowledged within [`IN_FLIGHT`] before a fault.
    pub in_flight: usize,
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} acknowledged writes lost", self.lost, self.acknowledged)?;
        if self.in_flight > 0 {
            write!(f, " (and {} no replica had received)", self.in_flight)
        } else {
            Ok(())
        }
    }
}

/// What the load shows of a series of faults.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Longest gap between acknowledgements across each fault, of the client that asks for roles, in milliseconds.
    pub roles_ms: Vec<f64>,
    /// The same through the Service.
    pub service_ms: Vec<f64>,
    /// Of both writers.
    pub loss: Loss,
}

impl Figures {
    /// Reads everything back from the primary. Each outage is looked for between its fault and the next, which are in order.
    pub async fn of(subject: &Subject, logs: &[Log], faults: &[Instant]) -> anyhow::Result<Figures> {
        let mut figures = Figures::default();
        for log in logs {
            let kept = subject.set(&log.key, TIMEOUT_READ).await?;
            figures.add(log, &kept, faults)?;
        }
        Ok(figures)
    }

    /// Adds what one writer saw, given what is there.
    pub fn add(&mut self, log: &Log, kept: &HashSet<u64>, faults: &[Instant]) -> anyhow::Result<()> {
        self.add_loss(log, kept, faults);
        let gaps = faults.iter().enumerate().map(|(i, fault)| log.gap_ms(*fault, faults.get(i + 1).copied()));
        let gaps = gaps.collect::<anyhow::Result<Vec<f64>>>()?;
        if log.client == "roles" {
            self.roles_ms = gaps
        } else {
            self.service_ms = gaps
        }
        Ok(())
    }

    /// Adds what of one writer is not there. Only what may have been under way at one of these faults is excused.
    pub fn add_loss(&mut self, log: &Log, kept: &HashSet<u64>, faults: &[Instant]) {
        self.loss.acknowledged += log.acks.len();
        for ack in log.acks.iter().filter(|ack| !kept.contains(&ack.id)) {
            let excused = faults.iter().any(|fault| {
                let before = fault.checked_duration_since(ack.at).is_some_and(|d| d <= IN_FLIGHT);
                before || ack.at.checked_duration_since(*fault).is_some_and(|d| d <= READ_LATE)
            });
            if excused {
                self.loss.in_flight += 1
            } else {
                self.loss.lost += 1
            }
            if let (false, Some(fault)) = (excused, faults.first()) {
                let after_ms = ack.at.saturating_duration_since(*fault).as_millis();
                println!(
                    "     lost: write {} of {}, acknowledged {after_ms} ms after the fault",
                    ack.id, log.client
                );
            }
        }
    }

    /// Fails if a write was lost that a replica must have had.
    pub fn nothing_lost(&self) -> anyhow::Result<()> {
        if self.loss.lost > 0 { bail!("{}", self.loss) } else { Ok(()) }
    }

    /// Outages and losses in one line.
    pub fn line(&self) -> String {
        format!(
            "outage {} by roles, {} by Service; {}",
            spread(&self.roles_ms),
            spread(&self.service_ms),
            self.loss
        )
    }
}

/// Which writers were acknowledged, one after the other: each time another one was, there is an entry. Of writers that each write to
/// one member, two who accept writes at the same time make many.
pub fn turns(logs: &[Log]) -> Vec<(&'static str, Instant)> {
    let mut all: Vec<_> =
        logs.iter().flat_map(|log| log.acks.iter().map(|ack| (ack.at, log.client))).collect();
    all.sort_unstable();
    let mut turns: Vec<(&'static str, Instant)> = Vec::new();
    for (at, client) in all {
        if turns.last().is_none_or(|(last, _)| *last != client) {
            turns.push((client, at));
        }
    }
    turns
}

/// Median and maximum, or the one number.
pub fn spread(values: &[f64]) -> String {
    match values {
        [] => "-".to_owned(),
        [one] => format!("{one:.0} ms"),
        many => format!("{:.0} ms median, {:.0} ms maximum", median(many), maximum(many)),
    }
}

/// The middle value.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = |i: usize| sorted.get(i).copied().unwrap_or_default();
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        middle(half)
    } else {
        f64::midpoint(middle(half.saturating_sub(1)), middle(half))
    }
}

/// The greatest value.
pub fn maximum(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

impl Log {
    /// The first acknowledgement at or after a moment.
    pub fn first_since(&self, moment: Instant) -> Option<Instant> {
        self.acks.iter().map(|ack| ack.at).find(|at| *at >= moment)
    }

    /// When what is not there was acknowledged.
    pub fn missing(&self, kept: &HashSet<u64>) -> Vec<Instant> {
        self.acks.iter().filter(|ack| !kept.contains(&ack.id)).map(|ack| ack.at).collect()
    }

    /// The last acknowledgement.
    pub fn last(&self) -> Option<Instant> {
        self.acks.last().map(|ack| ack.at)
    }

    /// Longest time between two acknowledgements from `fault` on, as far as it had passed when `next` came: what the next fault makes of the
    /// gap that it falls into is not this one's.
    pub fn gap_ms(&self, fault: Instant, next: Option<Instant>) -> anyhow::Result<f64> {
        let last = self.acks.last().context("nothing was acknowledged")?;
        if last.at < fault {
            bail!("the {} client was not served after the fault", self.client);
        }
        let pairs = self.acks.iter().zip(self.acks.iter().skip(1));
        let after = pairs.map(|(a, b)| (a.at, b.at)).filter(|(_, end)| *end >= fault);
        let until_next =
            after.map(|(begin, end)| next.map_or(end, |next| end.min(next)).saturating_duration_since(begin));
        let longest = until_next.max().unwrap_or_default();
        Ok(longest.as_secs_f64() * 1000.0)
    }

    /// Acknowledged writes.
    pub fn count(&self) -> usize {
        self.acks.len()
    }
}

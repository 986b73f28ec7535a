//! The jobs of ../README.md through redis-rs.

mod library;

use anyhow::{Context, bail};
use futures_util::StreamExt;
use library::{Connection, Library, Request, kind};
use redis::{Client, RedisResult, cmd, pipe};
use serde::Serialize;
use std::{
    env,
    io::{self, BufWriter, Write},
    process,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant, UNIX_EPOCH},
};
use tokio::time::sleep;

const POOL_CLIENTS: u32 = 1_000;
const POOL_PERIOD: Duration = Duration::from_secs(5);
/// Longest wait for the first acknowledgements.
const READY_MAX: Duration = Duration::from_secs(60);

static ENDED: AtomicBool = AtomicBool::new(false);

fn ended() -> bool {
    ENDED.load(Ordering::Relaxed)
}

fn now_ms() -> u64 {
    UNIX_EPOCH.elapsed().map_or(0, millis)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What one task saw.
#[derive(Serialize)]
struct Log {
    library: String,
    job: &'static str,
    task: u32,
    key: Option<String>,
    period_ms: u64,
    ended_ms: u64,
    acks: Vec<(u64, u64)>,
    errors: Vec<(u64, String)>,
}

/// A task, and what it saw.
#[derive(Clone)]
struct Task {
    period: Duration,
    log: Arc<Mutex<Log>>,
}

impl Task {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ack(&self, number: u64) {
        self.log().acks.push((number, now_ms()));
    }

    fn error(&self, word: String) {
        self.log().errors.push((now_ms(), word));
    }

    /// Asks for a new number at each try, until the end.
    async fn repeat(self, mut connection: Connection, request: impl Fn(u64) -> Request) {
        for number in 1.. {
            if ended() {
                return;
            }
            match connection.ask::<()>(&request(number)).await {
                Ok(()) => self.ack(number),
                Err(error) => self.error(kind(&error)),
            }
            sleep(self.period).await;
        }
    }

    /// Notes the numbers of a list, until the end.
    async fn pop(self, mut connection: Connection, list: String) {
        let request = Request::One(cmd("BLPOP").arg(list).arg(1).take());
        while !ended() {
            match connection.ask::<Option<(String, u64)>>(&request).await {
                Ok(Some((_, number))) => self.ack(number),
                Ok(None) => {}
                Err(error) => {
                    self.error(kind(&error));
                    sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    /// Notes the numbers of a channel, until the end. A subscription ends with its connection.
    async fn listen(self, client: Client, channel: String) {
        while !ended() {
            let word = match self.receive(&client, &channel).await {
                Ok(()) => "EOF".to_owned(),
                Err(error) => kind(&error),
            };
            self.error(word);
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn receive(&self, client: &Client, channel: &str) -> RedisResult<()> {
        let mut subscription = client.get_async_pubsub().await?;
        subscription.subscribe(channel).await?;
        let mut messages = subscription.on_message();
        while let Some(message) = messages.next().await {
            self.ack(message.get_payload()?);
        }
        Ok(())
    }
}

/// The jobs at one address.
struct Work {
    name: String,
    library: Library,
    prefix: String,
    tasks: Vec<Task>,
}

fn add(key: &str, number: u64) -> Request {
    Request::One(cmd("SADD").arg(key).arg(number).take())
}

fn add_in_transaction(key: &str, number: u64) -> Request {
    let mut all = pipe();
    all.atomic().sadd(key, number).ignore().incr(format!("{key}:count"), 1).ignore();
    Request::Transaction(all)
}

impl Work {
    fn task(&mut self, job: &'static str, task: u32, key: Option<&str>, period: Duration) -> Task {
        let log = Log {
            library: self.name.clone(),
            job,
            task,
            key: key.map(str::to_owned),
            period_ms: millis(period),
            ended_ms: 0,
            acks: Vec::new(),
            errors: Vec::new(),
        };
        let task = Task { period, log: Arc::new(Mutex::new(log)) };
        self.tasks.push(task.clone());
        task
    }

    async fn begin(&mut self, job: &str) -> anyhow::Result<()> {
        match job {
            "write" => self.write("write", 6, add).await,
            "multi" => self.write("multi", 2, add_in_transaction).await,
            "subscriber" => self.subscriber().await,
            "blpop" => self.blpop().await,
            "pool" => self.pool().await,
            _ => bail!("{job}: no such job"),
        }
    }

    async fn write(
        &mut self,
        job: &'static str,
        tasks: u32,
        request: fn(&str, u64) -> Request,
    ) -> anyhow::Result<()> {
        let connection = self.library.open().await?;
        for number in 0..tasks {
            let key = format!("{}:{job}:{{{number}}}", self.prefix);
            let task = self.task(job, number, Some(&key), Duration::from_millis(10));
            tokio::spawn(task.repeat(connection.clone(), move |number| request(&key, number)));
        }
        Ok(())
    }

    async fn subscriber(&mut self) -> anyhow::Result<()> {
        let Library::Single(client) = &self.library else {
            // There it subscribes with RESP3 only, which is not what it speaks by default.
            return Ok(());
        };
        let (client, channel) = (client.clone(), format!("{}:channel", self.prefix));
        let publisher = self.library.open().await?;
        let received = self.task("subscriber", 0, None, Duration::from_millis(20));
        tokio::spawn(received.listen(client, channel.clone()));
        let published = self.task("publish", 0, None, Duration::from_millis(20));
        let publish = move |number: u64| Request::One(cmd("PUBLISH").arg(&channel).arg(number).take());
        tokio::spawn(published.repeat(publisher, publish));
        Ok(())
    }

    async fn blpop(&mut self) -> anyhow::Result<()> {
        // A connection that waits can do nothing else.
        let (waiting, pushing) = (self.library.open().await?, self.library.open().await?);
        let list = format!("{}:list", self.prefix);
        let popped = self.task("blpop", 0, None, Duration::from_millis(20));
        tokio::spawn(popped.pop(waiting, list.clone()));
        let pushed = self.task("push", 0, None, Duration::from_millis(20));
        let push = move |number: u64| Request::One(cmd("RPUSH").arg(&list).arg(number).take());
        tokio::spawn(pushed.repeat(pushing, push));
        Ok(())
    }

    async fn pool(&mut self) -> anyhow::Result<()> {
        for number in 0..POOL_CLIENTS {
            let connection = self.library.open().await?;
            let key = format!("{}:pool:{number}", self.prefix);
            let task = self.task("pool", number, Some(&key), POOL_PERIOD);
            tokio::spawn(async move {
                // Not all at once.
                sleep(number * POOL_PERIOD / POOL_CLIENTS).await;
                task.repeat(connection, |number| add(&key, number)).await;
            });
        }
        Ok(())
    }

    fn ready(&self) -> bool {
        self.tasks.iter().all(|task| !task.log().acks.is_empty())
    }

    fn tell(&self, at: u64) -> anyhow::Result<()> {
        let mut out = BufWriter::new(io::stdout().lock());
        for task in &self.tasks {
            let mut log = task.log();
            log.ended_ms = at;
            serde_json::to_writer(&mut out, &*log)?;
            writeln!(out)?;
        }
        Ok(out.flush()?)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [library, topology, address, seconds, run, jobs] = arguments.as_slice() else {
        bail!("expected LIBRARY TOPOLOGY HOST:PORT SECONDS RUN JOBS");
    };
    if library != "redis-rs" {
        bail!("{library}: no such library");
    }
    let (begun, longest) = (Instant::now(), Duration::from_secs(seconds.parse()?));
    thread::spawn(|| {
        // An error is an end, too.
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        ENDED.store(true, Ordering::Relaxed);
    });
    let password = env::var("VALKEY_PASSWORD").context("VALKEY_PASSWORD")?;
    let mut work = Work {
        name: library.clone(),
        library: Library::new(topology == "Cluster", address, &password)?,
        prefix: format!("{run}:{library}"),
        tasks: Vec::new(),
    };
    for job in jobs.split(',') {
        work.begin(job).await?;
    }
    while !work.ready() && begun.elapsed() < READY_MAX && !ended() {
        sleep(Duration::from_millis(50)).await;
    }
    println!("{{\"ready\":{}}}", work.ready());
    while begun.elapsed() < longest && !ended() {
        sleep(Duration::from_millis(20)).await;
    }
    let at = now_ms();
    ENDED.store(true, Ordering::Relaxed);
    work.tell(at)?;
    // A name that is being looked up would keep the process.
    process::exit(0)
}

//! The demo: from an empty cluster to a failover under load and its audit, in a few minutes, with a line for each step.
//! `make demo` prepares everything and starts it inside the cluster's network.

#[path = "../../tests/e2e/support/mod.rs"]
mod support;

use anyhow::{Context, bail};
use kube::ResourceExt;
use serde_json::Value;
use std::{
    process::ExitCode,
    sync::Mutex,
    time::{Duration, Instant},
};
use support::{
    Place,
    journal::Journal,
    load::{Figures, Load, spread},
    operator::{self, Operator},
    process::kill_server,
    resp::Reach,
    subject::{PATIENCE, Subject},
    tunnel,
    wait::until,
};
use valkeeper::api::v1alpha1::ValkeyCluster;

/// The resource that is applied.
const SAMPLE: &str = include_str!("orders.yaml");
/// Writes of each client before and after something is done to the cluster: two seconds at least, since kube-proxy makes a
/// change wait that comes within a second after another, and the start of the members is one.
const LOAD_WRITES_MIN: usize = 2_000;

#[tokio::main]
async fn main() -> ExitCode {
    let demo = Demo { begun: Instant::now() };
    match demo.run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            demo.say(&format!("failed: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

struct Demo {
    begun: Instant,
}

impl Demo {
    fn say(&self, text: &str) {
        println!("{:6.1} s  {text}", self.begun.elapsed().as_secs_f64());
    }

    async fn run(&self) -> anyhow::Result<()> {
        let place = Place::of_environment()?;
        let client = support::client().await?;
        self.say("installing charts/valkeeper");
        let operator = Operator::install(&client, place).await?;
        let sample: Value = serde_saphyr::from_str(SAMPLE).context("orders.yaml")?;
        let text = |path: &str| {
            sample.pointer(path).and_then(Value::as_str).map(str::to_owned).context("orders.yaml")
        };
        let (namespace, name) = (text("/metadata/namespace")?, text("/metadata/name")?);
        support::restricted_namespace(&client, &namespace).await?;
        let reach = match place {
            Place::Local => Reach::Direct,
            Place::Existing => tunnel::open(&client, &namespace).await?,
        };
        let subject = Subject { client, namespace, name, reach, place };
        self.say("the operator runs; applying examples/demo/orders.yaml");
        subject.apply(sample.get("spec").context("orders.yaml")?).await?;
        self.watch_progress(&subject).await?;
        self.lose_primary(&subject).await?;
        self.lose_operator(&subject, &operator).await?;
        self.ask_journal(&subject).await?;
        if std::env::var("DEMO_KEEP").as_deref() == Ok("0") {
            self.clean_up(&subject).await
        } else {
            self.go_on(&subject).await
        }
    }

    /// A line whenever the status says something new, until it says Ready.
    async fn watch_progress(&self, subject: &Subject) -> anyhow::Result<()> {
        let said = Mutex::new(String::new());
        until("the cluster to be Ready", PATIENCE, || async {
            let (ready, now) = progress(&subject.get().await?);
            if let Ok(mut said) = said.lock()
                && *said != now
            {
                self.say(&now);
                said.clone_from(&now);
            }
            if ready { Ok(()) } else { bail!("{now}") }
        })
        .await
        .map(|_| ())
    }

    /// Kills the primary under load and says how long writes failed.
    async fn lose_primary(&self, subject: &Subject) -> anyhow::Result<()> {
        let primary = subject.protected(Duration::from_secs(60)).await?;
        let load = Load::start(subject).await?;
        load.grows_by(LOAD_WRITES_MIN, Duration::from_secs(120)).await?;
        self.say(&format!("two clients write; SIGKILL to valkey-server of the primary, {}", primary.name));
        let fault = kill_server(subject.place, &subject.namespace, &primary)?;
        load.flows(Duration::from_secs(60)).await?;
        load.grows_by(LOAD_WRITES_MIN, Duration::from_secs(120)).await?;
        let now = subject.protected(Duration::from_secs(60)).await?;
        self.say(&format!("the primary is {}", now.name));
        let figures = Figures::of(subject, &load.finish()?, &[fault]).await?;
        self.say(&format!("write outage: {} for a client that asks for roles", spread(&figures.roles_ms)));
        self.say(&format!(
            "write outage: {} through the Service {}-primary",
            spread(&figures.service_ms),
            subject.name
        ));
        self.say(&figures.loss.to_string());
        figures.nothing_lost()
    }

    /// Takes the operator away and brings it back: clients notice nothing.
    async fn lose_operator(&self, subject: &Subject, operator: &Operator) -> anyhow::Result<()> {
        subject.ready().await?;
        let load = Load::start(subject).await?;
        let away = Instant::now();
        operator.scale(0).await?;
        self.say("the operator is scaled to zero; writes go on");
        load.grows_by(LOAD_WRITES_MIN, Duration::from_secs(120)).await?;
        let epoch = epoch(subject).await?;
        operator.scale(1).await?;
        until("the operator to take up the journal", PATIENCE, || async {
            let now = self::epoch(subject).await?;
            if now > epoch { Ok(()) } else { bail!("its epoch is still {now}") }
        })
        .await?;
        subject.ready().await?;
        load.flows(Duration::from_secs(30)).await?;
        let figures = Figures::of(subject, &load.finish()?, &[away]).await?;
        self.say(&format!("the operator is back and has taken up the journal; {}", figures.line()));
        figures.nothing_lost()
    }

    async fn ask_journal(&self, subject: &Subject) -> anyhow::Result<()> {
        let journal = Journal::of(subject).await?;
        for verb in [&["audit", "failover"][..], &["verify"]] {
            self.say(&format!("valkeeper-replay {}", verb.join(" ")));
            for line in journal.ask(verb)?.lines() {
                println!("          {line}");
            }
        }
        Ok(())
    }

    async fn clean_up(&self, subject: &Subject) -> anyhow::Result<()> {
        subject.delete().await?;
        until("its end", Duration::from_secs(120), || async {
            if subject.exists().await? || !subject.members().await?.is_empty() {
                bail!("pods are left")
            } else {
                Ok(())
            }
        })
        .await?;
        subject.delete_claims().await?;
        support::delete_namespace(&subject.client, &subject.namespace).await?;
        Operator::uninstall()?;
        self.say("everything is removed again (DEMO_KEEP=0)");
        Ok(())
    }

    async fn go_on(&self, subject: &Subject) -> anyhow::Result<()> {
        let uid = subject.get().await?.uid().context("a resource without UID")?;
        let Subject { client: _, namespace, name, reach: _, place } = subject;
        let (kubectl, down) = match place {
            Place::Local => {
                ("tests/cluster/cluster kubectl", "\nTo remove the cluster:\n  make cluster-down")
            }
            Place::Existing => ("kubectl", ""),
        };
        self.say("done; the cluster stays as it is");
        let kubeconfig = std::env::var("KUBECONFIG").unwrap_or_default();
        let journals =
            format!("{kubectl} get cm -n {} -l valkeeper.io/journal={uid} -o json", operator::NAMESPACE);
        let replay = "target/release/valkeeper-replay";
        println!(
            "\nKUBECONFIG is {kubeconfig}\nTo go on:\n  {kubectl} get valkeyclusters -A\n  \
             {kubectl} describe valkeycluster -n {namespace} {name}\n  \
             {kubectl} delete pod -n {namespace} -l valkeeper.io/role=primary\n  \
             {journals} | {replay} log -n 30\n  \
             {journals} | {replay} audit failover{down}"
        );
        Ok(())
    }
}

/// Whether it is Ready, and what to say about it.
fn progress(cluster: &ValkeyCluster) -> (bool, String) {
    let status = cluster.status.clone().unwrap_or_default();
    let condition = status.conditions.iter().find(|c| c.type_ == "Ready");
    let observed = status.observed_generation == cluster.metadata.generation;
    match condition {
        Some(c) if c.status == "True" && observed => {
            (true, format!("Ready: {} members, primary {}", status.ready, status.primary))
        }
        Some(c) => (false, format!("members {}: {}: {}", status.ready, c.reason, c.message)),
        None => (false, "waiting for the operator to look".to_owned()),
    }
}

async fn epoch(subject: &Subject) -> anyhow::Result<i64> {
    let status = subject.get().await?.status.unwrap_or_default();
    Ok(status.journal.context("no place in the journal")?.epoch)
}

//! A user writes to a journal: what is noticed, what is said, and what goes on. A label is nothing; an edited record, an earlier copy
//! and a missing head stop the operator for this cluster, and the members go on by themselves.

use super::World;
use crate::support::{
    audit_log::AuditLog,
    journal::{self, Journal, claims, number, one_writer_at_a_time},
    load::{Figures, Load},
    operator,
    subject::{Member, PATIENCE},
    wait::until,
};
use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions},
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use valkeeper::api::v1alpha1::ACCEPT_LOSS;

/// Until a primary has a replica in sync again.
const SETTLED_MAX: Duration = Duration::from_secs(120);
/// How long an operator that has stopped for a journal is watched: its task begins anew after 10 s.
const HELD: Duration = Duration::from_secs(12);
/// The same where that has been seen: a few of its turns.
const STILL: Duration = Duration::from_secs(3);

/// What is done to the journal, one after the other.
pub async fn by_a_user(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    subject.protected(SETTLED_MAX).await?;
    let uid = subject.get().await?.uid().context("no UID")?;
    let desk = Desk { world, audit: world.audit.as_ref().context("no audit log")?, uid: &uid };
    let load = Load::start(subject).await?;
    let begun = Instant::now();
    let mut told = vec![desk.labelled().await.context("labelled")?];
    told.push(desk.edited().await.context("edited")?);
    told.push(desk.rolled_back().await.context("rolled back")?);
    told.push(desk.head_deleted().await.context("head deleted")?);
    told.push(desk.all_deleted().await.context("all deleted")?);
    let figures = Figures::of(subject, &load.finish()?, &[begun]).await?;
    figures.nothing_lost()?;
    told.push(figures.loss.to_string());
    Ok(told.join("; "))
}

/// Someone with the right to write ConfigMaps.
struct Desk<'a> {
    world: &'a World,
    audit: &'a AuditLog,
    uid: &'a str,
}

impl Desk<'_> {
    /// Another's label on the head: the next record is written all the same.
    async fn labelled(&self) -> anyhow::Result<String> {
        let before = self.epoch().await?;
        let patch = Patch::Merge(json!({ "metadata": { "labels": { "example.com/team": "a" } } }));
        let maps = journal::maps(&self.world.client);
        maps.patch(&journal::head_name(self.uid), &PatchParams::default(), &patch).await?;
        let wished = self.wish("labelled").await?;
        self.fulfilled(&wished).await?;
        let after = self.epoch().await?;
        if after != before {
            bail!("a label made the operator begin anew: epoch {before}, then {after}");
        }
        self.intact().await?;
        Ok("label: no stop".to_owned())
    }

    /// One byte of one record: no effects, and the record is named.
    async fn edited(&self) -> anyhow::Result<String> {
        let client = &self.world.client;
        let right = journal::edit_head(client, self.uid, other_byte).await?;
        let seq = last_seq(&right)?;
        let said = self.stops("edited", &format!("record {seq}"), HELD).await?;
        let renewed = self.renews_certificates().await?;
        journal::overwrite_head(client, self.uid, &right).await?;
        self.healed().await?;
        Ok(format!("edit: {said:?}, certificates renewed meanwhile after {:.1} s", renewed.as_secs_f64()))
    }

    /// Certificates that are due are renewed, whatever has become of the journal. Here all are, as their authority is another.
    async fn renews_certificates(&self) -> anyhow::Result<Duration> {
        let (client, subject) = (&self.world.client, &self.world.subject);
        let of = |namespace| Api::<Secret>::namespaced(client.clone(), namespace);
        let (ours, identity) = (of(&subject.namespace), format!("{}-identity-0", subject.name));
        let before = ours.get(&identity).await?.data;
        let authority = format!("valkeeper-pki-{}", self.uid);
        of(operator::NAMESPACE).delete(&authority, &DeleteParams::default()).await?;
        let renewed = until("the members' certificates to be renewed", PATIENCE, || async {
            if ours.get(&identity).await?.data == before { bail!("they are as they were") } else { Ok(()) }
        });
        Ok(renewed.await?.1)
    }

    /// Yesterday's content.
    async fn rolled_back(&self) -> anyhow::Result<String> {
        let (client, subject) = (&self.world.client, &self.world.subject);
        let earlier = journal::head(client, self.uid).await?;
        let behind = last_seq(&earlier)?;
        let wished = self.wish("before-the-rollback").await?;
        self.fulfilled(&wished).await?;
        // The status is written lazily, and is what shows that something is missing.
        until("the status to show what was recorded", SETTLED_MAX, || async {
            let status = subject.get().await?.status.unwrap_or_default();
            let shown = status.journal.context("no place in the journal")?.seq;
            if shown > behind { Ok(()) } else { bail!("it shows {shown}") }
        })
        .await?;
        let ahead = last_seq(&journal::head(client, self.uid).await?)?;
        if ahead <= behind {
            bail!("nothing was recorded between {behind} and {ahead}");
        }
        journal::overwrite_head(client, self.uid, &earlier).await?;
        // What the running writer meets, and what whoever opens it anew does.
        let met = self.says("rolled-back", &behind.to_string()).await?;
        let said = self.refuses(&met, &behind.to_string()).await?;
        // The newer copy is lost: a person accepts that, and what was there is kept aside.
        let lost = self.accept().await?;
        Ok(format!("rollback from {ahead} to {behind}: {met:?}, {said:?}, accepted up to {lost}"))
    }

    /// The head alone: its segments show that it was there.
    async fn head_deleted(&self) -> anyhow::Result<String> {
        let maps = journal::maps(&self.world.client);
        let name = journal::head_name(self.uid);
        let (mut head, _) = until("the head to be deleted as it was read", SETTLED_MAX, || async {
            let head: ConfigMap = maps.get(&name).await?;
            let as_read = DeleteParams::default().preconditions(Preconditions {
                resource_version: head.metadata.resource_version.clone(),
                uid: None,
            });
            maps.delete(&name, &as_read).await?;
            Ok(head)
        })
        .await?;
        let said = self.stops("head-deleted", "", STILL).await?;
        head.metadata.resource_version = None;
        head.metadata.uid = None;
        maps.create(&PostParams::default(), &head).await?;
        self.healed().await?;
        Ok(format!("head deleted: {said:?}"))
    }

    /// Everything: refused as well, and once a person accepts it, history begins anew, above what the agents know.
    async fn all_deleted(&self) -> anyhow::Result<String> {
        let maps = journal::maps(&self.world.client);
        let before = self.epoch().await?;
        let label = format!("valkeeper.io/journal={}", self.uid);
        maps.delete_collection(&DeleteParams::default(), &ListParams::default().labels(&label)).await?;
        let met = self.says("all-deleted", "the stream is empty").await?;
        let said = self.refuses(&met, "acknowledged records are missing").await?;
        let lost = self.accept().await?;
        let after = self.epoch().await?;
        if after <= before {
            bail!("epoch {after} after {before}: the agents would refuse it");
        }
        let words = format!("{met:?}, {said:?}, accepted up to {lost}");
        Ok(format!("everything deleted: {words}, then adopted with epoch {after} after {before}"))
    }

    /// Asks for something that has to be recorded: the promotion of a replica.
    async fn wish(&self, token: &str) -> anyhow::Result<Member> {
        let subject = &self.world.subject;
        let primary = subject.protected(SETTLED_MAX).await?;
        let mut others = subject.members().await?.into_iter().filter(|m| m.name != primary.name);
        let wished = others.next().context("no replica")?;
        let member = wished.name.strip_prefix(&format!("{}-", subject.name)).context("no such member")?;
        subject.annotate("valkeeper.io/switchover", &format!("{member}@{token}")).await?;
        Ok(wished)
    }

    async fn fulfilled(&self, wished: &Member) -> anyhow::Result<()> {
        let subject = &self.world.subject;
        until(&format!("{} to be primary", wished.name), SETTLED_MAX, || async {
            let now = subject.primary().await?;
            if now.name == wished.name { Ok(()) } else { bail!("it is {}", now.name) }
        })
        .await?;
        subject.ready().await.map(|_| ())
    }

    /// The operator finds out with its next record, and says so. Its words.
    async fn says(&self, token: &str, named: &str) -> anyhow::Result<String> {
        self.wish(token).await?;
        let (condition, _) = self.world.subject.condition("JournalIntact", "False", PATIENCE).await?;
        if condition.reason != "JournalBroken" || !condition.message.contains(named) {
            bail!("{}: {:?} does not name {named:?}", condition.reason, condition.message);
        }
        Ok(condition.message)
    }

    /// It says so and does nothing.
    async fn stops(&self, token: &str, named: &str, how_long: Duration) -> anyhow::Result<String> {
        let said = self.says(token, named).await?;
        self.stands_still(how_long).await?;
        Ok(said)
    }

    /// Whoever opens the journal anew says what it lacks, and does nothing.
    async fn refuses(&self, met: &str, named: &str) -> anyhow::Result<String> {
        let found = until("the operator to refuse the journal", PATIENCE, || async {
            let (condition, _) = self.world.subject.condition("JournalIntact", "False", PATIENCE).await?;
            let said = condition.message;
            if said != met && said.contains(named) { Ok(said) } else { bail!("it says {said:?}") }
        });
        let said = found.await?.0;
        self.stands_still(STILL).await?;
        Ok(said)
    }

    /// Nothing is done, however often its task begins anew; clients notice nothing.
    async fn stands_still(&self, how_long: Duration) -> anyhow::Result<()> {
        let subject = &self.world.subject;
        let (primary, since) = (subject.primary().await?, self.audit.end()?);
        tokio::time::sleep(how_long).await;
        let tells = |what: &str| what.ends_with(" status") || what.contains(" events/");
        let asked = self.audit.asked_since(since)?;
        if let Some(done) = asked.iter().find(|a| a.is_done() && !a.is_lease && !tells(&a.what)) {
            bail!("it does not stand still: {done:?}");
        }
        let now = subject.primary().await?;
        if now.name != primary.name {
            bail!("{} is primary in the place of {}", now.name, primary.name);
        }
        Ok(())
    }

    /// A person accepts that records are gone; the next claim says so. Up to which record.
    async fn accept(&self) -> anyhow::Result<i64> {
        let subject = &self.world.subject;
        let status = subject.get().await?.status.unwrap_or_default();
        let place = status.journal.context("no place in the journal")?;
        let lost = place.seq;
        subject.annotate(ACCEPT_LOSS, &place.hash).await?;
        self.healed().await?;
        let records = Journal::of_uid(&self.world.client, self.uid).await?.records()?;
        let lost_through = |record: &Value| record.pointer("/event/EpochStarted/lost_through")?.as_i64();
        // The store may have traces of more than the status had said.
        let says = |record: &Value| lost_through(record).is_some_and(|through| through >= lost);
        if records.iter().any(says) {
            Ok(lost)
        } else {
            bail!("no claim says that records up to {lost} are lost")
        }
    }

    /// What was wished is done, now that someone has put the journal back.
    async fn healed(&self) -> anyhow::Result<()> {
        // Its task looks again within a minute; one that begins looks at once.
        self.world.operator.scale(0).await?;
        self.world.operator.scale(1).await?;
        self.goes_on().await
    }

    async fn goes_on(&self) -> anyhow::Result<()> {
        let subject = &self.world.subject;
        subject.condition("JournalIntact", "True", PATIENCE).await?;
        subject.ready().await?;
        self.intact().await
    }

    async fn intact(&self) -> anyhow::Result<()> {
        let journal = Journal::of_uid(&self.world.client, self.uid).await?;
        journal.holds()?;
        one_writer_at_a_time(&journal.records()?)
    }

    async fn epoch(&self) -> anyhow::Result<i64> {
        let records = Journal::of_uid(&self.world.client, self.uid).await?.records()?;
        Ok(claims(&records).pop().context("nobody claimed it")?.0)
    }
}

/// One byte of the newest record's event is another.
fn other_byte(text: &str) -> anyhow::Result<String> {
    let (before, line) = text.trim_end().rsplit_once('\n').context("one line")?;
    let (envelope, event) = line.split_once("\"event\":{\"").context("no event")?;
    let first = event.chars().next().context("an empty event")?;
    let other = if first == 'X' { 'Y' } else { 'X' };
    let edited = event.replacen(first, &other.to_string(), 1);
    Ok(format!("{before}\n{envelope}\"event\":{{\"{edited}\n"))
}

fn last_seq(text: &str) -> anyhow::Result<i64> {
    journal::records_in(text)?.last().map(|record| number(record, "seq")).context("an empty tail")
}

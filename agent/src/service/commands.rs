//! What the operator tells.

mod nodes;
mod settings;

use super::{caller, malformed, unchanged};
use crate::{
    local::{self, Look},
    shared::Agent,
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use tonic::{Request, Response, Status};
use valkeeper_agent::{proto, tls::Peer, wire};
use valkeeper_core::{
    agent::{Ledger, Refusal},
    ids::{NodeId, WriterEpoch},
    info::{Info, RawRole, RawSource},
    observation::{Gate, Link},
    spec::Topology,
};

/// Bound on the end of a killed process: a kernel that writes out its memory on a slow disk.
const FENCE_TIMEOUT: Duration = Duration::from_secs(5);
/// A promotion that has waited for so long, for a slow disk or another command, is not begun: who asked for it gives
/// it up after 2 s, and may have chosen another member.
const PROMOTE_LATE: Duration = Duration::from_secs(2);
/// A demotion that has waited for so long is not begun: who asked for it gives it up after 2 s, and takes it for not done.
const DEMOTE_LATE: Duration = Duration::from_millis(1_500);
/// Longest host:port that is understood: a DNS name and a port.
const ADDRESS_CHARS_MAX: usize = 260;

/// The service.
#[derive(Clone)]
pub struct Commands(pub Arc<Agent>);

type Answer<T> = Result<Response<T>, Status>;

/// Whom a server shall follow.
#[derive(Debug)]
enum Target {
    Address(RawSource),
    Node(NodeId),
}

fn address(host: String, port: u32) -> Result<RawSource, Status> {
    let port = u16::try_from(port).map_err(|_| malformed(wire::Malformed("port")))?;
    if host.len() > ADDRESS_CHARS_MAX || host.is_empty() || port == 0 {
        return Err(malformed(wire::Malformed("host")));
    }
    Ok(RawSource { host, port })
}

fn superseded(why: impl Into<String>) -> Status {
    Status::failed_precondition(why.into())
}

fn failed(error: &local::Error) -> Status {
    match error {
        local::Error::Silent => Status::deadline_exceeded(error.to_string()),
        local::Error::Lost(_) => Status::unavailable(error.to_string()),
        local::Error::Users(_) => Status::internal(error.to_string()),
        local::Error::Refused(_)
        | local::Error::Garbled(_)
        | local::Error::Nodes(_)
        | local::Error::Unverified(_) => Status::unknown(error.to_string()),
    }
}

impl Commands {
    fn done(&self) -> Answer<proto::Done> {
        Ok(Response::new(proto::Done { state: Some(self.0.state()) }))
    }

    fn from_operator<T>(request: Request<T>) -> Result<T, Status> {
        match caller(&request)? {
            Peer::Operator(_) => Ok(request.into_inner()),
            Peer::Member { .. } => Err(Status::permission_denied("for the operator only")),
        }
    }

    /// Changes the ledger by what a writer of `epoch` says, if no later one has spoken.
    async fn obey<T>(
        &self,
        epoch: u64,
        rule: impl FnOnce(&mut Ledger) -> Result<T, Refusal>,
    ) -> Result<T, Status> {
        let epoch = WriterEpoch(epoch);
        // The epoch counts even if the rest is refused: who speaks, speaks.
        self.0.write(|ledger| ledger.obey(epoch)).await.map_err(unchanged)?;
        self.0.heard();
        let both = |ledger: &mut Ledger| {
            ledger.obey(epoch)?;
            rule(ledger)
        };
        self.0.write(both).await.map_err(unchanged)
    }

    /// How long ago a holder was confirmed here, of whatever grant: the present holder may have had a lower one then. What was before
    /// this agent's start it does not remember.
    fn confirmed_ago_ms(&self) -> i64 {
        self.0.read(|known| {
            let now = self.0.at(Instant::now());
            // A holder that may write confirms itself.
            let own = known.held.as_ref().filter(|held| held.may_write(now)).map(|_| 0);
            let ago = |at: Instant| i64::try_from(at.elapsed().as_millis()).unwrap_or(i64::MAX);
            let confirmed = known.confirmed.map(ago);
            own.or(confirmed).unwrap_or_else(|| ago(self.0.started))
        })
    }

    /// The server, if it is the process that the operator means.
    async fn checked(&self, run_id: &str) -> Result<Look, Status> {
        let look = self.0.local.look().await;
        let look = look.map_err(|error| superseded(format!("could not check the server: {error}")))?;
        if look.info.run_id != run_id {
            return Err(superseded(format!("it is another process: {}, not {run_id}", look.info.run_id)));
        }
        Ok(look)
    }

    fn promotable(info: &Info, replid: &str, offset: i64) -> Result<(), Status> {
        match &info.role {
            RawRole::Primary => return Err(superseded("it is a primary already")),
            RawRole::Replica { source: _, link: Link::Syncing } => {
                return Err(superseded("it is being synchronised and has no complete data set"));
            }
            RawRole::Replica { source: _, link: Link::Up | Link::Down } => {}
        }
        if info.loading {
            return Err(superseded("it is loading its data set"));
        }
        if info.replid.0 != replid {
            return Err(superseded(format!("it is on history {}, not {replid}", info.replid)));
        }
        if info.offset < offset {
            return Err(superseded(format!("it is at offset {}, not at {offset}", info.offset)));
        }
        Ok(())
    }

    async fn promote_whole(&self, request: Request<proto::PromoteRequest>) -> Answer<proto::Done> {
        let spoken = Instant::now();
        let proto::PromoteRequest { epoch, brief, run_id, replid, offset, consents, by } =
            Self::from_operator(request)?;
        let by = proto::Promotion::try_from(by).map_err(|_| malformed(wire::Malformed("by")))?;
        let brief = wire::brief(brief).map_err(malformed)?;
        if brief.holder != Some(self.0.me()) {
            return Err(superseded("the grant is another member's"));
        }
        self.obey(epoch, |_| Ok(())).await?;
        let _acting = self.0.acting.lock().await;
        let Look { info, nodes: known, .. } = self.checked(&run_id).await?;
        Self::promotable(&info, &replid, offset)?;
        nodes::is_so(by, known.as_ref())?;
        let accept = |ledger: &mut Ledger| {
            ledger.accept(&brief, consents)?;
            (ledger.left, ledger.blank) = (None, false);
            Ok(())
        };
        self.obey(epoch, accept).await?;
        if spoken.elapsed() >= PROMOTE_LATE {
            return Err(superseded("it is too late: another may have been chosen"));
        }
        self.0.promote(spoken, &run_id, by).await.map_err(|error| failed(&error))?;
        self.0.update(|known| known.gate = Gate::Commanded);
        tracing::info!(grant = brief.grant.0, "the server is primary");
        self.done()
    }

    async fn attach_whole(&self, request: Request<proto::AttachRequest>) -> Answer<proto::Done> {
        let proto::AttachRequest { epoch, brief, run_id, host, port, node_id } =
            Self::from_operator(request)?;
        let brief = wire::brief(brief).map_err(malformed)?;
        let node = wire::node_or_none(&node_id, "node_id").map_err(malformed)?;
        let to = match node {
            Some(node) => Target::Node(node),
            // Its server would refuse an address, after its port was closed for that.
            None if self.0.config.topology == Topology::Cluster => {
                return Err(malformed(wire::Malformed("node_id")));
            }
            None => Target::Address(address(host, port)?),
        };
        let asked = Instant::now();
        self.obey(epoch, |_| Ok(())).await?;
        let _acting = self.0.acting.lock().await;
        let was_primary = self.checked(&run_id).await?.info.role == RawRole::Primary;
        if was_primary && asked.elapsed() >= DEMOTE_LATE {
            return Err(superseded("it is too late: paused writes may have gone on"));
        }
        // Giving something up needs no memory of it first, and a handover waits for this: both at once, if the rule allows it.
        // What the server left is of no use once it has left the gate.
        let rule = |ledger: &mut Ledger| {
            ledger.learn(&brief)?;
            ledger.left = None;
            Ok(())
        };
        rule(&mut self.0.read(|known| known.ledger.clone()))
            .map_err(|refusal: Refusal| unchanged(refusal.into()))?;
        let attached = async {
            match &to {
                Target::Node(node) => self.0.local.replicate(&run_id, node).await,
                Target::Address(source) => self.0.follow(&run_id, was_primary, source).await,
            }
        };
        let (remembered, look) = tokio::join!(self.obey(epoch, rule), attached);
        let look = look.map_err(|error| failed(&error))?;
        remembered?;
        self.0.seen(look);
        self.0.update(|known| known.gate = Gate::Commanded);
        self.0.settle_port().await;
        self.0.confirm_now.notify_one();
        tracing::info!(?to, "the server follows");
        self.done()
    }
}

/// Does it to its end: a caller that gives up must not stop a command half-way.
async fn whole<T: Send + 'static>(done: impl Future<Output = Answer<T>> + Send + 'static) -> Answer<T> {
    tokio::spawn(done).await.unwrap_or_else(|_| Err(Status::internal("the command was not finished")))
}

#[tonic::async_trait]
impl proto::agent_server::Agent for Commands {
    async fn greet(&self, request: Request<proto::GreetRequest>) -> Answer<proto::AgentState> {
        let proto::GreetRequest { epoch, news_address } = Self::from_operator(request)?;
        if news_address.len() > ADDRESS_CHARS_MAX {
            return Err(malformed(wire::Malformed("news_address")));
        }
        self.obey(epoch, |_| Ok(())).await?;
        if !news_address.is_empty() {
            self.0.update(|known| known.news_address = Some(news_address));
        }
        // The operator judges by what comes back: the server as it is, not as it was half a second ago.
        self.0.look_now.notify_one();
        Ok(Response::new(self.0.state()))
    }

    async fn tell(&self, request: Request<proto::TellRequest>) -> Answer<proto::Done> {
        let proto::TellRequest { epoch, brief } = Self::from_operator(request)?;
        let brief = wire::brief(brief).map_err(malformed)?;
        let spoken = Instant::now();
        self.obey(epoch, |ledger| ledger.learn(&brief)).await?;
        self.0.told(spoken);
        self.done()
    }

    async fn promise(&self, request: Request<proto::PromiseRequest>) -> Answer<proto::Done> {
        let proto::PromiseRequest { epoch, brief } = Self::from_operator(request)?;
        let brief = wire::brief(brief).map_err(malformed)?;
        // Within the rule, so that nobody is confirmed between the look and the promise.
        let rule = |ledger: &mut Ledger| ledger.promise(&brief, self.confirmed_ago_ms());
        let spoken = Instant::now();
        self.obey(epoch, rule).await?;
        self.0.told(spoken);
        self.done()
    }

    async fn promote(&self, request: Request<proto::PromoteRequest>) -> Answer<proto::Done> {
        let all = self.clone();
        whole(async move { all.promote_whole(request).await }).await
    }

    async fn attach(&self, request: Request<proto::AttachRequest>) -> Answer<proto::Done> {
        let all = self.clone();
        whole(async move { all.attach_whole(request).await }).await
    }

    async fn pause(&self, request: Request<proto::PauseRequest>) -> Answer<proto::PauseReply> {
        let proto::PauseRequest { epoch, run_id, timeout_ms } = Self::from_operator(request)?;
        self.obey(epoch, |_| Ok(())).await?;
        let _acting = self.0.acting.lock().await;
        if self.checked(&run_id).await?.info.role != RawRole::Primary {
            return Err(superseded("it is not a primary any more"));
        }
        self.0.local.pause(timeout_ms).await.map_err(|error| failed(&error))?;
        let info = self.0.local.look().await.map_err(|error| failed(&error))?.info;
        Ok(Response::new(proto::PauseReply {
            replid: info.replid.0,
            offset: info.offset,
            state: Some(self.0.state()),
        }))
    }

    async fn resume(&self, request: Request<proto::ServerRequest>) -> Answer<proto::Done> {
        let proto::ServerRequest { epoch, run_id } = Self::from_operator(request)?;
        self.obey(epoch, |_| Ok(())).await?;
        let _acting = self.0.acting.lock().await;
        self.checked(&run_id).await?;
        self.0.local.unpause().await.map_err(|error| failed(&error))?;
        self.done()
    }

    async fn disconnect(&self, request: Request<proto::ServerRequest>) -> Answer<proto::Done> {
        let proto::ServerRequest { epoch, run_id } = Self::from_operator(request)?;
        self.obey(epoch, |_| Ok(())).await?;
        self.checked(&run_id).await?;
        let spared = &self.0.config.args.operator_user;
        let ended = self.0.local.disconnect(spared).await.map_err(|error| failed(&error))?;
        tracing::info!(ended, "clients are disconnected");
        self.done()
    }

    async fn configure(&self, request: Request<proto::ConfigureRequest>) -> Answer<proto::Done> {
        let all = self.clone();
        whole(async move { all.configure_whole(request).await }).await
    }

    async fn meet(&self, request: Request<proto::MeetRequest>) -> Answer<proto::Done> {
        let all = self.clone();
        whole(async move { all.meet_whole(request).await }).await
    }

    async fn add_slots(&self, request: Request<proto::AddSlotsRequest>) -> Answer<proto::Done> {
        let all = self.clone();
        whole(async move { all.add_slots_whole(request).await }).await
    }

    async fn forget(&self, request: Request<proto::ForgetRequest>) -> Answer<proto::Done> {
        let all = self.clone();
        whole(async move { all.forget_whole(request).await }).await
    }

    async fn migrate_slots(&self, request: Request<proto::MigrateSlotsRequest>) -> Answer<proto::Done> {
        let all = self.clone();
        whole(async move { all.migrate_slots_whole(request).await }).await
    }

    async fn fence(&self, request: Request<proto::ServerRequest>) -> Answer<proto::Done> {
        let proto::ServerRequest { epoch, run_id } = Self::from_operator(request)?;
        if run_id.is_empty() {
            return Err(malformed(wire::Malformed("run_id")));
        }
        self.obey(epoch, |_| Ok(())).await?;
        // Not behind another command, which may be waiting for the very server that is to end.
        let target = self.0.read(|known| (known.run_id == run_id).then_some(known.process).flatten());
        let Some(process) = target else {
            return if self.0.read(|known| known.exited_run_id == run_id) {
                self.done()
            } else {
                Err(superseded("it is another process"))
            };
        };
        let mut changed = self.0.changed.subscribe();
        process.kill();
        let gone = async {
            while self.0.read(|known| known.process == Some(process)) {
                if changed.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::time::timeout(FENCE_TIMEOUT, gone)
            .await
            .map_err(|_| Status::deadline_exceeded("killed, and not gone yet"))?;
        tracing::warn!("the server is fenced");
        self.done()
    }
}

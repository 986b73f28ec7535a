//! Commands to one agent: each is sent once, within a bound, and its refusal is told apart from an answer that is missing.

use super::link::AgentLink;
use std::time::Duration;
use tonic::{Code, Response, Status, transport::Channel};
use valkeeper_agent::{
    link::MESSAGE_BYTES_MAX,
    proto::{
        self, AddSlotsRequest, AgentState, AttachRequest, ConfigureRequest, Done, ForgetRequest,
        GreetRequest, MeetRequest, MigrateSlotsRequest, PauseReply, PauseRequest, PromiseRequest,
        PromoteRequest, Promotion, ServerRequest, Setting, TellRequest, agent_client::AgentClient,
    },
};
use valkeeper_core::{
    agent::Brief,
    config::{LiveSetting, PORT},
    effect::{Means, Outcome, Server},
    ids::{Digest, NodeId, ReplId, WriterEpoch},
    slots::SlotSet,
    words,
};

/// Bound on one command: longer than the stall of a fork and a slow sync of the agent's memory, shorter than the default
/// detection window of 3 s.
pub(super) const CALL_MAX: Duration = Duration::from_secs(2);

/// The same where two servers of a Valkey Cluster hand over between themselves, for which the agent gives them 3 s.
const SWAP_MAX: Duration = Duration::from_secs(5);

/// Bound on a fence: the kernel needs a moment to take a large process apart.
const FENCE_MAX: Duration = Duration::from_secs(5);

/// Characters of an agent's words that are kept: enough for every refusal it has.
const WORDS_CHARS_MAX: usize = 200;

/// Why a command was not done, or is not known to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The agent knows a later writer. Nothing was changed.
    #[error("{words}")]
    Deposed {
        /// Its epoch.
        by: WriterEpoch,
        /// The agent's words.
        words: String,
    },
    /// What the command was decided from does not hold there. Nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// The agent or its server does not take it, by its own word. Nothing was changed.
    #[error("{0}")]
    Declined(String),
    /// No connection, no answer within the bound, or a failure: nobody knows whether something was changed.
    #[error("{0}")]
    Failed(String),
}

impl From<CallError> for Outcome {
    fn from(error: CallError) -> Outcome {
        match error {
            CallError::Deposed { by: _, words } | CallError::Refused(words) => Outcome::Superseded(words),
            CallError::Declined(words) => Outcome::Refused(words),
            CallError::Failed(words) => Outcome::Failed(words),
        }
    }
}

/// Where writes stand while they are paused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paused {
    /// The history.
    pub replid: ReplId,
    /// Nothing is written beyond this offset.
    pub offset: i64,
}

impl AgentLink {
    /// Who holds the shard's grant, under which terms.
    ///
    /// # Errors
    /// [`CallError`], as for every command.
    pub async fn tell(&self, brief: &Brief) -> Result<(), CallError> {
        let request = TellRequest { epoch: self.epoch().0, brief: Some(brief.into()) };
        let told = self.call(CALL_MAX, |mut agent| async move { agent.tell(request).await }).await;
        self.spoke_for(brief);
        told.map(|done| self.learn(done))
    }

    /// From now on nothing below this grant is supported there.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn promise(&self, brief: &Brief) -> Result<(), CallError> {
        let request = PromiseRequest { epoch: self.epoch().0, brief: Some(brief.into()) };
        self.call(CALL_MAX, |mut agent| async move { agent.promise(request).await })
            .await
            .map(|done| self.learn(done))
    }

    /// The agent takes the grant and makes its server primary, if that is still on this history at this offset or further.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn promote(
        &self,
        server: &Server,
        brief: &Brief,
        at: &Paused,
        consents: u64,
    ) -> Result<(), CallError> {
        self.promote_by(Promotion::Unspecified, server, brief, at, consents).await
    }

    /// The same by these means.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn promote_by(
        &self,
        by: Promotion,
        server: &Server,
        brief: &Brief,
        at: &Paused,
        consents: u64,
    ) -> Result<(), CallError> {
        let request = PromoteRequest {
            epoch: self.epoch().0,
            brief: Some(brief.into()),
            run_id: server.run_id.clone(),
            replid: at.replid.0.clone(),
            offset: at.offset,
            consents,
            by: by.into(),
        };
        let bound = match by {
            Promotion::Handover => SWAP_MAX,
            Promotion::Unspecified | Promotion::Open | Promotion::Force | Promotion::Takeover => CALL_MAX,
        };
        let promoted = self.call(bound, |mut agent| async move { agent.promote(request).await }).await;
        self.spoke_for(brief);
        promoted.map(|done| self.learn(done))
    }

    /// The server follows another member.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn attach(&self, server: &Server, brief: &Brief, to: &Endpoint) -> Result<(), CallError> {
        let Endpoint { host, port, node } = to.clone();
        let request = AttachRequest {
            epoch: self.epoch().0,
            brief: Some(brief.into()),
            run_id: server.run_id.clone(),
            host,
            port: u32::from(port),
            node_id: node.map(String::from).unwrap_or_default(),
        };
        self.call(CALL_MAX, |mut agent| async move { agent.attach(request).await })
            .await
            .map(|done| self.learn(done))
    }

    /// The server's node is told where another is.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn meet(&self, server: &Server, other: &Endpoint) -> Result<(), CallError> {
        let Endpoint { host, port, node: _ } = other.clone();
        let (epoch, run_id) = (self.epoch().0, server.run_id.clone());
        let request = MeetRequest { epoch, run_id, host, port: u32::from(port) };
        self.call(CALL_MAX, |mut agent| async move { agent.meet(request).await })
            .await
            .map(|done| self.learn(done))
    }

    /// Slots that nobody owns become this node's; before that it gets this config epoch, if one is given.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn add_slots(
        &self,
        server: &Server,
        node: &NodeId,
        slots: &SlotSet,
        config_epoch: Option<u64>,
    ) -> Result<(), CallError> {
        let request = AddSlotsRequest {
            epoch: self.epoch().0,
            run_id: server.run_id.clone(),
            node_id: node.to_string(),
            slots: slots.to_string(),
            config_epoch: config_epoch.unwrap_or_default(),
        };
        self.call(CALL_MAX, |mut agent| async move { agent.add_slots(request).await })
            .await
            .map(|done| self.learn(done))
    }

    /// The server's node hands slots over to another, which goes on by itself once the job is accepted.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn migrate_slots(
        &self,
        server: &Server,
        slots: &SlotSet,
        to: &NodeId,
        by: Means,
    ) -> Result<(), CallError> {
        let (epoch, run_id) = (self.epoch().0, server.run_id.clone());
        let (slots, node_id, by_key) = (slots.to_string(), to.to_string(), by == Means::ByKey);
        let request = MigrateSlotsRequest { epoch, run_id, slots, node_id, by_key };
        self.call(CALL_MAX, |mut agent| async move { agent.migrate_slots(request).await })
            .await
            .map(|done| self.learn(done))
    }

    /// The server's node does not know this one any more.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn forget(&self, server: &Server, node: &NodeId) -> Result<(), CallError> {
        let (epoch, run_id) = (self.epoch().0, server.run_id.clone());
        let request = ForgetRequest { epoch, run_id, node_id: node.to_string() };
        self.call(CALL_MAX, |mut agent| async move { agent.forget(request).await })
            .await
            .map(|done| self.learn(done))
    }

    /// Stops writes; they go on by themselves after `timeout_ms`.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn pause(&self, server: &Server, timeout_ms: u32) -> Result<Paused, CallError> {
        let request = PauseRequest { epoch: self.epoch().0, run_id: server.run_id.clone(), timeout_ms };
        let answer = self.call(CALL_MAX, |mut agent| async move { agent.pause(request).await }).await?;
        let PauseReply { replid, offset, state } = answer;
        self.learn(Done { state });
        Ok(Paused { replid: ReplId(replid), offset })
    }

    /// Lets writes go on.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn resume(&self, server: &Server) -> Result<(), CallError> {
        let request = self.of_server(server);
        self.call(CALL_MAX, |mut agent| async move { agent.resume(request).await })
            .await
            .map(|done| self.learn(done))
    }

    /// The server takes these settings, all or none.
    ///
    /// # Errors
    /// [`CallError`]; of the server's words if it refuses.
    pub async fn configure(
        &self,
        server: &Server,
        digest: &Digest,
        settings: Vec<LiveSetting>,
    ) -> Result<(), CallError> {
        let setting = |LiveSetting { name, words, named }| Setting { name: name.to_owned(), words, named };
        let request = ConfigureRequest {
            epoch: self.epoch().0,
            run_id: server.run_id.clone(),
            digest: digest.0.clone(),
            settings: settings.into_iter().map(setting).collect(),
        };
        self.call(CALL_MAX, |mut agent| async move { agent.configure(request).await })
            .await
            .map(|done| self.learn(done))
    }

    /// Ends the connections of clients.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn disconnect(&self, server: &Server) -> Result<(), CallError> {
        let request = self.of_server(server);
        self.call(CALL_MAX, |mut agent| async move { agent.disconnect(request).await })
            .await
            .map(|done| self.learn(done))
    }

    /// Ends the server. When this returns, the process is gone.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn fence(&self, server: &Server) -> Result<(), CallError> {
        let request = self.of_server(server);
        self.call(FENCE_MAX, |mut agent| async move { agent.fence(request).await })
            .await
            .map(|done| self.learn(done))
    }

    /// What the agent knows after a command comes with its answer: the next decision is made from it.
    fn learn(&self, done: Done) {
        if let Some(state) = done.state {
            self.heard(state);
        }
    }

    fn of_server(&self, server: &Server) -> ServerRequest {
        ServerRequest { epoch: self.epoch().0, run_id: server.run_id.clone() }
    }

    async fn call<T, F>(
        &self,
        bound: Duration,
        send: impl FnOnce(AgentClient<Channel>) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let Some(channel) = self.channel() else {
            return Err(CallError::Failed("the agent was not reached yet: nothing was sent".to_owned()));
        };
        let answer = call(channel, bound, send).await;
        if let Err(CallError::Deposed { by, words: _ }) = &answer {
            self.deposed(*by);
        }
        answer
    }
}

/// An address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// IP address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Its node in a Valkey Cluster.
    pub node: Option<NodeId>,
}

impl Endpoint {
    /// A member's server at the address of its pod.
    pub fn of_member(address: &str, node: Option<&NodeId>) -> Endpoint {
        Endpoint { host: address.to_owned(), port: PORT, node: node.cloned() }
    }
}

pub(super) async fn greet(
    channel: Channel,
    epoch: WriterEpoch,
    news_address: &str,
    bound: Duration,
) -> Result<AgentState, CallError> {
    let request = GreetRequest { epoch: epoch.0, news_address: news_address.to_owned() };
    call(channel, bound, |mut agent| async move { agent.greet(request).await }).await
}

async fn call<T, F>(
    channel: Channel,
    bound: Duration,
    send: impl FnOnce(AgentClient<Channel>) -> F,
) -> Result<T, CallError>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    let agent = proto::agent_client::AgentClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    match tokio::time::timeout(bound, send(agent)).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(of_status(&status)),
        Err(_elapsed) => Err(CallError::Failed("the agent did not answer in time".to_owned())),
    }
}

fn of_status(status: &Status) -> CallError {
    let kept = words::of_others(status.message(), WORDS_CHARS_MAX);
    let code = status.code();
    if code == Code::Aborted {
        // The words end with the epoch; an agent that words it otherwise still knows a later one than was given.
        let by = kept.rsplit(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default();
        return CallError::Deposed { by: WriterEpoch(by), words: kept };
    }
    if code == Code::FailedPrecondition {
        return CallError::Refused(kept);
    }
    if code == Code::InvalidArgument {
        return CallError::Declined(kept);
    }
    CallError::Failed(format!("the agent: {} ({code:?})", if kept.is_empty() { "no words" } else { &kept }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_core::agent::Refusal;

    #[test]
    fn a_refusal_says_whether_anything_was_changed() {
        let refusal = Refusal::Deposed { given: WriterEpoch(3), known: WriterEpoch(8) };
        let deposed = of_status(&Status::aborted(refusal.to_string()));
        assert!(matches!(&deposed, CallError::Deposed { by: WriterEpoch(8), .. }), "{deposed:?}");
        assert!(matches!(Outcome::from(deposed), Outcome::Superseded(_)));
        let refused = of_status(&Status::failed_precondition("another process"));
        assert_eq!(Outcome::from(refused), Outcome::Superseded("another process".into()));
        let declined = of_status(&Status::invalid_argument("no such locale"));
        assert_eq!(Outcome::from(declined), Outcome::Refused("no such locale".into()));
        assert!(matches!(Outcome::from(of_status(&Status::unavailable("gone"))), Outcome::Failed(_)));
    }
}

//! The contract's messages to the core's types and back. What comes from the wire is believed only as far as it can be
//! understood: everything else is [`Malformed`], which names the field and never repeats what was in it.

use crate::proto;
use valkeeper_core::{
    agent::{Answer, Brief, Data, HISTORY_NONE, History, PeerAnswer, PeerServer},
    decision::HoldReason,
    ids::{Digest, MemberId, NodeId, ReplId, Seq, Timestamp},
    observation::{AgentFacts, CertificateFacts, Gate, ServerProcess},
};

/// Members of one shard that are understood: ten times the largest shard that anybody runs.
const ROSTER_MAX: usize = 100;
/// Characters of a word (version, thumbprint, how a server ended): a thumbprint has 64.
const WORD_CHARS_MAX: usize = 128;
/// Most of what a server said at its end that is recorded. Characters.
const TEXT_CHARS_MAX: usize = 512;
/// Characters of a replication id.
const REPLID_CHARS: usize = 40;

/// A message that cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the field {0} cannot be understood")]
pub struct Malformed(pub &'static str);

/// Reads a member id; empty is nobody.
///
/// # Errors
/// `field` if it is something else.
pub fn member_or_none(text: &str, field: &'static str) -> Result<Option<MemberId>, Malformed> {
    if text.is_empty() { Ok(None) } else { member(text, field).map(Some) }
}

/// Reads a member id.
///
/// # Errors
/// `field` if it is none.
pub fn member(text: &str, field: &'static str) -> Result<MemberId, Malformed> {
    text.parse().map_err(|_| Malformed(field))
}

/// Reads a node id; empty is none.
///
/// # Errors
/// `field` if it is something else.
pub fn node_or_none(text: &str, field: &'static str) -> Result<Option<NodeId>, Malformed> {
    if text.is_empty() { Ok(None) } else { node(text, field).map(Some) }
}

/// Reads a node id.
///
/// # Errors
/// `field` if it is none.
pub fn node(text: &str, field: &'static str) -> Result<NodeId, Malformed> {
    text.parse().map_err(|_| Malformed(field))
}

fn replid(text: String, field: &'static str) -> Result<ReplId, Malformed> {
    let is_hex = text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    if is_hex && text.len() == REPLID_CHARS { Ok(ReplId(text)) } else { Err(Malformed(field)) }
}

/// A text that goes into the journal: visible, of bounded length; may be empty.
fn word(text: String, field: &'static str) -> Result<String, Malformed> {
    let visible = text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
    if visible && text.len() <= WORD_CHARS_MAX { Ok(text) } else { Err(Malformed(field)) }
}

/// Words for people, as far as they can be shown; `None` without any.
fn told(text: &str) -> Option<String> {
    let visible = |c: &char| *c == ' ' || c.is_ascii_graphic();
    let text: String = text.chars().filter(visible).take(TEXT_CHARS_MAX).collect();
    (!text.is_empty()).then_some(text)
}

impl From<&Brief> for proto::Brief {
    fn from(brief: &Brief) -> Self {
        let Brief { grant, holder, roster, isolation_ms } = brief;
        proto::Brief {
            grant: grant.0,
            holder: holder.map(|id| id.to_string()).unwrap_or_default(),
            roster: roster.iter().map(MemberId::to_string).collect(),
            isolation_ms: *isolation_ms,
        }
    }
}

impl TryFrom<proto::Brief> for Brief {
    type Error = Malformed;

    fn try_from(brief: proto::Brief) -> Result<Self, Malformed> {
        let proto::Brief { grant, holder, roster, isolation_ms } = brief;
        if roster.len() > ROSTER_MAX {
            return Err(Malformed("brief.roster"));
        }
        if isolation_ms < 0 {
            return Err(Malformed("brief.isolation_ms"));
        }
        let roster: Result<Vec<MemberId>, Malformed> =
            roster.iter().map(|id| member(id, "brief.roster")).collect();
        let holder = member_or_none(&holder, "brief.holder")?;
        Ok(Brief { grant: Seq(grant), holder, roster: roster?, isolation_ms })
    }
}

/// The brief of a request, which must have one.
///
/// # Errors
/// If it is missing or cannot be understood.
pub fn brief(brief: Option<proto::Brief>) -> Result<Brief, Malformed> {
    brief.ok_or(Malformed("brief"))?.try_into()
}

impl From<&History> for proto::History {
    fn from(history: &History) -> Self {
        let History { replid, offset, before } = history;
        let (before_replid, before_offset) =
            before.as_ref().map_or((String::new(), HISTORY_NONE), |(id, at)| (id.0.clone(), *at));
        proto::History { replid: replid.0.clone(), offset: *offset, before_replid, before_offset }
    }
}

impl TryFrom<proto::History> for History {
    type Error = Malformed;

    fn try_from(history: proto::History) -> Result<Self, Malformed> {
        let proto::History { replid: id, offset, before_replid, before_offset } = history;
        let before = if before_replid.is_empty() {
            None
        } else {
            Some((replid(before_replid, "history.before_replid")?, before_offset))
        };
        Ok(History { replid: replid(id, "history.replid")?, offset, before })
    }
}

impl From<&Data> for proto::Data {
    fn from(data: &Data) -> Self {
        match data {
            Data::Blank => proto::Data { blank: true, history: None },
            Data::Unproven => proto::Data { blank: false, history: None },
            Data::Proven(history) => proto::Data { blank: false, history: Some(history.into()) },
        }
    }
}

impl TryFrom<proto::Data> for Data {
    type Error = Malformed;

    fn try_from(data: proto::Data) -> Result<Self, Malformed> {
        match data {
            proto::Data { blank: true, history: None } => Ok(Data::Blank),
            proto::Data { blank: true, history: Some(_) } => Err(Malformed("data.blank")),
            proto::Data { blank: false, history: None } => Ok(Data::Unproven),
            proto::Data { blank: false, history: Some(history) } => Ok(Data::Proven(history.try_into()?)),
        }
    }
}

impl From<&PeerAnswer> for proto::AskReply {
    fn from(answer: &PeerAnswer) -> Self {
        let PeerAnswer { grant, holder, server } = answer;
        let (server, data) = match server {
            PeerServer::Primary => (proto::ServerState::Primary, None),
            PeerServer::Running(data) => (proto::ServerState::Running, Some(data.into())),
            PeerServer::AtGate(data) => (proto::ServerState::AtGate, Some(data.into())),
            PeerServer::Starting => (proto::ServerState::Starting, None),
        };
        proto::AskReply {
            grant: grant.0,
            holder: holder.map(|id| id.to_string()).unwrap_or_default(),
            server: server.into(),
            data,
            node_id: String::new(),
        }
    }
}

impl TryFrom<proto::AskReply> for PeerAnswer {
    type Error = Malformed;

    fn try_from(reply: proto::AskReply) -> Result<Self, Malformed> {
        let state = reply.server();
        // Where it is, is no part of what it knows.
        let proto::AskReply { grant, holder, server: _, data, node_id: _ } = reply;
        let data = || -> Result<Data, Malformed> { data.ok_or(Malformed("data"))?.try_into() };
        let server = match state {
            proto::ServerState::Primary => PeerServer::Primary,
            proto::ServerState::Running => PeerServer::Running(data()?),
            proto::ServerState::AtGate => PeerServer::AtGate(data()?),
            // What a later contract may add cannot be told either.
            proto::ServerState::Starting | proto::ServerState::Unspecified => PeerServer::Starting,
        };
        Ok(PeerAnswer { grant: Seq(grant), holder: member_or_none(&holder, "holder")?, server })
    }
}

/// What a peer answered to a holder of the grant `mine`.
pub fn answer(reply: &proto::ConfirmReply, mine: Seq) -> Answer {
    Answer::of(reply.confirmed, Seq(reply.grant), mine)
}

/// The gate as the contract writes it: word, code of the reason, whom it attached itself to.
pub fn gate_words(gate: Gate) -> (&'static str, &'static str, String) {
    match gate {
        Gate::Holding(reason) => ("holding", reason.code(), String::new()),
        Gate::Commanded => ("commanded", "", String::new()),
        Gate::Resumed => ("resumed", "", String::new()),
        Gate::Attached(member) => ("attached", "", member.to_string()),
    }
}

fn gate(word: &str, reason: &str, attached_to: &str) -> Result<Gate, Malformed> {
    match word {
        "holding" => {
            let known = HoldReason::ALL.iter().copied().find(|code| code.code() == reason);
            // A later agent may have other reasons: it is the operator's turn anyhow.
            Ok(Gate::Holding(known.unwrap_or(HoldReason::ForOperator)))
        }
        "commanded" => Ok(Gate::Commanded),
        "resumed" => Ok(Gate::Resumed),
        "attached" => Ok(Gate::Attached(member(attached_to, "attached_to")?)),
        _ => Err(Malformed("gate")),
    }
}

/// What an agent says of itself, as facts. `now` is the operator's clock when the answer arrived.
///
/// # Errors
/// The field that cannot be understood.
pub fn facts(state: proto::AgentState, now: Timestamp) -> Result<AgentFacts, Malformed> {
    let server = if !state.exited.is_empty() {
        ServerProcess::Exited(word(state.exited, "exited")?)
    } else if state.silent_ms > 0 {
        ServerProcess::Silent { since: now.plus_millis(state.silent_ms.saturating_neg()) }
    } else if state.silent_ms == 0 {
        ServerProcess::Running
    } else {
        return Err(Malformed("silent_ms"));
    };
    Ok(AgentFacts {
        version: word(state.version, "version")?,
        brief: brief(state.brief)?,
        consents: state.consents,
        run_id: word(if state.run_id.is_empty() { state.exited_run_id } else { state.run_id }, "run_id")?,
        server,
        drawn: (!state.drawn_replid.is_empty())
            .then(|| word(state.drawn_replid, "drawn_replid").map(ReplId))
            .transpose()?,
        gate: gate(&state.gate, &state.hold_reason, &state.attached_to)?,
        leaving: state.leaving,
        relays: state.relays,
        start_failure: told(&state.start_failure),
        settings: (!state.settings.is_empty())
            .then(|| word(state.settings, "settings").map(Digest))
            .transpose()?,
        disk_full: state.disk_full,
        oom_kills: state.oom_kills,
        writes_stopped: state.writes_stopped,
        certificate: CertificateFacts {
            thumbprint: word(state.certificate_thumbprint, "certificate_thumbprint")?,
            not_after: Timestamp(0).plus_millis(state.certificate_not_after.saturating_mul(1_000)),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> proto::AgentState {
        proto::AgentState {
            brief: Some(proto::Brief {
                grant: 7,
                holder: "0-1".to_owned(),
                roster: vec!["0-0".to_owned(), "0-1".to_owned()],
                isolation_ms: 2_000,
            }),
            gate: "holding".to_owned(),
            hold_reason: "PeerUnanswered".to_owned(),
            ..proto::AgentState::default()
        }
    }

    #[test]
    fn a_state_becomes_facts_on_the_operators_clock() {
        let now = Timestamp(0).plus_millis(10_000);
        let silent = proto::AgentState { silent_ms: 1_500, ..state() };
        let known = facts(silent, now).unwrap();
        assert_eq!(known.server, ServerProcess::Silent { since: Timestamp(0).plus_millis(8_500) });
        assert_eq!(known.gate, Gate::Holding(HoldReason::PeerUnanswered));
        assert_eq!(known.brief.holder, Some(MemberId::new(0, 1)));
    }

    #[test]
    fn what_cannot_be_understood_is_named() {
        let refused = |state: proto::AgentState| facts(state, Timestamp(0)).unwrap_err().0;
        assert_eq!(refused(proto::AgentState { brief: None, ..state() }), "brief");
        assert_eq!(refused(proto::AgentState { gate: "open".to_owned(), ..state() }), "gate");
        assert_eq!(refused(proto::AgentState { silent_ms: -1, ..state() }), "silent_ms");
        assert_eq!(refused(proto::AgentState { exited: "\u{1b}[31m".to_owned(), ..state() }), "exited");
        let mut many = state();
        many.brief = many.brief.map(|brief| proto::Brief { roster: vec!["0-0".to_owned(); 101], ..brief });
        assert_eq!(refused(many), "brief.roster");
    }

    #[test]
    fn answers_and_briefs_survive_the_wire() {
        let history =
            History { replid: ReplId("a".repeat(40)), offset: 9, before: Some((ReplId("b".repeat(40)), 3)) };
        for server in [
            PeerServer::Primary,
            PeerServer::Starting,
            PeerServer::Running(Data::Unproven),
            PeerServer::AtGate(Data::Blank),
            PeerServer::AtGate(Data::Proven(history)),
        ] {
            let answer = PeerAnswer { grant: Seq(4), holder: Some(MemberId::new(0, 2)), server };
            assert_eq!(PeerAnswer::try_from(proto::AskReply::from(&answer)), Ok(answer));
        }
        let brief = Brief { grant: Seq(4), holder: None, roster: vec![MemberId::new(0, 0)], isolation_ms: 0 };
        assert_eq!(Brief::try_from(proto::Brief::from(&brief)), Ok(brief));
    }
}

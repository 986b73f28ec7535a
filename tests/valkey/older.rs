//! Two releases side by side: this operator and an agent of an earlier contract, and this agent and a later operator.

use crate::{
    agent::{Member, OWNER, Operator, Pki, at, brief, place, terms},
    nodes::as_node,
    server::{OPERATOR_PASSWORD, Server, eventually, link_by, present},
};
use futures::future::BoxFuture;
use prost::{
    Message,
    bytes::{Buf, BufMut},
};
use std::{
    convert::Infallible,
    net::Ipv4Addr,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};
use tokio::{net::TcpListener, task::JoinSet};
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    client, codec,
    codegen::{Service, http},
    server::{self, NamedService},
    transport::{self, Channel},
};
use valkeeper::{
    agents::{AgentLink, CallError, Endpoint, Tunnel},
    valkey::{Error, Way},
};
use valkeeper_agent::{
    link::connect,
    proto::{
        self, AgentState, AttachRequest, Done, GreetRequest, PromiseRequest, PromoteRequest, TellRequest,
    },
    tls::{ALPN_H2, Accept},
};
use valkeeper_core::{
    agent::Brief,
    effect,
    ids::{MemberId, Seq},
    info::RawRole,
    observation::{AgentFacts, Observed, ServerProcess, Why},
};

/// Bound on what is done in milliseconds, on a busy machine.
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// Messages as bytes: of whatever contract.
#[derive(Clone, Copy)]
struct Raw;

impl codec::Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl codec::Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut codec::EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl codec::Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut codec::DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining()).to_vec()))
    }
}

/// The message with fields that the contract of today does not have.
fn with_more(message: &impl Message) -> Vec<u8> {
    let mut bytes = message.encode_to_vec();
    prost::encoding::string::encode(900, &"of another release".to_owned(), &mut bytes);
    prost::encoding::uint64::encode(901, &7, &mut bytes);
    bytes
}

/// An agent of an earlier contract: what was added since is not in its answers (a zero is not on the wire), `Done` is empty,
/// `Disconnect` is not there, and it says some things that are not said any more.
#[derive(Clone)]
struct Older(Arc<Mutex<AgentState>>);

impl NamedService for Older {
    const NAME: &'static str = "valkeeper.agent.v1.Agent";
}

impl Service<http::Request<Body>> for Older {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let older = self.clone();
        let call = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        Box::pin(async move {
            let answer = tower::service_fn(move |request: Request<Vec<u8>>| {
                let answer = older.answer(&call, request.get_ref()).map(Response::new);
                async move { answer }
            });
            Ok(server::Grpc::new(Raw).unary(answer, request).await)
        })
    }
}

impl Older {
    fn answer(&self, call: &str, request: &[u8]) -> Result<Vec<u8>, Status> {
        let mut state = self.0.lock().unwrap();
        state.number += 1;
        let told = match call {
            "Greet" => {
                state.epoch = GreetRequest::decode(request).unwrap().epoch;
                return Ok(with_more(&*state));
            }
            "Tell" => TellRequest::decode(request).unwrap().brief,
            "Promise" => PromiseRequest::decode(request).unwrap().brief,
            "Promote" => PromoteRequest::decode(request).unwrap().brief,
            "Attach" => AttachRequest::decode(request).unwrap().brief,
            // What every server of gRPC answers to a call that it does not have.
            _ => return Err(Status::new(Code::Unimplemented, "")),
        };
        state.brief = told;
        Ok(with_more(&Done { state: None }))
    }

    /// Serves, and reaches it as the operator does.
    async fn reached_by(self, operator: &Operator, pki: &Pki, me: MemberId) -> (AgentLink, JoinSet<()>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let incoming = futures::stream::unfold((listener, pki.member(me)), |(listener, live)| async move {
            let (stream, _) = listener.accept().await.unwrap();
            let secured = live.accept(&Accept::Operator, &[ALPN_H2], stream).await;
            Some((secured, (listener, live)))
        });
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            transport::Server::builder()
                .add_service(self)
                .serve_with_incoming(Box::pin(incoming))
                .await
                .unwrap()
        });
        let link = operator.dial_to(place(me, port));
        link.settled().await;
        (link, serving)
    }
}

/// What the operator knows once the agent has told it of this grant.
async fn knows(operator: &Operator, link: &AgentLink, grant: u64) -> AgentFacts {
    eventually("the grant in the agent's words", || async {
        link.check();
        let facts = operator.board().facts(link.place().member).present().cloned();
        facts.filter(|facts| facts.brief.grant == Seq(grant))
    })
    .await
}

#[tokio::test]
async fn an_agent_of_an_earlier_contract_is_understood_and_does_what_it_can() {
    let (pki, me, peer) = (Pki::new(), MemberId::new(0, 0), MemberId::new(0, 1));
    let operator = Operator::new(&pki, 4);
    let server = effect::Server { member: me, address: "127.0.0.1".to_owned(), run_id: "a".repeat(40) };
    let state = AgentState {
        version: "0.0.9".to_owned(),
        brief: Some(proto::Brief::default()),
        instance: "older".to_owned(),
        run_id: server.run_id.clone(),
        gate: "holding".to_owned(),
        hold_reason: "NotUsedAnyMore".to_owned(),
        ..AgentState::default()
    };
    let (link, _serving) = Older(Arc::new(Mutex::new(state))).reached_by(&operator, &pki, me).await;
    let facts = knows(&operator, &link, 0).await;
    assert_eq!((facts.version.as_str(), &facts.run_id), ("0.0.9", &server.run_id));
    assert_eq!((facts.server, facts.brief), (ServerProcess::Running, Brief::default()));
    assert_eq!((facts.drawn, facts.disk_full, facts.oom_kills), (None, false, 0));

    link.tell(&terms(1, peer)).await.unwrap();
    assert_eq!(knows(&operator, &link, 1).await.brief, terms(1, peer));
    link.promise(&terms(2, peer)).await.unwrap();
    knows(&operator, &link, 2).await;
    let to = Endpoint { host: "127.0.0.1".to_owned(), port: 1, node: None };
    link.attach(&server, &terms(3, peer), &to).await.unwrap();
    knows(&operator, &link, 3).await;
    let from = valkeeper::agents::Paused { replid: valkeeper_core::ids::ReplId("b".repeat(40)), offset: 0 };
    link.promote(&server, &terms(4, me), &from, 0).await.unwrap();
    assert_eq!(knows(&operator, &link, 4).await.brief, terms(4, me));

    let answer = link.disconnect(&server).await;
    let Err(CallError::Failed(words)) = &answer else { panic!("{answer:?}") };
    assert!(words.contains("Unimplemented"), "{words}");
    link.tell(&terms(5, me)).await.unwrap();
    knows(&operator, &link, 5).await;
    assert_eq!(operator.board().deposed(), None);
}

#[tokio::test]
async fn a_server_under_an_agent_of_an_earlier_build_is_looked_at_directly_unless_its_gate_cannot_be_seen() {
    let (pki, me) = (Pki::new(), MemberId::new(0, 0));
    let operator = Operator::new(&pki, 1);
    let state = AgentState { brief: Some(proto::Brief::default()), ..AgentState::default() };
    let (link, _serving) = Older(Arc::new(Mutex::new(state))).reached_by(&operator, &pki, me).await;
    let (namespace, cluster) = (OWNER.0.to_owned(), OWNER.1.to_owned());
    let way: Arc<dyn Way> =
        Arc::new(Tunnel { port: link.place().address.port(), live: pki.operator(), namespace, cluster });
    let server = Server::start("").await;
    let (to_server, _) = link_by(way.clone(), server.target(), OPERATOR_PASSWORD);
    assert_eq!(present(&to_server).await.role, RawRole::Primary);
    let (to_node, _) = link_by(way, as_node(server.target()), OPERATOR_PASSWORD);
    assert_eq!(to_node.look().await, Observed::Unknown(Why::Garbled));
    let trouble = to_node.trouble().unwrap();
    assert!(matches!(&trouble, Error::Refusal(words) if words.contains("earlier build")), "{trouble}");
}

async fn asked(channel: &Channel, call: &str, request: Vec<u8>) -> Result<Vec<u8>, Status> {
    let path = format!("/{}/{call}", Older::NAME).parse().unwrap();
    let mut client = client::Grpc::new(channel.clone());
    client.ready().await.unwrap();
    client.unary(Request::new(request), path, Raw).await.map(Response::into_inner)
}

#[tokio::test]
async fn an_agent_does_what_a_later_operator_says_as_far_as_it_knows_it() {
    let pki = Pki::new();
    let member = Member::start(&pki, 0).await;
    let there = member.place();
    let accept = Accept::Exactly(there.peer);
    let channel = connect(&pki.operator(), accept, there.address, CONNECT_MAX).await.unwrap();
    let greeting = GreetRequest { epoch: 9, news_address: String::new() };
    let answer = asked(&channel, "Greet", with_more(&greeting)).await.unwrap();
    assert_eq!(AgentState::decode(&answer[..]).unwrap().epoch, 9);
    let (_link, look) = member.linked().await;
    let promotion = PromoteRequest {
        epoch: 9,
        brief: Some((&brief(2, &member)).into()),
        run_id: look.run_id.clone(),
        replid: at(&look).replid.0,
        offset: look.offset,
        consents: 0,
        by: 0,
    };
    let answer = asked(&channel, "Promote", with_more(&promotion)).await.unwrap();
    let told = Done::decode(&answer[..]).unwrap().state.and_then(|state| state.brief);
    assert_eq!(told, promotion.brief);
    assert_eq!(member.run::<String>("SET key value").await.unwrap(), "OK");
    let unknown = asked(&channel, "OfALaterContract", with_more(&greeting)).await.unwrap_err();
    assert_eq!(unknown.code(), Code::Unimplemented);
}

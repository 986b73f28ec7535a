//! What the shard's other members ask.

use super::{caller, malformed, unchanged};
use crate::{memory::Unchanged, shared::Agent};
use std::sync::Arc;
use tokio::time::Instant;
use tonic::{Request, Response, Status};
use valkeeper_agent::{proto, tls::Peer, wire};
use valkeeper_core::{
    agent::{Ledger, PeerAnswer, Refusal},
    ids::{MemberId, Seq},
};

/// The service.
pub struct Questions(pub Arc<Agent>);

/// A member speaks for itself only.
fn from_member<T>(request: &Request<T>, claimed: &str) -> Result<MemberId, Status> {
    let claimed = wire::member(claimed, "member").map_err(malformed)?;
    match caller(request)? {
        Peer::Member { namespace: _, cluster: _, member } if *member == claimed => Ok(claimed),
        Peer::Member { .. } | Peer::Operator(_) => {
            Err(Status::permission_denied("a member speaks for itself"))
        }
    }
}

impl Questions {
    /// Notes when this was. Within the rule, so that no promise is judged by what was before.
    fn confirmed(&self) {
        self.0.update(|known| {
            known.confirmed = Some(Instant::now());
            known.confirmations += 1;
        });
    }

    /// Supports a holder by a rule of the ledger, and says whether it does.
    async fn support(
        &self,
        request: &Request<proto::ConfirmRequest>,
        rule: fn(&mut Ledger, MemberId, Seq) -> Result<(), Refusal>,
    ) -> Result<Response<proto::ConfirmReply>, Status> {
        let holder = from_member(request, &request.get_ref().holder)?;
        let grant = Seq(request.get_ref().grant);
        let supported = self.0.write(|ledger| {
            rule(ledger, holder, grant)?;
            self.confirmed();
            Ok(())
        });
        self.reply(supported.await).map(Response::new)
    }

    fn reply(&self, result: Result<(), Unchanged>) -> Result<proto::ConfirmReply, Status> {
        let confirmed = match result {
            Ok(()) => true,
            Err(Unchanged::Refused(
                Refusal::Untold
                | Refusal::FarAhead { .. }
                | Refusal::OldGrant { .. }
                | Refusal::OtherHolder { .. }
                | Refusal::Consented { .. }
                | Refusal::Confirmed { .. }
                | Refusal::Deposed { .. },
            )) => false,
            // Not a refusal: nobody may conclude that there is a higher grant.
            Err(error @ Unchanged::Unwritten(_)) => return Err(unchanged(error)),
        };
        Ok(self.0.read(|known| {
            let brief = &known.ledger.brief;
            let holder = brief.holder.map(|id| id.to_string()).unwrap_or_default();
            proto::ConfirmReply { confirmed, grant: brief.grant.0, holder }
        }))
    }
}

#[tonic::async_trait]
impl proto::peer_server::Peer for Questions {
    async fn confirm(
        &self,
        request: Request<proto::ConfirmRequest>,
    ) -> Result<Response<proto::ConfirmReply>, Status> {
        self.support(&request, Ledger::support).await
    }

    async fn ask(&self, request: Request<proto::AskRequest>) -> Result<Response<proto::AskReply>, Status> {
        from_member(&request, &request.get_ref().member)?;
        Ok(Response::new(self.0.read(|known| {
            let answer = PeerAnswer {
                grant: known.ledger.brief.grant,
                holder: known.ledger.brief.holder,
                server: known.server(),
            };
            let node_id = known.nodes.as_ref().map(|nodes| nodes.myself.id.to_string()).unwrap_or_default();
            proto::AskReply { node_id, ..(&answer).into() }
        })))
    }

    async fn consent(
        &self,
        request: Request<proto::ConfirmRequest>,
    ) -> Result<Response<proto::ConfirmReply>, Status> {
        self.support(&request, Ledger::consent).await
    }
}

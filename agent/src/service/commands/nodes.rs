//! What the operator tells a node of a Valkey Cluster: whom it meets, which slots it gets or gives away, whom
//! it forgets.

use super::{Answer, Commands, address, failed, superseded};
use crate::{
    handing::{self, Order},
    local::{self, Cancelled, Look, SlotIs},
    service::malformed,
};
use tonic::{Request, Status};
use valkeeper_agent::{
    proto::{self, Promotion},
    wire,
};
use valkeeper_core::{
    ids::NodeId,
    info::{Info, RawRole},
    nodes::{Node, Nodes, Open},
    slots::SlotSet,
};

/// Whether the node is what this promotion was decided for.
pub fn is_so(by: Promotion, nodes: Option<&Nodes>) -> Result<(), Status> {
    match (by, nodes) {
        (Promotion::Unspecified, None) => Ok(()),
        (Promotion::Unspecified, Some(_)) => Err(superseded("it is in Cluster mode")),
        (Promotion::Open | Promotion::Force | Promotion::Takeover | Promotion::Handover, None) => {
            Err(superseded("it is not in Cluster mode"))
        }
        (Promotion::Open, Some(nodes)) if nodes.myself.primary.is_some() => {
            Err(superseded("its node is a replica"))
        }
        (Promotion::Open | Promotion::Force | Promotion::Takeover | Promotion::Handover, Some(_)) => Ok(()),
    }
}

/// The node, if it has anything to say about slots.
fn gives<'a>(info: &Info, nodes: Option<&'a Nodes>) -> Result<&'a Node, Status> {
    let Some(nodes) = nodes else { return Err(superseded("it is not in Cluster mode")) };
    if info.role != RawRole::Primary || nodes.myself.primary.is_some() {
        return Err(superseded("it is not a primary that serves"));
    }
    Ok(&nodes.myself)
}

/// Whether the node may hand these slots over to that one. A target that is a replica would make a job that fails only later.
fn may_give(info: &Info, nodes: Option<&Nodes>, slots: &SlotSet, to: &NodeId) -> Result<(), Status> {
    let missing = slots.without(&gives(info, nodes)?.slots);
    if !missing.is_empty() {
        return Err(superseded(format!("its node does not serve the slots {missing}")));
    }
    if nodes
        .into_iter()
        .flat_map(|nodes| &nodes.others)
        .any(|other| other.id == *to && other.primary.is_none())
    {
        return Ok(());
    }
    Err(superseded(format!("its node knows no primary {to}")))
}

impl Commands {
    pub(super) async fn meet_whole(&self, request: Request<proto::MeetRequest>) -> Answer<proto::Done> {
        let proto::MeetRequest { epoch, run_id, host, port } = Self::from_operator(request)?;
        let at = address(host, port)?;
        self.obey(epoch, |_| Ok(())).await?;
        let _acting = self.0.acting.lock().await;
        self.checked(&run_id).await?;
        self.0.local.meet(&at).await.map_err(|error| failed(&error))?;
        tracing::info!(host = at.host, port, "the node is told of another");
        self.done()
    }

    pub(super) async fn add_slots_whole(
        &self,
        request: Request<proto::AddSlotsRequest>,
    ) -> Answer<proto::Done> {
        let proto::AddSlotsRequest { epoch, run_id, node_id, slots, config_epoch } =
            Self::from_operator(request)?;
        let id = wire::node(&node_id, "node_id").map_err(malformed)?;
        let slots: SlotSet = slots.parse().map_err(|_| malformed(wire::Malformed("slots")))?;
        self.obey(epoch, |_| Ok(())).await?;
        let _acting = self.0.acting.lock().await;
        let nodes = self.checked(&run_id).await?.nodes;
        let Some(node) = nodes.map(|nodes| nodes.myself).filter(|node| node.id == id) else {
            return Err(superseded(format!("it is not the node {id}")));
        };
        if config_epoch > 0 {
            match self.0.local.set_config_epoch(config_epoch).await {
                Ok(()) => {}
                Err(local::Error::Refused(said)) => {
                    tracing::info!(said, config_epoch, "the node has a config epoch of its own");
                }
                Err(error) => return Err(failed(&error)),
            }
        }
        let missing = slots.without(&node.slots);
        if !missing.is_empty() {
            let look = self.0.local.add_slots(&missing).await.map_err(|error| failed(&error))?;
            self.0.seen(look);
            tracing::info!(slots = %missing, "the node has more slots");
        }
        self.done()
    }

    pub(super) async fn migrate_slots_whole(
        &self,
        request: Request<proto::MigrateSlotsRequest>,
    ) -> Answer<proto::Done> {
        let proto::MigrateSlotsRequest { epoch, run_id, slots, node_id, by_key } =
            Self::from_operator(request)?;
        let to = wire::node(&node_id, "node_id").map_err(malformed)?;
        let slots = slots.parse::<SlotSet>().ok().filter(|slots| !slots.is_empty());
        let slots = slots.ok_or_else(|| malformed(wire::Malformed("slots")))?;
        self.obey(epoch, |_| Ok(())).await?;
        let _acting = self.0.acting.lock().await;
        let Look { info, nodes, .. } = self.checked(&run_id).await?;
        if nodes.as_ref().is_some_and(|nodes| nodes.myself.id == to) {
            if by_key {
                self.close_slots(&gives(&info, nodes.as_ref())?.open, &slots).await?;
            } else {
                match self.0.local.cancel_slot_migrations().await.map_err(|error| failed(&error))? {
                    Cancelled::All => tracing::info!(%slots, "the node hands nothing over any more"),
                    Cancelled::Granted => {
                        return Err(superseded("slots are granted already, and go to their end"));
                    }
                }
            }
            return self.done();
        }
        may_give(&info, nodes.as_ref(), &slots, &to)?;
        if by_key {
            let order = Order { run_id, to: to.clone(), slots: slots.clone() };
            handing::hand_over(&self.0, order).map_err(Status::unknown)?;
        } else {
            self.0.local.migrate_slots(&slots, &to).await.map_err(|error| failed(&error))?;
        }
        tracing::info!(%slots, %to, by_key, "the node hands slots over");
        self.done()
    }

    /// Those of the slots that are half-way to or from the node are so no more. What is not open needs no word: each waits for replicas.
    async fn close_slots(&self, open: &[Open], slots: &SlotSet) -> Result<(), Status> {
        if let Some(slot) = self.0.handing.take_back(slots) {
            return Err(superseded(format!("slot {slot} is in hand, and goes to its end")));
        }
        let open: SlotSet = open.iter().map(Open::number).filter(|slot| slots.contains(*slot)).collect();
        let mut session = self.0.local.session().await.map_err(|error| failed(&error))?;
        for slot in open.iter() {
            session.set_slot(slot, SlotIs::Stable).await.map_err(|error| failed(&error))?;
        }
        tracing::info!(slots = %open, "the node closes slots that were half-way");
        Ok(())
    }

    pub(super) async fn forget_whole(&self, request: Request<proto::ForgetRequest>) -> Answer<proto::Done> {
        let proto::ForgetRequest { epoch, run_id, node_id } = Self::from_operator(request)?;
        let id = wire::node(&node_id, "node_id").map_err(malformed)?;
        self.obey(epoch, |_| Ok(())).await?;
        let _acting = self.0.acting.lock().await;
        self.checked(&run_id).await?;
        self.0.local.forget_node(&id).await.map_err(|error| failed(&error))?;
        tracing::info!(node = %id, "the node forgets another");
        self.done()
    }
}

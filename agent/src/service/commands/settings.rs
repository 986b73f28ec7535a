//! What the operator tells a server of its configuration.

use super::{Answer, Commands, failed};
use crate::{
    local,
    service::malformed,
    settings::{self, Error},
};
use tonic::{Request, Status};
use valkeeper_agent::{proto, wire};

impl Commands {
    pub(super) async fn configure_whole(
        &self,
        request: Request<proto::ConfigureRequest>,
    ) -> Answer<proto::Done> {
        let proto::ConfigureRequest { epoch, run_id, digest, settings } = Self::from_operator(request)?;
        if run_id.is_empty() {
            return Err(malformed(wire::Malformed("run_id")));
        }
        let all = settings::read(&digest, settings).map_err(malformed)?;
        self.obey(epoch, |_| Ok(())).await?;
        let _acting = self.0.acting.lock().await;
        self.checked(&run_id).await?;
        settings::take(&self.0, &digest, &all).await.map_err(|error| match error {
            // Its own word, and nothing was changed.
            Error::Server(error @ local::Error::Refused(_)) => Status::invalid_argument(error.to_string()),
            Error::Server(error) => failed(&error),
            Error::Copy(_) => Status::internal(error.to_string()),
        })?;
        self.done()
    }
}

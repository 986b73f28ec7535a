//! The identity's files, and their newest content. Kubernetes changes a mounted Secret by moving one link, so a reading
//! may still be of two versions: then key and leaf do not fit, and the next one is of one.

use crate::{args::Config, shared::Agent};
use std::{fs, io, time::Duration};
use valkeeper_agent::tls::{Error, Identity};

/// Between two readings: a renewal comes days before it is needed.
const READ_PERIOD: Duration = Duration::from_secs(1);

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    #[error("a file of the identity cannot be read")]
    File(#[from] io::Error),
    #[error("the identity cannot be used")]
    Identity(#[from] Error),
}

struct Files {
    roots: Vec<u8>,
    chain: Vec<u8>,
    key: Vec<u8>,
}

fn files(config: &Config) -> io::Result<Files> {
    let (dir, ordinal) = (&config.args.identity, config.me.ordinal);
    Ok(Files {
        roots: fs::read(dir.join("ca.crt"))?,
        chain: fs::read(dir.join(format!("{ordinal}.crt")))?,
        key: fs::read(dir.join(format!("{ordinal}.key")))?,
    })
}

fn identity(files: &Files) -> Result<Identity, Error> {
    Identity::from_pem(&files.roots, &files.chain, &files.key)
}

/// Reads the identity.
pub fn read(config: &Config) -> Result<Identity, Unread> {
    Ok(identity(&files(config)?)?)
}

/// Takes every new content as soon as it can be used.
pub async fn watch(agent: &Agent) {
    let mut known: Option<(Vec<u8>, Vec<u8>)> = None;
    loop {
        if let Ok(files) = files(&agent.config)
            && known.as_ref().is_none_or(|(roots, chain)| *roots != files.roots || *chain != files.chain)
        {
            match identity(&files) {
                Ok(identity) => {
                    if identity.thumbprint != agent.live.current().thumbprint {
                        tracing::info!(
                            thumbprint = identity.thumbprint,
                            "a new certificate is used from now on"
                        );
                    }
                    agent.live.replace(identity);
                    agent.renew();
                    known = Some((files.roots, files.chain));
                }
                Err(error) => tracing::warn!(error = %error, "new files of the identity cannot be used yet"),
            }
        }
        tokio::time::sleep(READ_PERIOD).await;
    }
}

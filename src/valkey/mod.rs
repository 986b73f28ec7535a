//! The operator's only home of the `redis` crate: what one valkey-server says of itself. It looks and changes nothing; it knows
//! addresses, credentials and text; nothing of Kubernetes, of steps or of the driver.
//!
//! - [`look`]: one answer of a server        - [`secret`]: credentials that never show themselves
//! - [`connection`]: one logged-in socket  - [`way`]: how a server is reached
//! - [`member`]: one held link per member, which sees the death of its process

mod connection;
pub mod look;
pub mod member;
pub mod secret;
pub mod way;

pub use look::Look;
pub use member::{MemberLink, Target, Wake};
pub use secret::{Credentials, Secret};
pub use way::{Direct, Opened, Way};

use redis::{ErrorKind, RedisError, ServerErrorKind};
use std::{error::Error as _, io, sync::Arc};
use valkeeper_core::{info::Garbled, nodes::NodesError, observation::Why, words};

/// Characters of a server's refusal that are kept: enough for every message Valkey has, and a bound on what a foreign
/// server can put into the journal.
const REFUSAL_CHARS_MAX: usize = 160;

/// Why a server could not be asked. Carries no argument of any command, so no secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing listens at the address.
    #[error("the connection is refused")]
    Refused,
    /// The member's agent says that nobody serves: the process has ended, or does not listen yet.
    #[error("there is no server")]
    NoServer,
    /// No answer within the bound.
    #[error("no answer within the bound")]
    Silent,
    /// The server or the network ended the connection.
    #[error("the connection ended")]
    Closed,
    /// The network has no way to the address, or the local system refuses.
    #[error("the address cannot be reached: {0}")]
    Unreachable(io::ErrorKind),
    /// The server answers but does not accept who asks. Holds the error's code only (`WRONGPASS`, `NOPERM`, ...).
    #[error("the operator's credentials are refused ({0})")]
    Unauthorized(String),
    /// The server refused a command. Holds the error's code and text, shortened.
    #[error("the server refuses: {0}")]
    Refusal(String),
    /// The answer cannot be understood.
    #[error(transparent)]
    Garbled(#[from] Garbled),
    /// What its node says cannot be understood.
    #[error(transparent)]
    Nodes(#[from] NodesError),
}

impl Error {
    /// What an observer may conclude from it. A refused connection and a server that is not there are no `Why`: see
    /// [`member::MemberLink::look`].
    pub fn why(&self) -> Why {
        match self {
            Error::Refused | Error::NoServer | Error::Silent | Error::Closed | Error::Unreachable(_) => {
                Why::Silent
            }
            Error::Unauthorized(_) => Why::Unauthorized,
            Error::Refusal(_) | Error::Garbled(_) | Error::Nodes(_) => Why::Garbled,
        }
    }

    /// Of a connection that was not made.
    pub(crate) fn of_io(error: &io::Error) -> Error {
        if is_end(error.kind()) {
            return Error::Closed;
        }
        if error.kind() == io::ErrorKind::ConnectionRefused {
            return Error::Refused;
        }
        Error::Unreachable(error.kind())
    }
}

fn is_end(kind: io::ErrorKind) -> bool {
    // The kinds in which the peer's end of a connection shows itself.
    [
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::ConnectionAborted,
        io::ErrorKind::BrokenPipe,
        io::ErrorKind::UnexpectedEof,
        io::ErrorKind::NotConnected,
    ]
    .contains(&kind)
}

impl From<RedisError> for Error {
    fn from(error: RedisError) -> Error {
        let code = error.code().unwrap_or_default();
        let foreign_code = ["NOAUTH", "WRONGPASS", "DENIED"].contains(&code);
        if foreign_code || error.kind() == ErrorKind::Server(ServerErrorKind::NoPerm) {
            return Error::Unauthorized(code.to_owned());
        }
        if !code.is_empty() {
            let text = format!("{code} {}", error.detail().unwrap_or_default());
            return Error::Refusal(words::of_others(&text, REFUSAL_CHARS_MAX));
        }
        if error.is_timeout() {
            return Error::Silent;
        }
        if io_kind(&error) == Some(io::ErrorKind::InvalidData) {
            return Error::Garbled(Garbled::TooLong);
        }
        if error.is_io_error() {
            return Error::Closed;
        }
        Error::Garbled(Garbled::NotAnAnswer)
    }
}

fn io_kind(error: &RedisError) -> Option<io::ErrorKind> {
    // The library keeps it behind an `Arc`, and that `Arc` is what it gives as the source.
    let shared: &Arc<dyn std::error::Error + Send + Sync> = error.source()?.downcast_ref()?;
    shared.downcast_ref().map(io::Error::kind)
}

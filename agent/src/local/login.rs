//! Who may log in at the server: the users of the mounted files, kept in step with them while the server runs, and the operator's, whom this
//! agent lets in. Nobody has to know a password that was lost with a Secret.

use super::{Error, Local, cmd};
use std::io;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// Longest answer to a login that is understood: an error's line.
const ANSWER_BYTES_MAX: usize = 512;

impl Local {
    /// Which version of the users' files is mounted.
    pub fn mounted(&self) -> String {
        self.users.mounted()
    }

    /// Logs the operator's user in on this connection. False if the server refuses.
    ///
    /// # Errors
    /// The connection's.
    pub async fn log_operator_in(&self, server: &mut UnixStream) -> io::Result<bool> {
        let mut auth = cmd("AUTH");
        auth.arg(self.users.operator()).arg(&self.password);
        server.write_all(&auth.get_packed_command()).await?;
        // The server says nothing else by itself, so not a byte of anybody else's answer is taken.
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n") {
            if answer.len() >= ANSWER_BYTES_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            answer.push(server.read_u8().await?);
        }
        Ok(answer.starts_with(b"+"))
    }

    /// Makes the operator's user anew.
    pub async fn restore_operator(&self) -> Result<(), Error> {
        match self.users.operators_line() {
            Some(line) => self.set_user(&line).await,
            None => Err(Error::Unverified("the mounted file does not have that user")),
        }
    }

    /// Gives the server the users of the mounted files. Whoever is logged in stays so.
    pub async fn set_users(&self) -> Result<(), Error> {
        for line in self.users.lines() {
            self.set_user(&line).await?;
        }
        Ok(())
    }

    /// `user NAME RULE...`, as a users' file has it. A file begins with nothing allowed, hence `reset`. What the server says of a rule that it does
    /// not take is not passed on: it repeats the rule, which may be a password's hash.
    async fn set_user(&self, line: &str) -> Result<(), Error> {
        let mut words = line.split_whitespace().skip(1);
        let name = words.next().unwrap_or_default();
        let mut set = cmd("ACL");
        set.arg("SETUSER").arg(name).arg("reset");
        for rule in words {
            set.arg(rule);
        }
        self.ask(&set).await.map_err(|error| match error {
            Error::Refused(_) => Error::Refused(format!("a rule of user {name}")),
            other @ (Error::Silent
            | Error::Lost(_)
            | Error::Garbled(_)
            | Error::Nodes(_)
            | Error::Users(_)
            | Error::Unverified(_)) => other,
        })
    }

    /// The next password of replication, if another is known: the primary does not accept the one before, or has other reasons.
    pub async fn try_next_login(&self) -> Result<(), Error> {
        if self.users.try_next() { self.log_in_with_used().await } else { Ok(()) }
    }

    /// The newest password of replication, once every member has had it.
    pub async fn settle_login(&self) -> Result<(), Error> {
        if self.users.settles() { self.log_in_with_used().await } else { Ok(()) }
    }

    async fn log_in_with_used(&self) -> Result<(), Error> {
        tracing::info!("another password of replication is used from now on");
        self.ask(cmd("CONFIG").arg("SET").arg("primaryauth").arg(self.users.primaryauth()?)).await
    }
}

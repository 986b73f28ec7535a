//! The fence: the operator looks and acts as `op-<epoch>`. Making that user deletes the users of all lower epochs, which
//! closes their connections; a server that knows a higher epoch is left alone. The permanent user only manages users.

use super::{Error, connection::Connection, secret::Credentials};
use redis::cmd;
use valkeeper_core::ids::WriterEpoch;

/// Prefix of the users of writer epochs.
const EPOCH_USER_PREFIX: &str = "op-";

/// ACL rules the permanent user needs besides its password: it manages users and can do nothing else.
pub const MANAGER_RULES: &[&str] = &["+acl|users", "+acl|setuser", "+acl|deluser"];

/// ACL rules of an epoch's user: what looking and the effects send, no key and no channel.
pub const EPOCH_RULES: &[&str] = &["+ping", "+info", "+replicaof", "+failover", "+client|kill"];

/// Name of the user of `epoch`.
pub fn epoch_user(epoch: WriterEpoch) -> String {
    format!("{EPOCH_USER_PREFIX}{epoch}")
}

fn epoch_of(user: &str) -> Option<WriterEpoch> {
    let epoch = user.strip_prefix(EPOCH_USER_PREFIX)?.parse().ok().map(WriterEpoch)?;
    // `op-007` parses as well but is no user of ours.
    (epoch_user(epoch) == user).then_some(epoch)
}

/// Makes the connection one of the epoch's user. [`Error::Fenced`] if the server knows a higher epoch.
pub(super) async fn log_in(connection: &Connection, credentials: &Credentials) -> Result<(), Error> {
    let Credentials { manager, manager_password, epoch, epoch_password } = credentials;
    let user = epoch_user(*epoch);
    authenticate(connection, manager, manager_password.expose()).await?;
    refuse_if_deposed(*epoch, &epochs(connection).await?)?;
    make_user(connection, &user, &epoch_password.sha256()).await?;

    // Look again: of two writers that pass here at the same time, the lower sees the higher or is seen by it.
    let known = epochs(connection).await?;
    if let Err(fenced) = refuse_if_deposed(*epoch, &known) {
        delete_users(connection, vec![user]).await?;
        return Err(fenced);
    }
    delete_users(connection, known.into_iter().filter(|other| other < epoch).map(epoch_user).collect())
        .await?;
    authenticate(connection, &user, epoch_password.expose()).await
}

async fn authenticate(connection: &Connection, user: &str, password: &str) -> Result<(), Error> {
    connection.ask::<()>(cmd("AUTH").arg(user).arg(password)).await
}

async fn make_user(connection: &Connection, user: &str, password_sha256: &str) -> Result<(), Error> {
    let mut setuser = cmd("ACL");
    setuser
        .arg("SETUSER")
        .arg(user)
        .arg("reset")
        .arg("on")
        .arg(format!("#{password_sha256}"))
        .arg(EPOCH_RULES);
    // The server's refusal repeats the rule it dislikes, which may be the hash.
    connection.ask::<()>(&setuser).await.map_err(|error| match error {
        Error::Refusal(_) => Error::Refusal(format!("the rules of user {user}")),
        Error::Refused
        | Error::Silent
        | Error::Closed
        | Error::Unreachable(_)
        | Error::Unauthorized(_)
        | Error::Fenced { .. }
        | Error::Garbled(_) => error,
    })
}

async fn epochs(connection: &Connection) -> Result<Vec<WriterEpoch>, Error> {
    let users: Vec<String> = connection.ask(cmd("ACL").arg("USERS")).await?;
    Ok(users.iter().filter_map(|user| epoch_of(user)).collect())
}

async fn delete_users(connection: &Connection, users: Vec<String>) -> Result<(), Error> {
    if users.is_empty() {
        return Ok(());
    }
    let _deleted: i64 = connection.ask(cmd("ACL").arg("DELUSER").arg(users)).await?;
    Ok(())
}

fn refuse_if_deposed(ours: WriterEpoch, known: &[WriterEpoch]) -> Result<(), Error> {
    match known.iter().max() {
        Some(&theirs) if theirs > ours => Err(Error::Fenced { ours, theirs }),
        Some(_) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_users_of_epochs_are_taken_for_such() {
        assert_eq!(epoch_of("op-7"), Some(WriterEpoch(7)));
        for other in [
            "op-",
            "op-x",
            "op-007",
            "op--1",
            "op-+1",
            "ops",
            "default",
            "valkeeper",
            "op-99999999999999999999",
        ] {
            assert_eq!(epoch_of(other), None, "{other}");
        }
    }

    #[test]
    fn a_higher_epoch_deposes_and_an_equal_or_lower_does_not() {
        let ours = WriterEpoch(5);
        assert_eq!(refuse_if_deposed(ours, &[WriterEpoch(4), WriterEpoch(5)]), Ok(()));
        assert_eq!(refuse_if_deposed(ours, &[]), Ok(()));
        let refused = refuse_if_deposed(ours, &[WriterEpoch(4), WriterEpoch(6)]);
        assert_eq!(refused, Err(Error::Fenced { ours, theirs: WriterEpoch(6) }));
    }
}

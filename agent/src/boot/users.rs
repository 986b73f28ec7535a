//! The server's users: a copy of the mounted file with the agent's own.

use super::USER;
use crate::args::Config;
use sha2::{Digest, Sha256};
use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};
use valkeeper_core::spec::Topology;

/// The agent's user at its server: what it needs and no key.
const RULES: &str = "+ping +info +auth +config|get +config|set +replicaof +client +command|list +acl|users";
/// What it needs in Cluster mode beside that. MIGRATESLOTS is not named: it came with 9.0, and a server that finds a word in its
/// users' file which it does not know does not start; which version that is, nobody knows before. So it is all of CLUSTER, less what
/// drops slots, data or the node at once, by names that every version since 8.0 knows. Keys are for MIGRATE alone, hence the selector (7.0).
const RULES_CLUSTER: &str = "+wait +eval_ro +cluster -cluster|reset -cluster|flushslots -cluster|delslots -cluster|delslotsrange \
    (+migrate ~*)";
/// Whom a replica logs in as where the file does not say.
const USER_DEFAULT: &str = "default";

/// As whom the servers of a cluster log in at each other. It is never shown.
pub struct Login {
    pub user: String,
    pub password: String,
}

/// The mounted files, the copy, and the agent's own user in it.
#[derive(Clone, Debug)]
pub struct Users {
    mounted: PathBuf,
    auth: PathBuf,
    copy: PathBuf,
    /// The agent's own line.
    own: String,
}

impl Users {
    /// With all of their files in this directory.
    #[cfg(test)]
    pub fn of(dir: &std::path::Path) -> Users {
        let [mounted, auth, copy] = ["users.acl", "auth.conf", "copy"].map(|name| dir.join(name));
        Users { mounted, auth, copy, own: format!("user {USER} on #dd -@all +info") }
    }

    pub fn new(config: &Config, password: &str) -> Users {
        let args = &config.args;
        let hash: String = Sha256::digest(password.as_bytes()).iter().map(|b| format!("{b:02x}")).collect();
        let more = match config.topology {
            Topology::Replication => String::new(),
            Topology::Cluster => format!(" {RULES_CLUSTER}"),
        };
        Users {
            mounted: args.aclfile.clone(),
            auth: args.aclfile.with_file_name("auth.conf"),
            copy: args.run_dir.join("valkeeper-users.acl"),
            own: format!("user {USER} on #{hash} resetkeys resetchannels -@all {RULES}{more}"),
        }
    }

    /// Where the server reads them.
    pub fn file(&self) -> &PathBuf {
        &self.copy
    }

    /// Writes the copy that the server reads next.
    pub fn write(&self) -> io::Result<()> {
        let text = self.render(&read(&self.mounted)?);
        let _ = fs::remove_file(&self.copy);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.copy)?;
        file.write_all(text.as_bytes())
    }

    fn render(&self, mounted: &str) -> String {
        let is_own = |line: &&str| line.split_whitespace().nth(1) == Some(USER);
        let others = mounted.lines().filter(|line| !is_own(line));
        others.chain([self.own.as_str()]).map(|line| format!("{line}\n")).collect()
    }

    /// The password that a replica logs in at its primary with, empty if there is none.
    pub fn primaryauth(&self) -> io::Result<String> {
        Ok(self.login()?.password)
    }

    /// Who a replica is to its primary.
    pub fn login(&self) -> io::Result<Login> {
        let text = match read(&self.auth) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text?,
        };
        let last = |directive: &str| {
            let words = text.lines().filter_map(|line| line.trim().split_once(' '));
            words.filter(|(name, _)| *name == directive).map(|(_, value)| value.trim().to_owned()).next_back()
        };
        let user = last("primaryuser").unwrap_or_else(|| USER_DEFAULT.to_owned());
        Ok(Login { user, password: last("primaryauth").unwrap_or_default() })
    }
}

fn read(path: &PathBuf) -> io::Result<String> {
    fs::read_to_string(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const MOUNTED: &str = "user default on #aa ~* &* +@all\nuser valkeeper on #bb -@all +info\n\
        user replica on #cc -@all +psync\nuser valkeeper-agent on nopass ~* +@all";

    #[test]
    fn everybody_is_in_the_copy_but_who_claims_the_agents_own_name() {
        let text = Users::of(Path::new("")).render(MOUNTED);
        assert_eq!(
            text,
            "user default on #aa ~* &* +@all\nuser valkeeper on #bb -@all +info\nuser replica on #cc -@all +psync\n\
             user valkeeper-agent on #dd -@all +info\n"
        );
    }
}

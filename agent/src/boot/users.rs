//! The server's users: a copy of the mounted file with the agent's own, and what becomes of it when what is mounted changes.

use super::USER;
use crate::args::Config;
use sha2::{Digest, Sha256};
use std::{
    collections::VecDeque,
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;
use valkeeper_core::spec::Topology;

/// The agent's user at its server: what it needs and no key.
const RULES: &str =
    "+ping +info +auth +config|get +config|set +replicaof +client +command|list +acl|users +acl|setuser";
/// What it needs in Cluster mode beside that. MIGRATESLOTS is not named: it came with 9.0, and a server that finds a word in its
/// users' file which it does not know does not start; which version that is, nobody knows before. So it is all of CLUSTER, less what
/// drops slots, data or the node at once, by names that every version since 8.0 knows. Keys are for MIGRATE alone, hence the selector (7.0).
const RULES_CLUSTER: &str = "+wait +eval_ro +cluster -cluster|reset -cluster|flushslots -cluster|delslots -cluster|delslotsrange \
    (+migrate ~*)";
/// Whom a replica logs in as where the file does not say.
const USER_DEFAULT: &str = "default";

/// How long older passwords are tried first. Then every member has had the newest: kubelet brings a changed Secret within 90 s.
const SETTLED_AFTER: Duration = Duration::from_secs(120);
/// How many versions of the files are remembered: of a Secret that was changed twice in a minute some members have missed one.
const VERSIONS_MAX: usize = 4;

/// As whom the servers of a cluster log in at each other. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    pub user: String,
    pub password: String,
}

/// One version of the mounted files.
#[derive(PartialEq, Eq)]
struct Files {
    users: String,
    login: Login,
    /// SHA-256 of both texts, in hex.
    digest: String,
}

/// The versions that this agent has seen, the newest first.
#[derive(Default)]
struct Versions {
    files: VecDeque<Files>,
    /// When the newest was seen.
    since: Option<Instant>,
    /// Which of their logins is used.
    used: usize,
}

/// The mounted files, the copy, and the agent's own user in it.
///
/// Kubelet brings a changed Secret to each member at another moment. So whoever was let in by a version that this agent has seen is let in until
/// the pod goes, and the passwords of replication are tried in turn.
#[derive(Clone)]
pub struct Users {
    mounted: PathBuf,
    auth: PathBuf,
    copy: PathBuf,
    /// The agent's own line.
    own: String,
    /// The user that the operator looks as, and the hash by which this agent logs it in.
    operator: (String, String),
    versions: Arc<Mutex<Versions>>,
}

impl Users {
    /// With all of their files in this directory.
    #[cfg(test)]
    pub fn of(dir: &std::path::Path) -> Users {
        let [mounted, auth, copy] = ["users.acl", "auth.conf", "copy"].map(|name| dir.join(name));
        let own = format!("user {USER} on #dd -@all +info");
        let operator = ("valkeeper".to_owned(), "#ee".to_owned());
        Users { mounted, auth, copy, own, operator, versions: Arc::default() }
    }

    pub fn new(config: &Config, password: &str) -> Users {
        let args = &config.args;
        let hash = hex(password.as_bytes());
        let more = match config.topology {
            Topology::Replication => String::new(),
            Topology::Cluster => format!(" {RULES_CLUSTER}"),
        };
        Users {
            mounted: args.aclfile.clone(),
            auth: args.aclfile.with_file_name("auth.conf"),
            copy: args.run_dir.join("valkeeper-users.acl"),
            own: format!("user {USER} on #{hash} resetkeys resetchannels -@all {RULES}{more}"),
            operator: (args.operator_user.clone(), format!("#{hash}")),
            versions: Arc::default(),
        }
    }

    /// Where the server reads them.
    pub fn file(&self) -> &PathBuf {
        &self.copy
    }

    /// Writes the copy that the server reads next.
    pub fn write(&self) -> io::Result<()> {
        self.take_in()?;
        let text: String = self.lines().into_iter().map(|line| format!("{line}\n")).collect();
        let _ = fs::remove_file(&self.copy);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.copy)?;
        file.write_all(text.as_bytes())
    }

    /// Reads the mounted files. True if they are not what they were.
    pub fn take_in(&self) -> io::Result<bool> {
        let read = self.read()?;
        let mut versions = self.versions();
        let Versions { files, since, used } = &mut *versions;
        if files.front() == Some(&read) {
            return Ok(false);
        }
        // The login in use stays so, under its next number.
        *used = if files.is_empty() { 0 } else { (*used + 1).min(VERSIONS_MAX - 1) };
        *since = Some(Instant::now());
        files.push_front(read);
        files.truncate(VERSIONS_MAX);
        Ok(true)
    }

    /// The users that a server shall have, each in a line: as the newest version has them, with the hashes that they had before, too.
    pub fn lines(&self) -> Vec<String> {
        let versions = self.versions();
        let Some(newest) = versions.files.front() else { return vec![self.own.clone()] };
        let name_of = |line: &str| line.split_whitespace().nth(1).unwrap_or_default().to_owned();
        let with_older = |line: &str| {
            let name = name_of(line);
            let mut whole = line.to_owned();
            let older = versions.files.iter().skip(1).flat_map(|files| files.users.lines());
            let hashes = older.filter(|line| name_of(line) == name).flat_map(str::split_whitespace);
            let operators = (name == self.operator.0).then_some(self.operator.1.as_str());
            if line.split_whitespace().any(|word| word == "nopass") {
                // Any password is right, and one more would make it the only one.
                return whole;
            }
            for hash in hashes.filter(|word| word.starts_with(['#', '>'])).chain(operators) {
                if !whole.split_whitespace().any(|word| word == hash) {
                    whole.push(' ');
                    whole.push_str(hash);
                }
            }
            whole
        };
        let others = newest.users.lines().filter(|line| !line.trim().is_empty() && name_of(line) != USER);
        others.map(with_older).chain([self.own.clone()]).collect()
    }

    /// The line of the user that the operator looks as.
    pub fn operators_line(&self) -> Option<String> {
        self.lines().into_iter().find(|line| line.split_whitespace().nth(1) == Some(&self.operator.0))
    }

    /// The user that the operator looks as.
    pub fn operator(&self) -> &str {
        &self.operator.0
    }

    /// The password that a replica logs in at its primary with, empty if there is none.
    pub fn primaryauth(&self) -> io::Result<String> {
        Ok(self.logins()?.swap_remove(0).password)
    }

    /// Who a replica is to its primary: first what is used, then what may be.
    pub fn logins(&self) -> io::Result<Vec<Login>> {
        if self.versions().files.is_empty() {
            self.take_in()?;
        }
        let versions = self.versions();
        let used = versions.files.get(versions.used).or(versions.files.front());
        let mut all: Vec<Login> = Vec::new();
        for files in used.into_iter().chain(&versions.files) {
            if !all.contains(&files.login) {
                all.push(files.login.clone());
            }
        }
        Ok(all)
    }

    /// The next login is used from now on, if there are several: the one in use was refused, or nobody can say. True if it is another.
    pub fn try_next(&self) -> bool {
        let mut versions = self.versions();
        let before = versions.login();
        for _ in 0..versions.files.len() {
            versions.used = (versions.used + 1) % versions.files.len();
            if versions.login() != before {
                return true;
            }
        }
        false
    }

    /// True once: the newest login is used from now on, as every member has had it by now.
    pub fn settles(&self) -> bool {
        let mut versions = self.versions();
        let due = versions.since.is_some_and(|since| since.elapsed() >= SETTLED_AFTER);
        if !due {
            return false;
        }
        versions.since = None;
        let before = versions.login();
        versions.used = 0;
        versions.login() != before
    }

    /// Which version is the newest that was seen; empty before any was.
    pub fn mounted(&self) -> String {
        self.versions().files.front().map(|files| files.digest.clone()).unwrap_or_default()
    }

    fn read(&self) -> io::Result<Files> {
        let users = read(&self.mounted)?;
        let auth = match read(&self.auth) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text?,
        };
        let last = |directive: &str| {
            let words = auth.lines().filter_map(|line| line.trim().split_once(' '));
            words.filter(|(name, _)| *name == directive).map(|(_, value)| value.trim().to_owned()).next_back()
        };
        let user = last("primaryuser").unwrap_or_else(|| USER_DEFAULT.to_owned());
        let login = Login { user, password: last("primaryauth").unwrap_or_default() };
        // A password of replication is in it, which nobody guesses: so nothing else of it can be.
        let digest = hex(&[users.as_bytes(), b"\0", auth.as_bytes()].concat());
        Ok(Files { users, login, digest })
    }

    fn versions(&self) -> MutexGuard<'_, Versions> {
        // Every change under it is one step.
        self.versions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Versions {
    fn login(&self) -> Option<Login> {
        self.files.get(self.used).map(|files| files.login.clone())
    }
}

fn hex(text: &[u8]) -> String {
    Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect()
}

fn read(path: &PathBuf) -> io::Result<String> {
    fs::read_to_string(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTED: &str = "user default on #aa ~* &* +@all\nuser valkeeper on #bb -@all +info\n\
        user replica on #cc -@all +psync\nuser valkeeper-agent on nopass ~* +@all";

    /// Users in a directory of their own.
    fn users(name: &str) -> (Users, PathBuf) {
        let dir = std::env::temp_dir().join(format!("valkeeper-users-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        mount(&dir, MOUNTED, "first");
        (Users::of(&dir), dir)
    }

    fn mount(dir: &std::path::Path, users: &str, password: &str) {
        fs::write(dir.join("users.acl"), users).unwrap();
        fs::write(dir.join("auth.conf"), format!("primaryuser replica\nprimaryauth {password}\n")).unwrap();
    }

    fn passwords(users: &Users) -> Vec<String> {
        users.logins().unwrap().into_iter().map(|login| login.password).collect()
    }

    #[test]
    fn everybody_is_in_the_copy_but_who_claims_the_agents_own_name() {
        let (users, dir) = users("copy");
        users.write().unwrap();
        assert_eq!(
            fs::read_to_string(users.file()).unwrap(),
            "user default on #aa ~* &* +@all\nuser valkeeper on #bb -@all +info #ee\n\
             user replica on #cc -@all +psync\nuser valkeeper-agent on #dd -@all +info\n"
        );
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn who_was_let_in_before_a_change_is_let_in_after_it() {
        let (users, dir) = users("change");
        assert!(users.take_in().unwrap() && !users.take_in().unwrap());
        mount(&dir, "user default on #a2 ~* &* +@all\nuser replica on #cc -@all +psync\n\n", "second");
        assert!(users.take_in().unwrap());
        assert_eq!(
            users.lines(),
            [
                "user default on #a2 ~* &* +@all #aa",
                "user replica on #cc -@all +psync",
                "user valkeeper-agent on #dd -@all +info"
            ]
        );
        mount(&dir, MOUNTED, "third");
        assert!(users.take_in().unwrap());
        assert_eq!(users.lines()[0], "user default on #aa ~* &* +@all #a2");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn the_login_in_use_stays_until_it_is_refused_or_everybody_has_the_newest() {
        let (users, dir) = users("login");
        assert_eq!(passwords(&users), ["first"]);
        assert!(!users.try_next(), "there is no other");
        mount(&dir, MOUNTED, "second");
        assert!(users.take_in().unwrap());
        assert_eq!(passwords(&users), ["first", "second"]);
        mount(&dir, "user default on #a3 +@all", "second");
        assert!(users.take_in().unwrap());
        assert_eq!(passwords(&users), ["first", "second"]);
        assert!(users.try_next());
        assert_eq!(passwords(&users), ["second", "first"]);
        assert!(users.try_next());
        assert_eq!(passwords(&users), ["first", "second"]);
        assert!(!users.settles(), "two minutes have not gone by");
        users.versions().since = Instant::now().checked_sub(SETTLED_AFTER);
        assert!(users.settles() && !users.settles());
        assert_eq!(passwords(&users), ["second", "first"]);
        fs::remove_dir_all(dir).unwrap();
    }
}

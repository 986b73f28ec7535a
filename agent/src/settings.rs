//! Directives that the server takes while it runs, as the operator tells them. What it took goes into the pod's copy of the configuration
//! file, so that the next server of this pod begins with it.

use crate::{args::Config, boot, local, shared::Agent};
use std::{fs, io, path::Path};
use valkeeper_agent::wire::Malformed;
use valkeeper_core::config::{self, Directive, LiveSetting, SETTINGS_MARK};

/// Most directives that are understood at once: a version of Valkey has about a hundred that can change while it runs. Count.
const SETTINGS_MAX: usize = 256;
/// Longest value. Bytes: as much as an operator takes in a whole spec.
const VALUE_BYTES_MAX: usize = 8 << 10;
/// Longest digest. Characters: those of SHA-256 in hex.
const DIGEST_CHARS_MAX: usize = 64;

/// Stands for the digest of a server's settings while nobody knows them: it is nobody's.
const UNSETTLED: &str = "unsettled";

/// Why settings were not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server's answer, or none.
    #[error(transparent)]
    Server(#[from] local::Error),
    /// They may be in the server, and the next one would begin without them.
    #[error("the copy of the configuration file: {0}")]
    Copy(#[from] io::Error),
}

/// Reads what is to be taken: nothing but directives that may be, so that no mistake opens a port.
pub fn read(digest: &str, told: Vec<valkeeper_agent::proto::Setting>) -> Result<Vec<LiveSetting>, Malformed> {
    let plain = digest.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if !plain || digest.is_empty() || digest.len() > DIGEST_CHARS_MAX {
        return Err(Malformed("digest"));
    }
    if told.len() > SETTINGS_MAX {
        return Err(Malformed("settings"));
    }
    let one = |valkeeper_agent::proto::Setting { name, words, named }| {
        let known = Directive::find(&name).filter(|directive| directive.live.is_some());
        let bytes: usize = words.iter().map(String::len).sum();
        let fits = bytes <= VALUE_BYTES_MAX && !words.is_empty();
        match known.filter(|_| fits) {
            Some(directive) => Some(Ok(LiveSetting { name: directive.name, words, named })),
            None if named => Some(Err(Malformed("settings"))),
            // A later operator knows more of them, and no configuration of this agent's server has named it.
            None => None,
        }
    };
    told.into_iter().filter_map(one).collect()
}

/// The digest of the settings that a server of this pod begins with; empty if the configuration does not say.
pub fn kept(config: &Config) -> String {
    let Some(path) = boot::configuration(&config.args.command) else { return String::new() };
    match fs::read_to_string(path) {
        Ok(text) => config::settings_of(&text).unwrap_or_default().to_owned(),
        Err(error) => {
            tracing::warn!(%error, path, "the server's settings are not known");
            UNSETTLED.to_owned()
        }
    }
}

/// Has the server take what it lacks, all or nothing, and keeps it. Until that is done, or the server has refused all of it, nobody knows
/// which settings it has: the next time it is told every one of them.
pub async fn take(agent: &Agent, digest: &str, settings: &[LiveSetting]) -> Result<(), Error> {
    let path = boot::configuration(&agent.config.args.command)
        .ok_or_else(|| io::Error::other("the server was started without one"))?;
    let text = fs::read_to_string(path)?;
    let before = agent.update(|known| std::mem::replace(&mut known.settings, UNSETTLED.to_owned()));
    let is_open = before == UNSETTLED;
    let lacking: Vec<&LiveSetting> =
        settings.iter().filter(|setting| is_open || lacks(&text, setting)).collect();
    if !lacking.is_empty() {
        let names: Vec<&str> = lacking.iter().map(|setting| setting.name).collect();
        let all = lacking.iter().map(|setting| (setting.name, setting.words.join(" ")));
        if let Err(error) = agent.local.configure(all).await {
            if let local::Error::Refused(_) = &error {
                agent.update(|known| known.settings = before);
            }
            return Err(error.into());
        }
        tracing::info!(?names, "the server has other settings");
    }
    replace(Path::new(path), &rewritten(&text, digest, settings))?;
    agent.update(|known| digest.clone_into(&mut known.settings));
    Ok(())
}

/// A whole file or the one before.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let unfinished = path.with_extension("conf.new");
    fs::write(&unfinished, text)?;
    fs::rename(&unfinished, path)
}

fn names(line: &str, name: &str) -> bool {
    line.split_whitespace().next() == Some(name)
}

/// True if a server of this configuration has something else.
fn lacks(text: &str, setting: &LiveSetting) -> bool {
    let last = text.lines().rfind(|line| names(line, setting.name));
    if setting.named {
        last != Some(config::line(setting.name, &setting.words).as_str())
    } else {
        last.is_some()
    }
}

/// The configuration with these settings, everything else as it is.
fn rewritten(text: &str, digest: &str, settings: &[LiveSetting]) -> String {
    let stays = |line: &&str| {
        !line.starts_with(SETTINGS_MARK) && !settings.iter().any(|setting| names(line, setting.name))
    };
    let kept = text.lines().filter(stays).map(str::to_owned);
    let named = settings.iter().filter(|setting| setting.named);
    let all = kept.chain([format!("{SETTINGS_MARK}{digest}")]);
    all.chain(named.map(|setting| config::line(setting.name, &setting.words)))
        .map(|line| line + "\n")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(name: &'static str, word: &str, named: bool) -> LiveSetting {
        LiveSetting { name, words: vec![word.to_owned()], named }
    }

    #[test]
    fn the_server_is_told_what_it_lacks_and_the_next_one_begins_with_all_of_it() {
        let text = "# settings old\nappendonly yes\nhz 20\nmaxclients 64\nslowlog-max-len 9\n";
        let all = [
            setting("hz", "20", true),
            setting("maxclients", "100", true),
            setting("slowlog-max-len", "128", false),
            setting("timeout", "0", false),
            setting("availability-zone", "a b", true),
        ];
        let lacking: Vec<&str> = all.iter().filter(|s| lacks(text, s)).map(|s| s.name).collect();
        assert_eq!(lacking, ["maxclients", "slowlog-max-len", "availability-zone"]);
        let after = rewritten(text, "new", &all);
        assert_eq!(
            after,
            "appendonly yes\n# settings new\nhz 20\nmaxclients 100\navailability-zone \"a b\"\n"
        );
        assert!(!all.iter().any(|setting| lacks(&after, setting)), "nothing is told twice");
    }

    #[test]
    fn nothing_else_is_taken() {
        let told = |name: &str, words: &[&str]| valkeeper_agent::proto::Setting {
            name: name.to_owned(),
            words: words.iter().map(|word| (*word).to_owned()).collect(),
            named: true,
        };
        assert_eq!(read("ab-1", vec![told("hz", &["20"])]).unwrap(), [setting("hz", "20", true)]);
        let unnamed = valkeeper_agent::proto::Setting { named: false, ..told("of-a-later-version", &["1"]) };
        assert_eq!(read("ab", vec![unnamed]).unwrap(), []);
        for bad in
            [told("port", &["1"]), told("io-threads", &["2"]), told("nothing", &["1"]), told("hz", &[])]
        {
            assert_eq!(read("ab", vec![bad.clone()]), Err(Malformed("settings")), "{bad:?}");
        }
        assert_eq!(read("a\nb", Vec::new()), Err(Malformed("digest")));
        assert_eq!(read("", Vec::new()), Err(Malformed("digest")));
    }
}

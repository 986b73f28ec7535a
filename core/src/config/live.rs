//! Directives that a server takes while it runs: what it shall have, and how it is known what it has. A change of these alone restarts
//! nobody.

use super::{DIRECTIVES, Directive, ServerConfig, quoted};
use crate::ids::Digest;
use std::collections::BTreeMap;
use uuid::Uuid;

/// How the line of valkey.conf begins that says which settings are in it, of those that can change while a server runs.
pub const SETTINGS_MARK: &str = "# settings ";

/// Its value is told class by class, and a server keeps what it has of the classes that are not told: so all are, and what is named last counts.
const BY_CLASS: &str = "client-output-buffer-limit";

/// A directive as a running server shall have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveSetting {
    /// The directive.
    pub name: &'static str,
    /// Its value, word by word; a text is one word.
    pub words: Vec<String>,
    /// False if the configuration does not name it: it is what a server has by itself, and matters to one that was told otherwise.
    pub named: bool,
}

impl ServerConfig {
    /// What a server of this configuration shall have, of all that it takes while it runs.
    pub fn live(&self) -> Vec<LiveSetting> {
        let all = self.all();
        let taken = DIRECTIVES.iter().filter(|directive| directive.is_in(self.version));
        let settings = taken.filter_map(|Directive { name, live, .. }| {
            let default = (*live)?;
            let mut named = all.get(name).map(super::Setting::words);
            if let Some(words) = named.as_mut().filter(|_| *name == BY_CLASS) {
                words.splice(0..0, default.split(' ').map(str::to_owned));
            }
            // Of a default that is several words a server is told as of one text.
            let words = named.clone().unwrap_or_else(|| vec![default.to_owned()]);
            Some(LiveSetting { name, words, named: named.is_some() })
        });
        settings.collect()
    }

    /// Tells these settings from others.
    pub fn live_digest(&self) -> Digest {
        let named = self.live().into_iter().filter(|setting| setting.named);
        let text: String = named.map(|setting| line(setting.name, &setting.words) + "\n").collect();
        Digest(Uuid::new_v5(&Uuid::NAMESPACE_OID, text.as_bytes()).to_string())
    }

    /// What a server takes at its start alone, as one text: another means a restart.
    pub fn fixed_text(&self) -> String {
        let mut all = self.all();
        all.retain(|name, _| Directive::find(name).is_none_or(|directive| directive.live.is_none()));
        all.iter().map(|(name, setting)| format!("{name} {}\n", setting.render())).collect()
    }

    /// The settings of the user that a server takes while it runs, as they stand in valkey.conf.
    pub fn live_of_user(&self) -> BTreeMap<String, String> {
        let is_live = |name: &str| Directive::find(name).is_some_and(|directive| directive.live.is_some());
        let of_user = self.settings.iter().filter(|(name, _)| is_live(name));
        of_user.map(|(name, setting)| (name.clone(), setting.render())).collect()
    }
}

/// A directive as it stands in valkey.conf.
pub fn line(name: &str, words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    format!("{name} {}", words.join(" "))
}

/// The digest of the settings in a valkey.conf, if it says so.
pub fn settings_of(conf: &str) -> Option<&str> {
    conf.lines().find_map(|line| line.strip_prefix(SETTINGS_MARK)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Files, ServerVersion, read},
        spec::Profile,
    };

    fn config(settings: &[(&str, &str)]) -> ServerConfig {
        let version = ServerVersion { major: 9, minor: 1 };
        let read = |(name, value): &(&str, &str)| ((*name).to_owned(), read(name, value, version).unwrap());
        ServerConfig {
            version,
            profile: Profile::Cache,
            node_timeout_ms: None,
            files: Files::Rdb,
            memory_limit_bytes: None,
            settings: settings.iter().map(read).collect(),
        }
    }

    fn of<'a>(all: &'a [LiveSetting], name: &str) -> &'a LiveSetting {
        all.iter().find(|setting| setting.name == name).unwrap()
    }

    #[test]
    fn what_is_named_and_what_is_not_any_more_is_told() {
        let all = config(&[("slowlog-max-len", "7"), ("maxmemory-clients", "5%")]).live();
        assert_eq!(of(&all, "slowlog-max-len").words, ["7"]);
        assert_eq!(of(&all, "maxmemory-clients").words, ["5%"]);
        assert!(of(&all, "slowlog-max-len").named);
        assert!(of(&all, "appendfsync").named, "by the operator");
        let unnamed = of(&all, "latency-tracking-info-percentiles");
        assert_eq!((unnamed.words.as_slice(), unnamed.named), (&["50 99 99.9".to_owned()][..], false));
        let told_by_others = ["io-threads", "min-replicas-to-write", "tcp-backlog", "port"];
        assert!(all.iter().all(|setting| !told_by_others.contains(&setting.name)));
    }

    #[test]
    fn of_a_directive_with_classes_all_are_told_and_the_named_ones_last() {
        let all = config(&[(BY_CLASS, "pubsub 1 2 3")]).live();
        let words = of(&all, BY_CLASS).words.join(" ");
        let default = Directive::find(BY_CLASS).unwrap().live.unwrap();
        assert_eq!(words, format!("{default} pubsub 1 2 3"));
    }

    #[test]
    fn only_a_setting_that_needs_a_restart_changes_the_text_that_means_one() {
        let (plain, live) = (config(&[]), config(&[("slowlog-max-len", "7")]));
        assert_eq!(plain.fixed_text(), live.fixed_text());
        assert_ne!(plain.live_digest(), live.live_digest());
        let restarts = config(&[("tcp-backlog", "7")]);
        assert_ne!(plain.fixed_text(), restarts.fixed_text());
        assert_eq!(plain.live_digest(), restarts.live_digest());
        assert_eq!(settings_of(&live.render()), Some(live.live_digest().0.as_str()));
        assert_eq!(settings_of("port 1\n"), None);
    }

    #[test]
    fn letters_that_are_no_events_are_refused_with_those_that_are() {
        let refusal =
            read("notify-keyspace-events", "XYZ", ServerVersion { major: 9, minor: 1 }).unwrap_err();
        assert_eq!(refusal.to_string(), "allowed: letters of AKEg$lshzxetdmn");
    }
}

//! What a server said that ended before it ever answered: the reason why a member does not start, for the operator to show.

use std::collections::VecDeque;

/// A fatal error of the configuration has four lines.
const LINES_MAX: usize = 4;
/// Of one line. Characters.
const LINE_CHARS_MAX: usize = 120;

/// The lines of the server that runs, and the end of the one before.
#[derive(Debug, Default)]
pub struct LastWords {
    lines: VecDeque<String>,
    has_answered: bool,
    has_begun: bool,
    failure: String,
}

impl LastWords {
    /// A server is started. What the one before said is complete by now, or will be at the next start.
    pub fn begin(&mut self, exited: &str) {
        if self.has_begun && !self.has_answered && !exited.is_empty() {
            let lines: Vec<&str> = self.lines.iter().map(String::as_str).collect();
            self.failure = format!("{exited}: {}", lines.join(" / "));
        }
        self.lines.clear();
        (self.has_begun, self.has_answered) = (true, false);
    }

    /// The server said something that may be why it ends. A line that could name a password is left out.
    pub fn say(&mut self, line: &str) {
        let line: String = line.trim().chars().take(LINE_CHARS_MAX).map(visible).collect();
        let lower = line.to_lowercase();
        let is_telling =
            !line.is_empty() && !["auth", "pass", "acl", "user"].iter().any(|word| lower.contains(word));
        if self.has_answered || !is_telling {
            return;
        }
        if self.lines.len() == LINES_MAX {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// It answers.
    pub fn answered(&mut self) {
        self.has_answered = true;
        self.failure.clear();
        self.lines.clear();
    }

    /// How the last one ended that never answered; empty since one has.
    pub fn start_failure(&self) -> &str {
        &self.failure
    }
}

fn visible(c: char) -> char {
    if c == ' ' || c.is_ascii_graphic() { c } else { '?' }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(words: &mut LastWords) {
        for line in [
            "",
            "*** FATAL CONFIG FILE ERROR ***",
            "Reading the configuration file, at line 30",
            ">>> 'x \"Y\"'",
            "Wrong\tclass.",
        ] {
            words.say(line);
        }
    }

    #[test]
    fn what_a_server_says_that_never_answers_is_told_from_the_next_start_on_until_one_answers() {
        let mut words = LastWords::default();
        words.begin("");
        fails(&mut words);
        assert_eq!(words.start_failure(), "", "its end is not seen yet");
        for _ in 0..2 {
            words.begin("exit 1");
            let told = "exit 1: *** FATAL CONFIG FILE ERROR *** / Reading the configuration file, at line 30 / >>> 'x \"Y\"' / Wrong?class.";
            assert_eq!(words.start_failure(), told, "the same words are the same news");
            fails(&mut words);
            assert_eq!(words.start_failure(), told);
        }
        words.answered();
        assert_eq!(words.start_failure(), "");
        words.say("out of memory");
        words.begin("signal 9");
        assert_eq!(words.start_failure(), "", "it had answered");
    }

    #[test]
    fn lines_are_bounded_and_none_is_told_that_may_name_a_password() {
        let mut words = LastWords::default();
        words.begin("");
        for n in 0..10 {
            words.say(&format!("{n}{}", "x".repeat(1_000)));
        }
        words.say(">>> 'requirepass hunter2'");
        words.say("users.acl:3: Error in applying operation '>hunter2'");
        words.begin("exit 1");
        assert!(
            words.start_failure().chars().count() < 520 && words.start_failure().starts_with("exit 1: 6x")
        );
        assert!(!words.start_failure().contains("hunter2"));
    }
}

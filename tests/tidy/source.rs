//! The project's files as text, and Rust as code: without comments and literals.

use std::{collections::BTreeSet, fs, path::Path, sync::OnceLock};

/// A text file of the project.
pub struct Source {
    /// From the root, with `/`.
    pub path: String,
    pub text: String,
    /// Rust only: the text with comments and literals blanked.
    pub code: String,
}

impl Source {
    pub fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Every place where `needle` stands in the code, not as a part of longer words.
    pub fn places(&self, needle: &str) -> Vec<String> {
        let begins = |at: usize| !self.code[..at].ends_with(in_word);
        let ends =
            |at: usize| !(needle.ends_with(in_word) && self.code[at + needle.len()..].starts_with(in_word));
        let hits = self.code.match_indices(needle).filter(|(at, _)| begins(*at) && ends(*at));
        hits.map(|(at, _)| self.place(at)).collect()
    }

    pub fn place(&self, at: usize) -> String {
        let line = self.code[..at].matches('\n').count();
        format!("{}:{}: {}", self.path, line + 1, self.text.lines().nth(line).unwrap_or("").trim())
    }

    /// The first name after each `root::`, groups in braces included.
    pub fn imports(&self, root: &str) -> BTreeSet<&str> {
        let prefix = format!("{root}::");
        let mut names = BTreeSet::new();
        for (at, _) in self.code.match_indices(&prefix) {
            let rest = &self.code[at + prefix.len()..];
            match rest.strip_prefix('{') {
                Some(group) => names.extend(members(group)),
                None => names.extend(name(rest)),
            }
        }
        names
    }
}

fn in_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The word at the beginning of the text.
pub fn name(text: &str) -> Option<&str> {
    let text = text.trim_start();
    let end = text.find(|c| !in_word(c)).unwrap_or(text.len());
    (end > 0).then(|| &text[..end])
}

/// The first names of a brace group's members.
fn members(group: &str) -> Vec<&str> {
    let (mut depth, mut start, mut found) = (0_u32, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                found.extend(name(&group[start..at]));
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    found
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn tree() -> &'static [Source] {
    static TREE: OnceLock<Vec<Source>> = OnceLock::new();
    TREE.get_or_init(|| {
        let mut found = Vec::new();
        walk(root(), &mut found);
        found.sort_by(|a, b| a.path.cmp(&b.path));
        found
    })
}

fn walk(folder: &Path, found: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("an entry").path();
        let relative = path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
        if path.is_symlink() || ["target", ".git"].contains(&relative.as_str()) {
            continue;
        }
        if path.is_dir() {
            walk(&path, found);
        } else if let Ok(text) = fs::read_to_string(&path) {
            let code = if relative.ends_with(".rs") { mask(&text) } else { String::new() };
            found.push(Source { path: relative, text, code });
        }
    }
}

pub fn rust() -> impl Iterator<Item = &'static Source> {
    tree().iter().filter(|s| s.is_rust())
}

/// Sources of the programs, without tests and benches.
pub fn programs() -> impl Iterator<Item = &'static Source> {
    let homes = ["src/", "agent/src/", "core/src/", "journal/src/", "replay/src/"];
    rust().filter(move |s| homes.iter().any(|home| s.path.starts_with(home)))
}

pub fn read(path: &str) -> &'static Source {
    tree().iter().find(|s| s.path == path).unwrap_or_else(|| panic!("{path} is missing"))
}

/// Blanks comments and literals: rules are about code. Newlines stay, so lines keep their numbers.
fn mask(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut code, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(byte) = bytes.get(at) {
        let end = no_code(bytes, at).unwrap_or(at);
        if end == at {
            code.push(*byte);
            at += 1;
            continue;
        }
        code.extend(bytes[at..end].iter().map(|b| if *b == b'\n' { b'\n' } else { b' ' }));
        at = end;
    }
    String::from_utf8(code).expect("whole characters are blanked")
}

/// Where the comment or literal that begins at `at` ends.
fn no_code(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    let find = |from: usize, needle: &[u8]| {
        let found = rest[from..].windows(needle.len()).position(|w| w == needle);
        at + found.map_or(rest.len(), |n| from + n + needle.len())
    };
    match rest {
        [b'/', b'/', ..] => Some(find(2, b"\n") - usize::from(rest.contains(&b'\n'))),
        [b'/', b'*', ..] => Some(find(2, b"*/")),
        [b'"', ..] => Some(quoted(bytes, at, b'"')),
        [b'\'', b'\\', ..] => Some(quoted(bytes, at, b'\'')),
        [b'\'', first, ..] => {
            let width = utf8_width(*first);
            (rest.get(1 + width) == Some(&b'\'')).then_some(at + width + 2)
        }
        [b'r', ..] => {
            let hashes = rest[1..].iter().take_while(|b| **b == b'#').count();
            let end = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
            (rest.get(1 + hashes) == Some(&b'"')).then(|| find(2 + hashes, &end))
        }
        _ => None,
    }
}

fn utf8_width(first: u8) -> usize {
    match first {
        0xF0.. => 4,
        0xE0.. => 3,
        0xC0.. => 2,
        _ => 1,
    }
}

fn quoted(bytes: &[u8], at: usize, quote: u8) -> usize {
    let mut end = at + 1;
    while let Some(byte) = bytes.get(end) {
        match byte {
            b'\\' => end += 2,
            b if *b == quote => return end + 1,
            _ => end += 1,
        }
    }
    bytes.len()
}

#[test]
fn the_mask_knows_code_from_comments_and_literals() {
    let masked = mask("a // b\nc /* d\n */ \"e\\\"f\" 'g' '\\'' 'é' r#\"h\"i\"# &'j str");
    assert_eq!(masked.split_whitespace().collect::<Vec<_>>(), ["a", "c", "&'j", "str"]);
}

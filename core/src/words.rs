//! Words of somebody else's - an API server, a kubelet, a bucket, Valkey - as they may be recorded and shown: on one line, of bounded length,
//! with nothing in them that moves a terminal's cursor.

/// Most characters that are kept where nothing says otherwise: an API server names field, value and what is allowed in fewer. A condition and
/// an Event have room for more.
pub const CHARS_MAX: usize = 400;

/// The text, as it may be recorded and shown.
pub fn of_others(text: &str, chars_max: usize) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().filter(|c| !c.is_control()).take(chars_max).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_others_are_one_bounded_line_without_control_characters() {
        let said = " it\u{1b}[31m is\r\n  refused:\u{7}\t\"x\u{9b}2J\" ";
        assert_eq!(of_others(said, CHARS_MAX), "it[31m is refused: \"x2J\"");
        assert_eq!(of_others(said, 5), "it[31");
        assert_eq!(of_others(&"ä".repeat(500), CHARS_MAX).chars().count(), CHARS_MAX);
    }
}

//! `export`: the stream as JSON Lines, byte for byte what was sealed, so that the hash chain verifies elsewhere.

use std::fmt::Write;
use valkeeper_journal::{Folded, Stored, export_line};

/// One line per record; before them what the stream begins with, if its beginning was cut.
pub fn export<'a>(folded: Option<&Folded>, records: impl IntoIterator<Item = &'a Stored>) -> String {
    let mut text = folded.map(|folded| format!("{}\n", folded.text())).unwrap_or_default();
    for record in records {
        let _ = writeln!(text, "{}", export_line(record));
    }
    text
}

#[cfg(test)]
mod tests {
    use crate::{source, story};
    use valkeeper_journal::verify_lines;

    #[test]
    fn an_export_verifies_and_reads_back_as_the_same_records() {
        let stored = story::sealed(&story::failover());
        let text = super::export(None, &stored);
        assert_eq!(verify_lines(text.as_bytes()).problems, []);
        let streams = source::parse("-".as_ref(), &text).unwrap();
        assert_eq!(streams.len(), 1);
        assert_eq!(streams[0].stored, stored);
    }
}

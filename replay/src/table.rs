//! Rows and columns: aligned for people, CSV for spreadsheets.

/// Cells under named columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table<const COLUMNS: usize> {
    /// Names of the columns.
    pub header: [&'static str; COLUMNS],
    /// Cells.
    pub rows: Vec<[String; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    /// A table without rows.
    pub fn new(header: [&'static str; COLUMNS]) -> Self {
        Table { header, rows: Vec::new() }
    }

    /// Adds a row.
    pub fn push(&mut self, cells: [String; COLUMNS]) {
        self.rows.push(cells);
    }

    /// Columns two spaces apart, the last one unpadded, one line per row and one for the header.
    pub fn aligned(&self) -> String {
        let header = self.header.map(str::to_uppercase);
        let lines: Vec<&[String; COLUMNS]> = std::iter::once(&header).chain(&self.rows).collect();
        let width = |column: usize| {
            let cells = lines.iter().filter_map(|line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..COLUMNS).map(width).collect();
        let mut text = String::new();
        for line in &lines {
            let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
        text
    }

    /// RFC 4180 with line feeds: a cell is quoted if it has to be.
    pub fn csv(&self) -> String {
        let header = self.header.map(str::to_owned);
        let mut text = String::new();
        for line in std::iter::once(&header).chain(&self.rows) {
            let cells: Vec<String> = line.iter().map(|cell| csv_cell(cell)).collect();
            text.push_str(&cells.join(","));
            text.push('\n');
        }
        text
    }
}

fn csv_cell(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", cell.replace('"', "\"\""))
    } else {
        cell.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Table<2> {
        let mut table = Table::new(["seq", "text"]);
        table.push(["1".into(), "a, \"b\"".into()]);
        table.push(["100".into(), "c".into()]);
        table
    }

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_spaces() {
        assert_eq!(sample().aligned(), "SEQ  TEXT\n1    a, \"b\"\n100  c\n");
    }

    #[test]
    fn csv_quotes_what_needs_it() {
        assert_eq!(sample().csv(), "seq,text\n1,\"a, \"\"b\"\"\"\n100,c\n");
    }
}

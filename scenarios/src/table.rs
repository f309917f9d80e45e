//! Tables, for a terminal and for a page.

use std::fmt::Write as _;

/// A table: every row has as many cells as the head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<T: Into<String>>(head: impl IntoIterator<Item = T>) -> Self {
        Self { head: head.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// A row; cells that are missing are empty.
    pub(crate) fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        let mut cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        cells.resize(self.head.len(), String::new());
        self.rows.push(cells);
    }

    /// Columns with spaces between them, a line each.
    pub(crate) fn text(&self) -> String {
        let width = |column: usize| {
            let cells =
                std::iter::once(&self.head).chain(&self.rows).map(|row| one_line(&row[column]).chars().count());
            cells.max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.head.len()).map(width).collect();
        let mut text = String::new();
        for row in std::iter::once(&self.head).chain(&self.rows) {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{:<width$}", one_line(cell)));
            text += cells.collect::<Vec<_>>().join("  ").trim_end();
            text.push('\n');
        }
        text
    }

    /// As Markdown.
    pub(crate) fn markdown(&self) -> String {
        let line = |cells: &[String]| {
            cells.iter().fold("|".to_owned(), |line, cell| {
                line + " " + &one_line(cell).replace('\\', r"\\").replace('|', r"\|").replace('<', "&lt;") + " |"
            })
        };
        let mut text = line(&self.head) + "\n|";
        text += &" --- |".repeat(self.head.len());
        for row in &self.rows {
            let _infallible = write!(text, "\n{}", line(row));
        }
        text + "\n"
    }
}

fn one_line(cell: &str) -> String {
    cell.split(['\n', '\r']).map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

/// Milliseconds for a reader.
pub(crate) fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1000, ms % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(["scenario", "what"]);
        table.row(["probe", "a|b\nc"]);
        table.row(["a long name"]);
        table
    }

    #[test]
    fn columns_are_aligned() {
        assert_eq!(table().text(), "scenario     what\nprobe        a|b; c\na long name\n");
    }

    #[test]
    fn markdown_is_escaped() {
        assert_eq!(
            table().markdown(),
            "| scenario | what |\n| --- | --- |\n| probe | a\\|b; c |\n| a long name |  |\n"
        );
    }

    #[test]
    fn seconds_have_one_decimal() {
        assert_eq!((seconds(0).as_str(), seconds(12_345).as_str()), ("0.0 s", "12.3 s"));
    }
}

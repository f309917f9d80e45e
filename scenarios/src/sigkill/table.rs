//! The grid as a table, for people and for programs.

use std::collections::BTreeMap;
use std::fs;

use super::cell::Report;
use super::mode::Mode;
use super::point::Point;
use crate::context::Context;
use crate::scenario::Failure;

/// The file in the report directory.
const FILE: &str = "sigkill.json";

/// What a cell came to, in a line of its own.
pub(super) fn detail(report: &Report) -> String {
    let Report { kills, done, survived, failed, refused, held, death_ms, recovery_ms, .. } = report;
    let mut text = format!(
        "{kills} kills, {done} operations done, {survived} of them across a death, {failed} failed, {refused} turned \
         away, {held} held; dead in {death_ms} ms, served in {recovery_ms} ms"
    );
    if let Some(drawn) = &report.where_drawn {
        text.push_str("; ");
        text.push_str(drawn);
    }
    text
}

/// Of all rounds of one cell.
fn cell(reports: &[&Report]) -> String {
    let Some(last) = reports.last() else { return "-".to_owned() };
    if last.verdict != "ok" && last.verdict != "FAIL" {
        return format!("({})", last.verdict);
    }
    let sum = |of: fn(&Report) -> u64| reports.iter().map(|report| of(report)).sum::<u64>();
    let longest = reports.iter().map(|report| report.elapsed_ms).max().unwrap_or(0);
    format!(
        "{} {}k {}+{}/{}/{} {:.1}s",
        last.verdict,
        sum(|report| report.kills),
        sum(|report| report.done - report.survived),
        sum(|report| report.survived),
        sum(|report| report.failed),
        sum(|report| report.refused),
        longest as f64 / 1000.0
    )
}

/// The lines of the table: points down, modes across.
fn lines(reports: &[Report]) -> Vec<String> {
    let mut cells: BTreeMap<(Point, Mode), Vec<&Report>> = BTreeMap::new();
    for report in reports {
        cells.entry((report.point, report.mode)).or_default().push(report);
    }
    let mut rows = vec![std::iter::once("killed").chain(Mode::ALL.map(Mode::name)).map(str::to_owned).collect()];
    for point in Point::ALL {
        let row: Vec<String> = Mode::ALL
            .iter()
            .map(|mode| cell(cells.get(&(point, *mode)).map(Vec::as_slice).unwrap_or_default()))
            .collect();
        if row.iter().any(|cell| cell != "-") {
            rows.push(std::iter::once(point.name().to_owned()).chain(row).collect::<Vec<_>>());
        }
    }
    let columns = Mode::ALL.len() + 1;
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    rows.iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join(" | ").trim_end().to_owned()
        })
        .collect()
}

/// Tells the table.
pub(super) fn print(context: &Context, reports: &[Report]) {
    if reports.is_empty() {
        return;
    }
    context.note("verdict, kills, operations done + done across a death / failed / turned away, the longest time");
    for line in lines(reports) {
        context.note(line);
    }
}

/// Writes every cell into the report directory.
pub(super) fn write(context: &Context, reports: &[Report]) -> Result<(), Failure> {
    let Some(dir) = context.report_dir() else { return Ok(()) };
    let path = dir.join(FILE);
    let cannot = |error: &dyn std::fmt::Display| {
        Failure::Environment(format!("failed to write {}: {error}; give --report another directory", path.display()))
    };
    let text = serde_json::to_vec_pretty(reports).map_err(|error| cannot(&error))?;
    fs::write(&path, text).map_err(|error| cannot(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_go_down_and_modes_across() {
        let mut done = Report::new(Point::Idle, Mode::Wait, 0);
        "ok".clone_into(&mut done.verdict);
        (done.kills, done.done, done.survived, done.failed, done.elapsed_ms) = (2, 40, 3, 5, 1250);
        let mut lacking = Report::new(Point::Idle, Mode::FailIo, 0);
        "no such mode".clone_into(&mut lacking.verdict);
        let lines = lines(&[done, lacking]);
        assert_eq!(lines.len(), 2);
        assert_eq!(
            lines[0].split(" | ").map(str::trim).collect::<Vec<_>>(),
            ["killed", "none", "wait", "reissue", "fail-io"]
        );
        let cells = ["idle", "-", "ok 2k 37+3/5/0 1.2s", "-", "(no such mode)"];
        assert_eq!(lines[1].split(" | ").map(str::trim).collect::<Vec<_>>(), cells);
    }
}

//! The grid as a table, for people and for programs.

use std::collections::BTreeMap;
use std::fs;

use clap::ValueEnum;

use super::cell::Report;
use super::mode::Mode;
use super::name;
use super::point::Point;
use crate::context::Context;
use crate::scenario::Failure;
use crate::table::Table;

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

/// Points down, modes across.
fn table(reports: &[Report]) -> Table {
    let mut cells: BTreeMap<(Point, Mode), Vec<&Report>> = BTreeMap::new();
    for report in reports {
        cells.entry((report.point, report.mode)).or_default().push(report);
    }
    let modes = Mode::value_variants();
    let mut table = Table::new(std::iter::once("killed".to_owned()).chain(modes.iter().map(name)));
    for point in Point::value_variants() {
        let row = modes.iter().map(|mode| cell(cells.get(&(*point, *mode)).map(Vec::as_slice).unwrap_or_default()));
        if cells.keys().any(|(done, _)| done == point) {
            table.row(std::iter::once(name(point)).chain(row));
        }
    }
    table
}

/// Tells the table.
pub(super) fn print(context: &Context, reports: &[Report]) {
    if reports.is_empty() {
        return;
    }
    context.note("verdict, kills, operations done + done across a death / failed / turned away, the longest time");
    for line in table(reports).text().lines() {
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
        let text = table(&[done, lacking]).text();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
            .collect();
        let cells = ["idle", "-", "ok 2k 37+3/5/0 1.2s", "-", "(no such mode)"];
        assert_eq!(lines, [["killed", "none", "wait", "reissue", "fail-io"], cells]);
    }
}

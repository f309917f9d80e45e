//! `matrix-table`: what `ci/matrix` left behind for each kernel, as one table.
//!
//! A kernel's directory holds what its guests wrote: `release`; `pieces`, how many pieces the integration trials were to be
//! done in, and of each `trials/NUMBER/trials.jsonl` and `status`; `suite/suite.json` and `suite.status` of the suite;
//! `seconds`, how long it all took; or `environment`, the reason why it could not be had. A file that is missing is a run
//! that did not take place, and shows as that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use ublkit_harness::Verdict;

use crate::cli::complain;
use crate::suite::{self, Report};
use crate::table::{Table, seconds};

/// The row of what the trials, or the suite, ended with as a whole.
const TRIALS: &str = "trials";
const SUITE: &str = "suite";

/// What is known of one kernel.
#[derive(Debug, Default)]
struct Column {
    /// The kernel as it was asked for.
    name: String,
    release: String,
    /// Why it could not be had.
    lack: Option<String>,
    /// How long all of it took, in seconds.
    seconds: Option<u64>,
    trials: Vec<Trial>,
    /// What each piece of the trials ended with.
    statuses: Vec<Option<i32>>,
    suite: Option<Report>,
    suite_status: Option<i32>,
}

/// A line of `trials.jsonl`.
#[derive(Clone, Debug, Deserialize)]
struct Trial {
    #[serde(rename = "trial")]
    name: String,
    outcome: String,
    #[serde(default)]
    elapsed_ms: u64,
    #[serde(default)]
    gate: String,
}

/// What became of the trials of one module.
#[derive(Debug, Default)]
struct Module {
    passed: usize,
    gated: usize,
    elapsed_ms: u64,
    /// Those that failed, and those that began and did not end.
    bad: Vec<String>,
    /// Those that failed, or did not end, and passed when they were run again.
    flaky: Vec<String>,
}

/// Prints the table, writes it as Markdown where that is asked for, and returns the exit status: 0 if all is well.
pub(crate) fn main(dirs: &[PathBuf], markdown: Option<&Path>) -> u8 {
    let mut columns = Vec::new();
    for dir in dirs {
        match Column::read(dir) {
            Ok(column) => columns.push(column),
            Err(error) => {
                complain(&error);
                return Verdict::Environment.exit_code();
            }
        }
    }
    let (table, gates, problems) = (table(&columns), gates(&columns), problems(&columns));
    // A reader that left has seen enough.
    let _ = write!(io::stdout(), "{}{}{}", table.text(), section("left out", &gates), section("not well", &problems));
    if let Some(path) = markdown
        && let Err(error) = fs::write(path, page(&table, &gates, &problems))
    {
        complain(&format!("cannot write {}: {error}", path.display()));
        return Verdict::Environment.exit_code();
    }
    exit_code(&columns)
}

fn section(title: &str, lines: &[String]) -> String {
    if lines.is_empty() { String::new() } else { format!("\n{title}:\n  {}\n", lines.join("\n  ")) }
}

fn page(table: &Table, gates: &[String], problems: &[String]) -> String {
    let list = |title: &str, lines: &[String]| {
        let items: Vec<_> = lines.iter().map(|line| format!("- {}\n", line.replace('<', "&lt;"))).collect();
        if items.is_empty() { String::new() } else { format!("\n{title}\n\n{}", items.concat()) }
    };
    let gates = list("Left out because of bugs of these kernels:", gates);
    table.markdown() + &gates + &list("Not well:", problems)
}

impl Column {
    fn read(dir: &Path) -> Result<Self, String> {
        let text = |name: &str| match fs::read_to_string(dir.join(name)) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(format!("cannot read {}: {error}", dir.join(name).display())),
        };
        let wrong = |name: &str, why: &dyn std::fmt::Display| format!("{}: {why}", dir.join(name).display());
        let number = |name: &str| -> Result<Option<i64>, String> {
            let parse = |text: String| text.parse().map_err(|error| wrong(name, &error));
            text(name)?.map(parse).transpose()
        };
        let status = |name: &str| Ok::<_, String>(number(name)?.and_then(|status| i32::try_from(status).ok()));
        if !dir.is_dir() {
            return Err(format!("there is no directory {}: it is made by ci/matrix", dir.display()));
        }
        let (mut trials, mut statuses) = (Vec::new(), Vec::new());
        for piece in 1..=number("pieces")?.unwrap_or(0) {
            for line in text(&format!("trials/{piece}/trials.jsonl"))?.unwrap_or_default().lines() {
                // The last line of a guest that was ended may be half a line.
                trials.extend(serde_json::from_str::<Trial>(line));
            }
            statuses.push(status(&format!("trials/{piece}/status"))?);
        }
        let path = format!("suite/{}", suite::FILE);
        let suite = text(&path)?.map(|json| serde_json::from_str(&json).map_err(|error| wrong(&path, &error)));
        Ok(Self {
            name: dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            release: text("release")?.unwrap_or_default(),
            lack: text("environment")?,
            seconds: number("seconds")?.and_then(|seconds| u64::try_from(seconds).ok()),
            trials,
            statuses,
            suite: suite.transpose()?,
            suite_status: status("suite.status")?,
        })
    }

    /// What the trials ended with: the first piece that is not well speaks for all.
    fn trials_status(&self) -> Option<i32> {
        let bad = self.statuses.iter().find(|status| **status != Some(0));
        bad.or(self.statuses.first()).copied().flatten()
    }

    fn modules(&self) -> BTreeMap<&str, Module> {
        let mut modules: BTreeMap<&str, Module> = BTreeMap::new();
        // Those that failed, and those that began and have not ended, by their names.
        let (mut failed, mut under_way) = (BTreeSet::new(), BTreeSet::new());
        for trial in &self.trials {
            let module = modules.entry(trial.name.split("::").next().unwrap_or_default()).or_default();
            let name = trial.name.clone();
            module.elapsed_ms += trial.elapsed_ms;
            // What began is bad until it has ended well.
            module.bad.retain(|bad| *bad != name);
            let open = under_way.remove(&trial.name);
            match trial.outcome.as_str() {
                "begun" => {
                    under_way.insert(&trial.name);
                    if open {
                        failed.insert(&trial.name);
                    }
                    module.bad.push(name);
                    continue;
                }
                "passed" => module.passed += 1,
                "gated" => module.gated += 1,
                _ => {
                    failed.insert(&trial.name);
                    module.bad.push(name);
                    continue;
                }
            }
            if failed.contains(&trial.name) {
                module.flaky.push(name);
            }
        }
        modules
    }

    fn is_green(&self) -> bool {
        let suite = self.suite.as_ref().is_some_and(|suite| suite.whole && !suite.parts.is_empty());
        let bad_part = self.suite.iter().flat_map(|suite| &suite.parts).any(|part| part.verdict != Verdict::Pass);
        let bad_trial = self.modules().values().any(|module| !module.bad.is_empty());
        let ended = self.trials_status() == Some(0) && self.suite_status == Some(0);
        self.lack.is_none() && ended && suite && !bad_part && !bad_trial && !self.trials.is_empty()
    }
}

fn table(columns: &[Column]) -> Table {
    let head = columns.iter().map(|column| match column.release.as_str() {
        "" => column.name.clone(),
        release => release.to_owned(),
    });
    let mut table = Table::new(std::iter::once(String::new()).chain(head));
    let parts = |column: &Column| -> Vec<String> {
        column.suite.iter().flat_map(|suite| &suite.parts).map(|part| part.name.clone()).collect()
    };
    for name in in_order(columns.iter().map(parts)) {
        table.row(std::iter::once(name.clone()).chain(columns.iter().map(|column| part_cell(column, &name))));
    }
    let modules = |column: &Column| column.modules().keys().map(|&name| name.to_owned()).collect();
    for name in in_order(columns.iter().map(modules)) {
        let cells = columns.iter().map(|column| module_cell(column, &name));
        table.row(std::iter::once(format!("{TRIALS} {name}")).chain(cells));
    }
    table.row(std::iter::once("all trials".to_owned()).chain(columns.iter().map(all_trials)));
    table.row(std::iter::once("in all".to_owned()).chain(columns.iter().map(|column| {
        let took = column.seconds.map_or_else(String::new, |took| format!(", {}", seconds(took * 1_000)));
        match (&column.lack, column.is_green()) {
            (Some(_), _) => "NOT HAD".to_owned(),
            (None, true) => format!("green{took}"),
            (None, false) => format!("NOT GREEN{took}"),
        }
    })));
    table
}

/// Every name once, in the order in which they come.
fn in_order(lists: impl Iterator<Item = Vec<String>>) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in lists.flatten() {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn part_cell(column: &Column, name: &str) -> String {
    let parts = column.suite.iter().flat_map(|suite| &suite.parts);
    match parts.into_iter().find(|part| part.name == name) {
        Some(part) => {
            let verdict = if part.verdict == Verdict::Pass {
                "pass".to_owned()
            } else {
                part.verdict.to_string().to_uppercase()
            };
            let gates = if part.gates.is_empty() { String::new() } else { format!(", {} gated", part.gates.len()) };
            format!("{verdict} {}{gates}: {}", seconds(part.elapsed_ms), part.what)
        }
        None => "not run".to_owned(),
    }
}

fn module_cell(column: &Column, name: &str) -> String {
    let modules = column.modules();
    let Some(module) = modules.get(name) else { return "not run".to_owned() };
    let some = |count: usize, what: &str| if count == 0 { String::new() } else { format!(", {count} {what}") };
    let (gated, bad) = (some(module.gated, "gated"), some(module.bad.len(), "FAILED"));
    let flaky = some(module.flaky.len(), "FLAKY");
    format!("{} passed{gated}{flaky}{bad}, {}", module.passed, seconds(module.elapsed_ms))
}

fn all_trials(column: &Column) -> String {
    let modules = column.modules();
    if modules.is_empty() {
        return "not run".to_owned();
    }
    let (passed, gated): (Vec<_>, Vec<_>) = modules.values().map(|module| (module.passed, module.gated)).unzip();
    let bad: usize = modules.values().map(|module| module.bad.len()).sum();
    let took = modules.values().map(|module| module.elapsed_ms).sum();
    let (passed, gated): (usize, usize) = (passed.iter().sum(), gated.iter().sum());
    let flaky = match modules.values().map(|module| module.flaky.len()).sum() {
        0_usize => String::new(),
        flaky => format!("{flaky} FLAKY, "),
    };
    format!("{passed} passed, {gated} gated, {flaky}{bad} failed, {}", seconds(took))
}

/// What the bugs of which kernel have kept from being run.
fn gates(columns: &[Column]) -> Vec<String> {
    let mut lines = Vec::new();
    for column in columns {
        for part in column.suite.iter().flat_map(|suite| &suite.parts) {
            lines.extend(part.gates.iter().map(|gate| format!("{}: {}: {gate}", column.name, part.name)));
        }
        let gated = column.trials.iter().filter(|trial| trial.outcome == "gated");
        lines.extend(gated.map(|trial| format!("{}: {}: {}", column.name, trial.name, trial.gate)));
        let left_out = column.suite.iter().flat_map(|suite| &suite.left_out);
        lines.extend(left_out.map(|name| format!("{}: {name}: by request", column.name)));
    }
    lines
}

/// What is not well, a line each.
fn problems(columns: &[Column]) -> Vec<String> {
    let mut lines = Vec::new();
    for column in columns {
        let mut tell = |what: String| lines.push(format!("{}: {what}", column.name));
        if let Some(lack) = &column.lack {
            tell(lack.replace('\n', "; "));
            continue;
        }
        for (what, status) in [(TRIALS, column.trials_status()), (SUITE, column.suite_status)] {
            match status {
                Some(0) => {}
                Some(124) => tell(format!("{what}: not over within the time limit")),
                Some(status) => tell(format!("{what}: ended with status {status}")),
                None => tell(format!("{what}: did not take place, or did not end")),
            }
        }
        for module in column.modules().into_values() {
            for bad in module.bad {
                tell(format!("{bad} failed"));
            }
            for flaky in module.flaky {
                tell(format!("{flaky} failed, and passed when it was run again"));
            }
        }
        if let Some(suite) = &column.suite {
            for part in suite.parts.iter().filter(|part| part.verdict != Verdict::Pass) {
                tell(format!("{}: {}: {}; to see it again: {}", part.name, part.verdict, part.what, part.repro));
            }
            if !suite.whole {
                let why = suite.stopped.as_deref().unwrap_or("it was ended from outside");
                tell(format!("{SUITE}: {} of {} runs: {why}", suite.parts.len(), suite.planned));
            }
        }
    }
    lines
}

/// 0 if everything is green; 4 if nothing is wrong but that a kernel could not be had; 2 otherwise.
fn exit_code(columns: &[Column]) -> u8 {
    if !columns.is_empty() && columns.iter().all(Column::is_green) {
        0
    } else if columns.iter().all(|column| column.lack.is_some() || column.is_green()) {
        Verdict::Environment.exit_code()
    } else {
        Verdict::Fail.exit_code()
    }
}

#[cfg(test)]
mod tests;

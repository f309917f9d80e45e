//! `suite`: the short runs of every scenario, one after the other, each in a process of its own.
//!
//! It passes when every part passes. Otherwise it ends as the worst of them: a broken promise before a hang, a hang before a
//! bug of this program, then too little work, then something that the environment lacks. What was left out because it
//! was asked for, or because of a bug of this kernel, is named.

mod telling;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use ublkit_harness::event::{Event, Part};
use ublkit_harness::{Seed, Verdict};

pub(crate) use self::telling::telling;
use crate::cli::CommonArgs;
use crate::context::Context;
use crate::parts::{Launch, Order, Pick, Processes, seed_of, severity};
use crate::scenario::{Entry, Failure, Needs, SCENARIOS, Scenario};
use crate::table::{Table, seconds};
use crate::units::parse_duration;

/// The file in the report directory.
pub(crate) const FILE: &str = "suite.json";

/// The arguments of `suite`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    pick: Pick,
    /// How long a run may take before it is ended, and a hang
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration, help_heading = "Scenarios")]
    part_deadline: Duration,
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        let deadline = ("part_deadline_ms".to_owned(), json!(self.part_deadline.as_millis() as u64));
        self.pick.options().chain([deadline]).collect()
    }

    fn needs(&self) -> Needs {
        Needs { ublk: true, tools: &[] }
    }

    fn validate(&self) -> Result<(), Failure> {
        let wrong = |text: &str| Err(Failure::Usage(text.to_owned()));
        if self.common.duration.is_some() || self.common.ops.is_some() {
            return wrong(
                "every scenario is run once, shortly; --duration is for soak, and --ops for single scenarios",
            );
        }
        if self.pick.from(SCENARIOS).0.is_empty() {
            return wrong("nothing would be run: --skip leaves no scenario");
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        let (entries, left_out) = self.pick.from(SCENARIOS);
        let orders = orders(&entries, context.seed(), context.report_dir(), self.part_deadline);
        let mut report = Report::new(context, orders.len(), &left_out);
        let result = run_all(&orders, &mut Processes, &mut report, context);
        context.note(report.table());
        result
    }
}

/// The short runs of `entries`. Each reports into a directory of its own.
pub(crate) fn orders(entries: &[&Entry], seed: Seed, report: Option<&Path>, deadline: Duration) -> Vec<Order> {
    let mut orders = Vec::new();
    for entry in entries {
        for (index, arguments) in (0..).zip(entry.short) {
            let name = if index == 0 { entry.name.to_owned() } else { format!("{}-{}", entry.name, index + 1) };
            orders.push(Order {
                words: words(entry, arguments, seed_of(seed, entry.name, index)),
                report: report.map(|dir| dir.join(&name)),
                deadline,
                name,
            });
        }
    }
    orders
}

/// The command line of a run.
pub(crate) fn words(entry: &Entry, arguments: &[&str], seed: u64) -> Vec<String> {
    let seed = seed.to_string();
    let arguments = arguments.iter().copied();
    std::iter::once(entry.name).chain(arguments).chain(["--seed", &seed]).map(str::to_owned).collect()
}

/// Runs every one of them, whatever becomes of the others.
fn run_all(
    orders: &[Order],
    launch: &mut dyn Launch,
    report: &mut Report,
    context: &mut Context,
) -> Result<(), Failure> {
    context.evidence().require("passed", orders.len() as u64);
    for order in orders {
        match run_one(order, launch, context) {
            Ok(part) => report.add(part, context)?,
            Err(failure) => {
                report.stopped = Some(failure.to_string());
                report.save(context)?;
                return Err(failure);
            }
        }
    }
    report.whole = true;
    report.save(context)?;
    outcome(&report.parts)
}

/// Runs one as a step, which fails unless the part passes; that is no error here.
pub(crate) fn run_one(order: &Order, launch: &mut dyn Launch, context: &mut Context) -> Result<Part, Failure> {
    let mut ended = None;
    let step = context.step(&order.name, order.whole_deadline(), |context| {
        let part = launch.launch(order, context)?;
        let what = announce(&part, context);
        let (verdict, repro) = (part.verdict, part.repro.clone());
        ended = Some(part);
        if verdict == Verdict::Pass {
            context.detail(what);
            return Ok(());
        }
        // A part that hung was dealt with by itself; it is not this run that hangs.
        Err(Failure::broke("suite", format!("{what}; to see it again: {repro}")))
    });
    match (ended, step) {
        (Some(part), _) => Ok(part),
        (None, Err(failure)) => Err(failure),
        (None, Ok(())) => Err(Failure::Internal(format!("{} ended without a result", order.name))),
    }
}

/// Runs one as a step that says how it ended, whatever that is.
pub(crate) fn run_part<T>(
    name: &str,
    deadline: Duration,
    context: &mut Context,
    run: impl FnOnce(&mut Context) -> Result<(T, Part), Failure>,
) -> Result<T, Failure> {
    context.step(name, deadline, |context| {
        let (result, part) = run(context)?;
        let what = format!("{}: {}", part.verdict, part.what);
        context.detail(what);
        Ok(result)
    })
}

/// Counts and tells what became of a part. Returns it in one line.
fn announce(part: &Part, context: &Context) -> String {
    context.evidence().add("runs", 1);
    context.evidence().add(if part.verdict == Verdict::Pass { "passed" } else { "not_passed" }, 1);
    context.sink().send(Event::Part(Box::new(part.clone())));
    for gate in &part.gates {
        context.note(format!("{}: left out on this kernel: {gate}", part.name));
    }
    format!("{}: {}", part.verdict, part.what)
}

/// The failure that leads to `verdict`. Of too little work there is no failure: the evidence has it.
fn failure(verdict: Verdict, what: String) -> Failure {
    match verdict {
        Verdict::Hang => Failure::Hang(what),
        Verdict::Environment => Failure::Environment(what),
        Verdict::Internal => Failure::Internal(what),
        Verdict::Fail | Verdict::Vacuous | Verdict::Pass => Failure::broke("suite", what),
    }
}

/// How the whole ends: as the worst of its parts.
pub(crate) fn outcome(parts: &[Part]) -> Result<(), Failure> {
    let worst = parts.iter().map(|part| part.verdict).max_by_key(|verdict| severity(*verdict));
    let bad: Vec<_> = parts.iter().filter(|part| part.verdict != Verdict::Pass).collect();
    let named = bad.iter().map(|part| format!("{} ({})", part.name, part.verdict)).collect::<Vec<_>>().join(", ");
    match worst {
        // The evidence has too few passes.
        None | Some(Verdict::Pass | Verdict::Vacuous) => Ok(()),
        Some(verdict) => {
            Err(failure(verdict, format!("{} of {} runs did not pass: {named}", bad.len(), parts.len())))
        }
    }
}

/// What a suite leaves behind for tables, and shows at its end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) kernel: String,
    pub(crate) seed: Seed,
    /// Every run of it was made.
    pub(crate) whole: bool,
    /// How many runs were to be made.
    pub(crate) planned: usize,
    pub(crate) parts: Vec<Part>,
    /// Scenarios that were left out because it was asked for.
    pub(crate) left_out: Vec<String>,
    /// Why it ended early, if it did.
    pub(crate) stopped: Option<String>,
}

impl Report {
    fn new(context: &Context, planned: usize, left_out: &[&str]) -> Self {
        Self {
            kernel: crate::environment::Host::here().kernel,
            seed: context.seed(),
            whole: false,
            planned,
            parts: Vec::new(),
            left_out: left_out.iter().map(|&name| name.to_owned()).collect(),
            stopped: None,
        }
    }

    /// Saved each time: what was killed halfway has a report of the first half.
    fn add(&mut self, part: Part, context: &Context) -> Result<(), Failure> {
        self.parts.push(part);
        self.save(context)
    }

    fn save(&self, context: &Context) -> Result<(), Failure> {
        let Some(dir) = context.report_dir() else { return Ok(()) };
        save_json(&dir.join(FILE), self)
    }

    fn table(&self) -> String {
        let mut table = Table::new(["scenario", "verdict", "time", "what"]);
        for part in &self.parts {
            table.row([part.name.as_str(), part.verdict.as_str(), &seconds(part.elapsed_ms), &part.what]);
        }
        for name in &self.left_out {
            table.row([name, "left out", "", "by request: --only or --skip"]);
        }
        if self.parts.len() < self.planned {
            let missing = self.planned - self.parts.len();
            table.row([
                "",
                "not run",
                "",
                &format!("{missing} more: {}", self.stopped.as_deref().unwrap_or_default()),
            ]);
        }
        let gates: String = self
            .parts
            .iter()
            .flat_map(|part| {
                part.gates.iter().map(|gate| format!("\nleft out on this kernel, {}: {gate}", part.name))
            })
            .collect();
        format!("on {}\n{}{gates}", self.kernel, table.text().trim_end())
    }
}

/// Writes `value` to a file for programs to read.
pub(crate) fn save_json(path: &Path, value: &impl Serialize) -> Result<(), Failure> {
    let json = serde_json::to_string_pretty(value).map_err(|error| Failure::Internal(error.to_string()))?;
    fs::write(path, json + "\n")
        .map_err(|error| Failure::Environment(format!("cannot write {}: {error}; is there room?", path.display())))
}

#[cfg(test)]
pub(crate) mod tests;

//! Each scenario against the bugs that are planted for it: it has to catch every one, and to pass without any.

use std::fmt;
use std::time::Duration;

use clap::Command;
use serde::Serialize;
use ublkit_harness::event::Part;
use ublkit_harness::{Mutant, Verdict};

use crate::context::Context;
use crate::parts::{Launch, Order, Processes, runnable, seed_of};
use crate::scenario::{Entry, Failure, Plant, SCENARIOS};
use crate::suite::{run_part, words};
use crate::table::{Table, seconds};

/// How long a run may take before it is ended, and a hang.
const DEADLINE: Duration = Duration::from_secs(300);
/// The row of a scenario without a bug.
const CONTROL: &str = "-";

/// What `--only` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// A mutant of the simulator or of a device.
    Mutant(Mutant),
    /// A scenario, and one of its bugs or all of them.
    Scenario { scenario: &'static str, plant: Option<&'static str> },
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mutant(mutant) => mutant.fmt(f),
            Self::Scenario { scenario, plant: None } => f.write_str(scenario),
            Self::Scenario { scenario, plant: Some(plant) } => write!(f, "{scenario}/{plant}"),
        }
    }
}

pub(super) fn parse_chosen(text: &str) -> Result<Chosen, String> {
    let (scenario, plant) = text.split_once('/').map_or((text, None), |(scenario, plant)| (scenario, Some(plant)));
    let Some(entry) = runnable(SCENARIOS).find(|entry| entry.name == scenario) else {
        let names: Vec<_> = runnable(SCENARIOS).map(|entry| entry.name).collect();
        return text
            .parse()
            .map(Chosen::Mutant)
            .map_err(|error| format!("{error}; and the scenarios are {}", names.join(", ")));
    };
    let Some(plant) = plant else { return Ok(Chosen::Scenario { scenario: entry.name, plant: None }) };
    let known = entry.plants.iter().find(|known| known.name == plant);
    let known = known.map(|known| Chosen::Scenario { scenario: entry.name, plant: Some(known.name) });
    known.ok_or_else(|| {
        let names: Vec<_> = entry.plants.iter().map(|plant| plant.name).collect();
        format!("no bug that is planted for {scenario} is called {plant:?}; there are {}", names.join(", "))
    })
}

/// A run without a bug, or what became of a bug.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Row {
    scenario: &'static str,
    /// `None` for a run without one.
    plant: Option<&'static str>,
    about: &'static str,
    verdict: Verdict,
    exit_code: Option<i32>,
    what: String,
    elapsed_ms: u64,
    /// Which other scenarios catch it, of those that were asked.
    also: Vec<&'static str>,
    repro: String,
}

impl Row {
    fn new(entry: &Entry, plant: Option<&Plant>, part: Part) -> Self {
        Self {
            scenario: entry.name,
            plant: plant.map(|plant| plant.name),
            about: plant.map_or("", |plant| plant.about),
            verdict: part.verdict,
            exit_code: part.exit_code,
            what: part.what,
            elapsed_ms: part.elapsed_ms,
            also: Vec::new(),
            repro: part.repro,
        }
    }

    /// Whether a scenario that works ends so.
    fn is_right(&self) -> bool {
        match self.plant {
            None => self.verdict == Verdict::Pass,
            Some(_) => is_caught(self.verdict),
        }
    }

    fn outcome(&self) -> String {
        match (self.plant.is_some(), self.verdict) {
            (true, Verdict::Fail | Verdict::Hang) => format!("caught ({})", self.verdict),
            (true, Verdict::Pass) => "SURVIVES".to_owned(),
            (false, Verdict::Pass) => "passes".to_owned(),
            (false, Verdict::Fail | Verdict::Hang) => format!("FLAGGED ({})", self.verdict),
            (_, other) => other.to_string(),
        }
    }
}

/// Whether a run that ended so has caught something.
pub(crate) fn is_caught(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::Fail | Verdict::Hang)
}

/// The runs of a scenario with a bug planted, one for each of its short runs: the first that catches it will do.
pub(crate) fn orders(
    entry: &Entry,
    plant: &Plant,
    seed: ublkit_harness::Seed,
    dir: Option<&std::path::Path>,
) -> Vec<Order> {
    let name = format!("{}/{}", entry.name, plant.name);
    let order = |(index, short): (u64, &&'static [&'static str])| {
        let arguments = [short, plant.arguments].concat();
        Order {
            words: words(entry, &arguments, seed_of(seed, &name, index)),
            report: dir.map(|dir| dir.join(entry.name).join(plant.name)),
            deadline: DEADLINE,
            name: name.clone(),
        }
    };
    (0..).zip(entry.short).map(order).collect()
}

/// Has the scenario try to catch it: the run that did, or the last one.
///
/// # Errors
/// As [`Launch::launch`].
pub(crate) fn catch(orders: &[Order], launch: &mut dyn Launch, context: &mut Context) -> Result<Part, Failure> {
    let mut last = None;
    for order in orders {
        let part = launch.launch(order, context)?;
        if is_caught(part.verdict) {
            return Ok(part);
        }
        last = Some(part);
    }
    last.ok_or_else(|| Failure::Internal("a scenario without short runs was to catch a bug".to_owned()))
}

pub(super) fn run(only: &[Chosen], alone: bool, context: &mut Context) -> Result<(), Failure> {
    let chosen = |entry: &Entry, plant: Option<&Plant>| {
        only.is_empty()
            || only.iter().any(|chosen| match chosen {
                Chosen::Mutant(_) => false,
                Chosen::Scenario { scenario, plant: one } => {
                    *scenario == entry.name
                        && (one.is_none() || plant.is_none() || *one == plant.map(|plant| plant.name))
                }
            })
    };
    let picked: Vec<_> = runnable(SCENARIOS)
        .filter(|entry| chosen(entry, None))
        .map(|entry| (entry, entry.plants.iter().filter(|plant| chosen(entry, Some(plant))).collect::<Vec<_>>()))
        .collect();
    let mut rows = Vec::new();
    let result = try_all(&picked, alone, &mut Processes, &mut rows, context);
    context.note(table(&rows));
    super::save(&rows, context.report_dir())?;
    result?;
    judge(&rows)
}

fn try_all(
    picked: &[(&'static Entry, Vec<&'static Plant>)],
    alone: bool,
    launch: &mut dyn Launch,
    rows: &mut Vec<Row>,
    context: &mut Context,
) -> Result<(), Failure> {
    let plants: usize = picked.iter().map(|(_, plants)| plants.len()).sum();
    context.evidence().require("caught", plants as u64);
    context.evidence().require("controls", picked.iter().map(|(entry, _)| entry.short.len() as u64).sum());
    for (entry, plants) in picked {
        let entries = [*entry];
        let dir = context.report_dir().map(|dir| dir.join(entry.name));
        for order in crate::suite::orders(&entries, context.seed(), dir.as_deref(), DEADLINE) {
            let row = run_part(&order.name, order.whole_deadline(), context, |context| {
                let part = launch.launch(&order, context)?;
                let row = Row::new(entry, None, part.clone());
                Ok((row, part))
            });
            keep(row?, rows, context);
        }
        for plant in plants {
            let orders = orders(entry, plant, context.seed(), context.report_dir());
            let whole = orders.iter().map(Order::whole_deadline).sum::<Duration>() * if alone { 8 } else { 1 };
            let row = run_part(&format!("{}/{}", entry.name, plant.name), whole, context, |context| {
                let part = catch(&orders, launch, context)?;
                let mut row = Row::new(entry, Some(plant), part.clone());
                if alone {
                    row.also = also(entry, plant, launch, context)?;
                }
                Ok((row, part))
            });
            keep(row?, rows, context);
        }
    }
    Ok(())
}

fn keep(row: Row, rows: &mut Vec<Row>, context: &Context) {
    let (right, wrong) = if row.plant.is_some() { ("caught", "survived") } else { ("controls", "flagged") };
    context.evidence().add(if row.is_right() { right } else { wrong }, 1);
    rows.push(row);
}

/// The other scenarios whose servers can have the same bug, and that catch it.
fn also(
    entry: &Entry,
    plant: &Plant,
    launch: &mut dyn Launch,
    context: &mut Context,
) -> Result<Vec<&'static str>, Failure> {
    if !plant.arguments.contains(&"--mutant") {
        return Ok(Vec::new());
    }
    let takes = |other: &Entry, argument: &str| {
        let command = (other.augment)(Command::new(other.name));
        let name = argument.trim_start_matches("--");
        command.get_arguments().any(|known| known.get_long() == Some(name))
    };
    let mut also = Vec::new();
    for other in runnable(SCENARIOS).filter(|other| other.name != entry.name) {
        if plant.arguments.iter().filter(|word| word.starts_with("--")).all(|argument| takes(other, argument)) {
            let orders = orders(other, plant, context.seed(), None);
            if is_caught(catch(&orders, launch, context)?.verdict) {
                also.push(other.name);
            }
        }
    }
    Ok(also)
}

fn table(rows: &[Row]) -> String {
    let mut table = Table::new(["scenario", "bug", "outcome", "time", "also caught by", "what"]);
    for row in rows {
        let also = row.also.join(", ");
        table.row([
            row.scenario,
            row.plant.unwrap_or(CONTROL),
            &row.outcome(),
            &seconds(row.elapsed_ms),
            &also,
            &row.what,
        ]);
    }
    format!("every scenario and the bugs that are planted for it\n{}", table.text().trim_end())
}

fn judge(rows: &[Row]) -> Result<(), Failure> {
    let named = |is: &dyn Fn(&Row) -> bool| {
        let names = rows.iter().filter(|row| is(row)).map(|row| match row.plant {
            Some(plant) => format!("{}/{plant}", row.scenario),
            None => row.scenario.to_owned(),
        });
        names.collect::<Vec<_>>().join(", ")
    };
    let mut wrong = Vec::new();
    for (what, names) in [
        ("not caught:", named(&|row| row.plant.is_some() && row.verdict == Verdict::Pass)),
        ("not even without a bug do these pass:", named(&|row| row.plant.is_none() && !row.is_right())),
        ("nothing is known of", named(&|row| row.plant.is_some() && !row.is_right() && row.verdict != Verdict::Pass)),
    ] {
        if !names.is_empty() {
            wrong.push(format!("{what} {names}"));
        }
    }
    super::broke(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::testing::context;
    use crate::suite::tests::{ENTRIES, Fake};

    const PLANTS: &[Plant] = &[
        Plant { name: "lost", about: "", arguments: &["--mutant", "lost-write"] },
        Plant { name: "held", about: "", arguments: &["--plant", "held"] },
    ];

    fn rows(verdicts: impl IntoIterator<Item = Verdict>) -> (Vec<Row>, Fake, Result<(), Failure>) {
        let mut testing = context();
        let mut fake = Fake::new(verdicts);
        let mut rows = Vec::new();
        let picked = [(&ENTRIES[1], PLANTS.iter().collect())];
        try_all(&picked, false, &mut fake, &mut rows, &mut testing.context).expect("every run is made");
        let judged = judge(&rows);
        (rows, fake, judged)
    }

    #[test]
    fn a_bug_has_to_be_caught_by_one_of_the_short_runs() {
        use Verdict::{Fail, Hang, Pass};
        // Two controls, a bug that the second short run catches, and one that the first does.
        let (rows, fake, judged) = rows([Pass, Pass, Pass, Fail, Hang]);
        judged.expect("all is well");
        assert_eq!(rows.len(), 4);
        assert_eq!(fake.1.len(), 5);
        assert_eq!(fake.1[3].words[..5], ["two", "--b", "c", "--mutant", "lost-write"]);
        assert!(table(&rows).contains("caught (hang)"), "{}", table(&rows));
    }

    #[test]
    fn a_survivor_and_a_flagged_control_are_failures() {
        use Verdict::{Fail, Pass};
        let (_, _, judged) = rows([Pass, Pass, Pass, Pass, Fail]);
        assert!(judged.expect_err("a survivor").to_string().contains("two/lost"));
        let (_, _, judged) = rows([Fail, Pass, Fail, Fail]);
        assert!(judged.expect_err("a control that is flagged").to_string().contains("without a bug"));
    }

    #[test]
    fn a_run_that_says_nothing_has_not_caught_a_bug() {
        use Verdict::{Environment, Fail, Pass, Vacuous};
        let (_, _, judged) = rows([Pass, Pass, Vacuous, Environment, Fail]);
        assert!(judged.expect_err("nothing is known").to_string().contains("nothing is known of two/lost"));
    }

    #[test]
    fn what_is_chosen_is_looked_up() {
        assert_eq!(parse_chosen("probe").expect("a scenario").to_string(), "probe");
        assert_eq!(parse_chosen("probe/size-lie").expect("a bug").to_string(), "probe/size-lie");
        assert_eq!(parse_chosen("lost-write").expect("a mutant").to_string(), "lost-write");
        assert!(parse_chosen("probe/nothing").expect_err("no such bug").contains("size-lie"));
        assert!(parse_chosen("nothing").expect_err("nothing").contains("probe"));
    }

    #[test]
    fn every_planted_bug_has_arguments_that_can_be_parsed() {
        for entry in runnable(SCENARIOS) {
            assert!(entry.plants.len() >= 3, "{} catches {} bugs of its own", entry.name, entry.plants.len());
            for plant in entry.plants {
                let parsed = entry.short.iter().filter(|short| {
                    let words = std::iter::once(entry.name).chain([**short, plant.arguments].concat());
                    let command = (entry.augment)(Command::new(entry.name));
                    command.try_get_matches_from(words).is_ok_and(|matches| (entry.parse)(&matches).is_ok())
                });
                assert!(parsed.count() > 0, "{}/{} fits none of its short runs", entry.name, plant.name);
            }
        }
    }
}

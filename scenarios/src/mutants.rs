//! `mutants`: plants every known bug and looks who finds it.
//!
//! On the simulator it is the [kill matrix](ublkit_harness::matrix): every bug has to be found, nothing that is merely odd
//! may be called a bug, and no oracle may be there for nothing. On a real device, each bug that a server can have is planted
//! in one, and `torture` has to find it. With `--scenarios`, every scenario has to catch the bugs that are planted for it, and
//! to pass without one.

mod on_device;
pub(crate) mod scenarios;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use ublkit_harness::event::{Event, Finding};
use ublkit_harness::matrix::{Matrix, MatrixOptions, Row};
use ublkit_harness::mutant::Layer;
use ublkit_harness::{Mutant, Oracle, Oracles, Seed};

use self::scenarios::Chosen;
use crate::cli::CommonArgs;
use crate::context::Context;
use crate::parts::Processes;
use crate::scenario::{Failure, Needs, Scenario};

/// Everything is drawn from this unless another seed is given: the matrix is a gate, and a gate does not change by itself.
const SEED: u64 = 1;
/// How long the matrix may take. It does a given number of operations, most of it in seconds.
const DEADLINE: Duration = Duration::from_secs(4 * 3600);
/// What the whole of it may take on two cores: the mutants, and the controls.
const MUTANTS_WITHIN: Duration = Duration::from_secs(60);
const CONTROLS_WITHIN: Duration = Duration::from_secs(120);
/// What a kill by an oracle that is not in a mutant's list is called.
const UNEXPECTED: &str = "found by an oracle that is not expected to find it:";
/// The file in the report directory.
const FILE: &str = "mutants.json";

/// Oracles that are the only ones to find no mutant, and why they stay.
const REDUNDANT: &[(Oracle, &str)] = &[];

/// The arguments of `mutants`, and so the scenario.
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    /// Plant them in the simulated device: no root, no kernel with ublk (the default)
    #[arg(long, conflicts_with = "device_mode", help_heading = "Where")]
    sim: bool,
    /// Plant them in servers of real devices, one after another, for `--duration` each (60s)
    #[arg(long, help_heading = "Where")]
    device_mode: bool,
    /// Have every scenario catch the bugs that are planted for it, and pass without one
    #[arg(
        long,
        conflicts_with_all = ["sim", "device_mode", "without", "control_seeds", "threads"],
        help_heading = "Where"
    )]
    scenarios: bool,
    /// Beside it, which other scenarios catch a bug that can be planted in their servers too
    #[arg(long, requires = "scenarios", help_heading = "Where")]
    alone: bool,
    /// These mutants and controls alone; with --scenarios, these scenarios, or SCENARIO/PLANT
    #[arg(
        long,
        value_name = "NAME,…",
        value_delimiter = ',',
        value_parser = scenarios::parse_chosen,
        help_heading = "Matrix"
    )]
    only: Vec<Chosen>,
    /// Without these oracles
    #[arg(
        long,
        value_name = "ORACLE,…",
        value_delimiter = ',',
        conflicts_with = "device_mode",
        help_heading = "Matrix"
    )]
    without: Vec<Oracle>,
    /// With how many seeds each control has to pass
    #[arg(long, value_name = "N", default_value_t = 1000, conflicts_with = "device_mode", help_heading = "Matrix")]
    control_seeds: u64,
    /// How many threads run; as many as there are processors without it
    #[arg(long, value_name = "N", conflicts_with = "device_mode", help_heading = "Matrix")]
    threads: Option<usize>,
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn seed(&self) -> Option<Seed> {
        Some(self.common.seed.unwrap_or(Seed::new(SEED)))
    }

    fn options(&self) -> BTreeMap<String, Value> {
        let names = |names: Vec<&str>| json!(names);
        let mut options = vec![
            ("device_mode", json!(self.device_mode)),
            ("scenarios", json!(self.scenarios)),
            ("alone", json!(self.alone)),
            ("only", json!(self.only.iter().map(ToString::to_string).collect::<Vec<_>>())),
        ];
        if !self.device_mode && !self.scenarios {
            options.extend([
                ("without", names(self.without.iter().map(|oracle| oracle.name()).collect())),
                ("control_seeds", json!(self.control_seeds)),
                ("threads", json!(self.threads())),
            ]);
        }
        options.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn needs(&self) -> Needs {
        Needs { ublk: self.device_mode || self.scenarios, tools: &[] }
    }

    fn validate(&self) -> Result<(), Failure> {
        let wrong = |text: &str| Err(Failure::Usage(text.to_owned()));
        if !self.device_mode && self.common.duration.is_some() {
            return wrong("--duration is for --device-mode; on the simulator, --ops says how much is done");
        }
        for chosen in &self.only {
            match chosen {
                Chosen::Mutant(mutant) if self.scenarios => {
                    return Err(Failure::Usage(format!(
                        "--only {mutant}: with --scenarios, name SCENARIO or SCENARIO/PLANT"
                    )));
                }
                Chosen::Scenario { .. } if !self.scenarios => {
                    return Err(Failure::Usage(format!("--only {chosen}: that is for --scenarios")));
                }
                _ => {}
            }
        }
        if self.common.ops == Some(0) || self.control_seeds == 0 || self.threads == Some(0) {
            return wrong("nothing would be run: --ops, --control-seeds and --threads are numbers from 1");
        }
        if self.threads.is_some_and(|threads| threads > 1024) {
            return wrong("choose 1 to 1024 threads");
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        if self.scenarios {
            scenarios::run(&self.only, self.alone, context)
        } else if self.device_mode {
            on_device::run(&self.mutants(), &mut Processes, context)
        } else {
            self.simulate(context)
        }
    }
}

impl Args {
    fn mutants(&self) -> Vec<Mutant> {
        let chosen = |mutant: &Mutant| self.only.contains(&Chosen::Mutant(*mutant));
        Mutant::ALL.into_iter().filter(|mutant| self.only.is_empty() || chosen(mutant)).collect()
    }

    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(crate::simulated::processors)
    }

    /// Every oracle judges, and every mutant is there.
    fn is_whole(&self) -> bool {
        self.only.is_empty() && self.without.is_empty()
    }

    fn simulate(&self, context: &mut Context) -> Result<(), Failure> {
        let standard = MatrixOptions::default();
        let ops = self.common.ops.unwrap_or(standard.ops);
        let options = MatrixOptions {
            seed: context.seed(),
            mutants: self.mutants(),
            ops,
            ops_per_seed: standard.ops_per_seed.min(ops),
            control_seeds: self.control_seeds,
            oracles: self.without.iter().fold(Oracles::ALL, |all, oracle| all.without(*oracle)),
            only_killers: self.without.is_empty(),
            threads: self.threads(),
            ..standard
        };
        context.evidence().require("rows", options.mutants.len() as u64);
        let matrix = context.step("matrix", DEADLINE, |context| {
            let interruption = context.interruption().clone();
            let sink = context.sink().clone();
            let matrix =
                Matrix::run_while(&options, &|row| sink.send(Event::MatrixRow(Box::new(row.clone()))), &|| {
                    !interruption.came()
                });
            context.detail(matrix.to_string());
            Ok(matrix)
        })?;
        self.count(&matrix, context);
        save(&matrix, context.report_dir())?;
        if context.interruption().came() {
            return Err(Failure::Interrupted);
        }
        let unexpected = unexpected(&matrix);
        if !self.is_gate() && !unexpected.is_empty() {
            context.note(format!("{UNEXPECTED} {unexpected}"));
        }
        self.judge(&matrix, !cfg!(debug_assertions))
    }

    fn count(&self, matrix: &Matrix, context: &Context) {
        let evidence = context.evidence();
        let (controls, mutants): (Vec<&Row>, Vec<&Row>) = matrix.rows.iter().partition(|row| row.control);
        for (name, count) in [
            ("rows", matrix.rows.len()),
            ("mutants", mutants.len()),
            ("found", mutants.iter().filter(|row| row.found.is_some()).count()),
            ("controls", controls.len()),
            ("flagged", controls.iter().filter(|row| row.found.is_some()).count()),
            ("idle", matrix.rows.iter().filter(|row| is_idle(row)).count()),
        ] {
            evidence.add(name, count as u64);
        }
        evidence.add("ops", matrix.rows.iter().map(|row| row.ops).sum());
        if self.is_whole() {
            evidence.add("oracles_needed", matrix.oracles.values().filter(|kills| kills.only > 0).count() as u64);
        }
    }

    /// Whether all is as it should be; of an `optimised` build, in time too.
    fn judge(&self, matrix: &Matrix, optimised: bool) -> Result<(), Failure> {
        let mut wrong = Vec::new();
        let named = |rows: Vec<&Row>| rows.iter().map(|row| row.mutant.as_str()).collect::<Vec<_>>().join(", ");
        let survivors = named(matrix.survivors().collect());
        let flagged = named(matrix.flagged().collect());
        let idle = named(matrix.rows.iter().filter(|row| is_idle(row)).collect());
        // With another seed another one may be the first to see what is wrong; that is told, and no failure.
        let unexpected = if self.is_gate() { unexpected(matrix) } else { String::new() };
        for (what, names) in [
            ("nobody finds", survivors),
            ("taken for bugs, and they are none:", flagged),
            ("never struck, so that nothing is known of", idle),
            (UNEXPECTED, unexpected),
        ] {
            if !names.is_empty() {
                wrong.push(format!("{what} {names}"));
            }
        }
        if self.is_whole() {
            let needless = matrix.oracles.iter().filter(|(oracle, kills)| {
                kills.only == 0 && !REDUNDANT.iter().any(|(redundant, _)| redundant == *oracle)
            });
            wrong.extend(needless.map(|(oracle, _)| format!("there is no mutant that {oracle} alone finds")));
        }
        if optimised && self.is_standard() {
            for (what, cores, within) in [
                ("mutants", &matrix.mutants_core_ms, MUTANTS_WITHIN),
                ("controls", &matrix.controls_core_ms, CONTROLS_WITHIN),
            ] {
                let limit = within.as_millis() as u64;
                wrong.extend(on_two_cores(cores).filter(|taken| *taken > limit).map(|taken| {
                    format!(
                        "the {what} take {:.1} s on two cores, more than {}",
                        taken as f64 / 1000.0,
                        within.as_secs()
                    )
                }));
            }
        }
        broke(wrong)
    }

    /// Every oracle judges, with the seed of the gate.
    fn is_gate(&self) -> bool {
        self.without.is_empty() && self.seed() == Some(Seed::new(SEED))
    }

    /// All of it is run, and no more than that.
    fn is_standard(&self) -> bool {
        let standard = MatrixOptions::default();
        self.is_whole()
            && self.common.ops.is_none_or(|ops| ops <= standard.ops)
            && self.control_seeds <= standard.control_seeds
    }
}

/// Mutants that were found by an oracle that is not expected to find them, and by which.
fn unexpected(matrix: &Matrix) -> String {
    matrix.unexpected().map(|(row, oracle)| format!("{} by {oracle}", row.mutant)).collect::<Vec<_>>().join(", ")
}

/// How long it takes on two cores, in milliseconds, from what each thread took of its own: the same on a busy machine, where
/// the time that passes says nothing. What one thread did, two would share. More than two are not judged: they may have
/// shared cores, and slowed each other.
fn on_two_cores(cores: &[u64]) -> Option<u64> {
    match *cores {
        [one] => Some(one.div_ceil(2)),
        [one, other] => Some(one.max(other)),
        _ => None,
    }
}

/// A mutant that did nothing proves nothing. What lies in a declaration or in how a server ends has no requests to strike in.
fn is_idle(row: &Row) -> bool {
    let declares = row.mutant.parse().is_ok_and(|mutant: Mutant| mutant.spec().layer == Layer::Lifecycle);
    row.hits == 0 && !(declares && row.found.is_some())
}

/// A failure with every reason, if there is any.
fn broke(wrong: Vec<String>) -> Result<(), Failure> {
    match wrong.as_slice() {
        [] => Ok(()),
        [only] => Err(Failure::broke("mutants", only)),
        _ => {
            let what = format!("{} things are wrong", wrong.len());
            Err(Event::Finding(Finding { oracle: "mutants".to_owned(), what, detail: wrong }).into())
        }
    }
}

/// Writes it to the report directory, if there is one.
fn save(matrix: &impl Serialize, dir: Option<&Path>) -> Result<(), Failure> {
    let Some(dir) = dir else { return Ok(()) };
    crate::suite::save_json(&dir.join(FILE), matrix)
}

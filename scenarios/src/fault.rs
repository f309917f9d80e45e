//! `fault`: errors of every kind, at every point, at every rate, and what comes after them.
//!
//! A grid of faults lies between the device and its storage: one operation, one errno, one point of its application, one
//! rate at a time, under load. Each error that is made has to be seen, as the errno that the kernel makes of it, and each that
//! is seen has to have been made; what failed may have happened or not, and which is settled by the first read; and when the
//! fault is switched off, everything works again and nothing is left of it. Then requests are held, and answered in
//! pieces; and the device is closed while errors are pending, and while requests are held.

mod closing;
pub(crate) mod grid;
pub(crate) mod plain;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::{Value, json};
use ublkit_harness::mutant::Planted;
use ublkit_harness::plan::Capabilities;
use ublkit_harness::{Mutant, OpKind, Seed};

use self::grid::Cell;
use crate::cli::{CommonArgs, name_of};
use crate::context::Context;
use crate::scenario::{Failure, Needs, Plant, Scenario};
use crate::server::Lie;
use crate::sysfs::BlockDir;
use crate::target::TargetArgs;
use crate::torture::bench::{Bench, Work, on_subject};
use crate::torture::device::Subject;

/// Runs that are short and say something: calls on the queue's thread, and on threads of their own.
pub(crate) const SHORT: &[&[&str]] = &[
    &["--size", "64M", "--cells", "30"],
    &["--size", "64M", "--cells", "30", "--only", "grid", "--queues", "2", "--workers-backend", "4"],
];

/// What nobody else looks for: errors.
pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "error-swallowed",
        about: "an error of the storage is reported as success",
        arguments: &["--mutant", "error-swallowed:1"],
    },
    Plant {
        name: "error-sticky",
        about: "an error outlives its cause",
        arguments: &["--mutant", "error-sticky:200"],
    },
    Plant {
        name: "errno-lost",
        about: "whatever the storage said, the application is told EIO",
        arguments: &["--plant", "errno-lost"],
    },
];

/// How many operations each worker keeps in flight.
const DEPTH: u32 = 4;
/// The regions of workers are small: every cell is verified as a whole.
pub(crate) const REGION: u64 = 128 << 10;
/// The longest request, but for some that go beyond, in bytes.
const LONGEST: u64 = 16 << 10;
/// How long one cell may take.
const CELL_DEADLINE: Duration = Duration::from_secs(120);
/// How often a cell is done over, with ever more operations, until its fault has happened.
const TRIES: u32 = 6;

/// How much of the grid is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Grid {
    /// Some hundred cells, drawn from the seed, in which each operation meets each errno, point and rate.
    Sample,
    /// Every cell.
    Whole,
}

/// A part of the scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Errors, panics and delays, under load.
    Grid,
    /// Errno by errno, through plain system calls.
    Plain,
    /// Servers that answer in pieces.
    Pieces,
    /// Requests that are held, and closing while something is wrong.
    Closing,
}

/// A bug that is planted here, and not in a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Broken {
    /// The server tells the kernel `EIO`, whatever the backend said.
    ErrnoLost,
}

/// The arguments of `fault`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    target: TargetArgs,
    /// How much of the grid is done
    #[arg(long, value_enum, default_value = "sample", help_heading = "Faults")]
    grid: Grid,
    /// So many cells of the grid, drawn from the seed, and no more
    #[arg(long, value_name = "N", help_heading = "Faults")]
    cells: Option<usize>,
    /// These parts alone
    #[arg(long, value_enum, value_name = "PART,…", value_delimiter = ',', help_heading = "Faults")]
    only: Vec<Part>,
    /// Plant a bug in how errors and ends are handled
    #[arg(long, value_enum, help_heading = "Faults")]
    plant: Option<Broken>,
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        let mut options = self.target.options();
        options.insert("grid".to_owned(), json!(name_of(&self.grid)));
        options.insert("cells".to_owned(), json!(self.cells));
        options.insert("only".to_owned(), json!(self.only.iter().map(name_of).collect::<Vec<_>>()));
        options.insert("plant".to_owned(), json!(self.plant.as_ref().map(name_of)));
        options
    }

    fn needs(&self) -> Needs {
        Needs { ublk: true, tools: &[] }
    }

    fn validate(&self) -> Result<(), Failure> {
        self.common.refuse_ops("fault", "--cells and --duration say how much is done")?;
        if self.target.mutant.is_some() && !self.does(Part::Grid) && !self.does(Part::Plain) {
            return Err(Failure::Usage(
                "--mutant: pieces and closing are about servers of their own; have grid or plain among the parts of --only"
                    .to_owned(),
            ));
        }
        if self.target.read_only {
            return Err(Failure::Usage("--read-only: most faults are those of changes; leave it out".to_owned()));
        }
        if self.cells == Some(0) {
            return Err(Failure::Usage("--cells: a grid of none tries nothing; choose 1 or more".to_owned()));
        }
        if self.target.size < 16 << 20 {
            return Err(Failure::Usage("--size: choose at least 16M, so that the regions have room".to_owned()));
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        let evidence = context.evidence();
        let own = [Part::Pieces, Part::Closing].map(|part| self.does(part) && self.target.mutant.is_some());
        if own.contains(&true) {
            context.note(
                "beside --mutant, the parts pieces and closing are left out: they are about servers of their own",
            );
        }
        if self.does(Part::Grid) {
            for name in ["errors_injected", "errors_seen", "recovered_bytes", "storage_verified_bytes"] {
                evidence.require(name, 1);
            }
            self.grid(context)?;
        }
        if self.does(Part::Plain) {
            context.evidence().require("errnos", 1);
            plain::check(context, &self.served())?;
        }
        if self.does(Part::Pieces) && self.target.mutant.is_none() {
            self.in_pieces(context)?;
        }
        if self.does(Part::Closing) && self.target.mutant.is_none() {
            closing::check(context, &self.served())?;
        }
        if context.interruption().came() { Err(Failure::Interrupted) } else { Ok(()) }
    }
}

impl Args {
    fn does(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    /// What every part serves: with the bug that is planted.
    fn served(&self) -> TargetArgs {
        let lie = (self.plant == Some(Broken::ErrnoLost)).then_some(Lie::ErrnoLost);
        TargetArgs { lie, ..self.target.clone() }
    }

    fn grid(&self, context: &mut Context) -> Result<(), Failure> {
        let target = self.served();
        let until = context.duration().map(|duration| Instant::now() + duration);
        let mut wanted = 0;
        for round in 0.. {
            let cells = self.cells(context.seed(), round);
            wanted += cells.len() as u64;
            if round == 0 {
                context.evidence().require("cells", wanted);
            }
            on_a_device(context, &target, |context, bench| {
                cells
                    .iter()
                    .enumerate()
                    .try_for_each(|(index, cell)| try_cell(context, bench, *cell, round << 32 | index as u64))
            })?;
            context.evidence().require("cells", wanted);
            // A duration asks for more of them, each round with cells of its own.
            if until.is_none_or(|until| Instant::now() >= until) || context.interruption().came() {
                break;
            }
        }
        Ok(())
    }

    /// The cells of a round, in the order in which they are tried.
    fn cells(&self, seed: Seed, round: u64) -> Vec<Cell> {
        let mut rng = seed.derive("grid", round).rng();
        let mut cells = match self.grid {
            Grid::Sample => grid::sample(&mut rng),
            Grid::Whole => grid::whole(),
        };
        // What the device does not offer, nobody can ask for.
        let offered = Capabilities::of(&self.target.geometry());
        cells.retain(|cell| offered.offers(cell.op));
        if self.grid == Grid::Whole {
            rng.shuffle(&mut cells);
        }
        cells.truncate(self.cells.unwrap_or(usize::MAX));
        cells
    }

    /// Servers that answer in pieces, which is their right, with errors in the middle of it.
    fn in_pieces(&self, context: &mut Context) -> Result<(), Failure> {
        for (mutant, op) in [(Mutant::ReadInPieces, OpKind::Read), (Mutant::WriteInPieces, OpKind::Write)] {
            let mutant = Some(Planted { mutant, every: 2 });
            let args = TargetArgs { mutant, workers_backend: 0, ..self.served() };
            on_a_device(context, &args, |context, bench| {
                // A piece of what two operations share would fail, and both of them with it.
                BlockDir::of(&bench.subject.ours()?.path()).set("queue/nomerges", "2")?;
                for (number, cell) in grid::in_pieces(op).into_iter().enumerate() {
                    try_cell(context, bench, cell, u64::MAX - number as u64)?;
                }
                let hits = bench.subject.ours()?.mutant_hits()?;
                context.evidence().add("answers_in_pieces", hits);
                Ok(())
            })?;
        }
        context.evidence().require("answers_in_pieces", 10);
        Ok(())
    }
}

/// Makes a device, has `work` do its work on it, and compares its storage.
fn on_a_device(
    context: &mut Context,
    args: &TargetArgs,
    work: impl FnOnce(&mut Context, &Bench) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let limit = Duration::from_secs(60);
    let subject = context.step("start", limit, |context| args.start(context).map(Subject::Ours))?;
    let worked = on_subject(context, &subject, REGION, work);
    let closed = context.always("close", Duration::from_secs(120), |context| subject.close(context));
    worked.and(closed)
}

/// Tries one fault: under load, until it has happened; and then without it.
pub(crate) fn try_cell(context: &mut Context, bench: &Bench, cell: Cell, number: u64) -> Result<(), Failure> {
    context.step(&cell.to_string(), CELL_DEADLINE, |context| {
        let (shared, own) = bench.layout.first_and_last();
        let (mut ops, mut times) = (cell.often.ops(), 0);
        for attempt in 0..TRIES {
            let seed = context.seed().derive("cell", number).derive("attempt", attempt.into());
            bench.subject.ours()?.replan(&cell.plan(shared, own), seed)?;
            times = load(context, bench, cell, ops, seed)?;
            if times > 0 || context.interruption().came() {
                break;
            }
            ops *= 2;
        }
        // It is switched off: nothing fails any more, and every byte is what it may be.
        let bytes = bench.verify()?;
        bench.opened.file.sync_all().map_err(|error| Failure::io("flush once the fault is switched off", &error))?;
        context.evidence().add("recovered_bytes", bytes);
        context.evidence().add("cells", u64::from(times > 0));
        context.detail(format!("{times} times"));
        Ok(())
    })
}

/// How often the fault of the cell has happened.
fn load(context: &Context, bench: &Bench, cell: Cell, ops: u64, seed: Seed) -> Result<u64, Failure> {
    let before = happened(context);
    let work = Work {
        seed,
        mix: cell.mix(),
        depth: DEPTH,
        // Short, for the errors' sake: there are more of them.
        longest: LONGEST,
        ops: Some(ops),
        until: None,
        errors_may_be: true,
        outages: Vec::new(),
    };
    bench.work(context, work)?;
    Ok(happened(context) - before)
}

/// Faults until now, whatever their kind.
fn happened(context: &Context) -> u64 {
    context.evidence().snapshot().count("faults")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn cells(arguments: &str, seed: u64, round: u64) -> Vec<Cell> {
        let line = Line::parse_from(["fault"].into_iter().chain(arguments.split_whitespace()));
        line.args.cells(Seed::new(seed), round)
    }

    #[test]
    fn every_round_has_what_was_asked_for_and_cells_of_its_own() {
        for grid in ["", "--grid whole"] {
            let rounds = [0, 1, 2].map(|round| cells(&format!("{grid} --cells 30"), 1, round));
            assert!(rounds.iter().all(|cells| cells.len() == 30), "{grid}");
            assert!(rounds[0] != rounds[1] && rounds[1] != rounds[2], "{grid}");
            assert_ne!(rounds[0], cells(&format!("{grid} --cells 30"), 2, 0), "{grid}: drawn from the seed");
            let of_many: std::collections::BTreeSet<_> = rounds[0].iter().map(|cell| cell.op).collect();
            assert!(of_many.len() > 2, "{grid}: {of_many:?}");
        }
        assert_eq!(cells("--grid whole", 1, 1).len(), 1898);
    }

    #[test]
    fn nobody_asks_for_what_the_device_does_not_offer() {
        for grid in ["sample", "whole"] {
            let ops = |list: &str| -> std::collections::BTreeSet<_> {
                cells(&format!("--grid {grid} --capabilities {list}"), 1, 0).iter().map(|cell| cell.op).collect()
            };
            assert_eq!(ops("flush"), [OpKind::Read, OpKind::Write, OpKind::Flush].into());
            assert_eq!(ops("flush,fua,discard,zeroes"), grid::OPS.into());
        }
    }
}

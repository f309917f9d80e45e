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
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::{Value, json};
use ublkit_harness::mutant::Planted;
use ublkit_harness::{IoSize, Mix, Mutant, OpKind, Plan, PlanOptions, Seed};

use self::grid::Cell;
use crate::cli::{CommonArgs, name_of};
use crate::context::Context;
use crate::scenario::{Failure, Needs, Plant, Scenario};
use crate::server::Lie;
use crate::sysfs::BlockDir;
use crate::target::{Target, TargetArgs};
use crate::torture::accounts::Accounts;
use crate::torture::crew::Crew;
use crate::torture::device::{Opened, Subject};
use crate::torture::shared::{Orders, Shared};
use crate::torture::sharing::{Books, Layout, Sharing};
use crate::torture::verify;

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

/// Workers, and how many operations each keeps in flight.
const WORKERS: u32 = 4;
const DEPTH: u32 = 4;
/// The regions of workers are small: every cell is verified as a whole.
const REGION: u64 = 128 << 10;
/// The longest request, but for some that go beyond, in bytes.
const LONGEST: u64 = 16 << 10;
/// How long one cell may take.
const CELL_DEADLINE: Duration = Duration::from_secs(120);
/// How long an operation may take before that is a hang.
const STALL: Duration = Duration::from_secs(60);
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
        if self.does(Part::Grid) {
            for name in ["errors_injected", "errors_seen", "recovered_bytes", "storage_verified_bytes"] {
                evidence.require(name, 1);
            }
            self.grid(context)?;
        }
        if self.does(Part::Plain) {
            context.evidence().require("errnos", 1);
            plain::check(context, &self.target)?;
        }
        if self.does(Part::Pieces) && self.target.mutant.is_none() {
            self.in_pieces(context)?;
        }
        if self.does(Part::Closing) && self.target.mutant.is_none() {
            closing::check(context, &self.target)?;
        }
        if context.interruption().came() { Err(Failure::Interrupted) } else { Ok(()) }
    }
}

/// What cells are tried on.
pub(crate) struct Bench<'a> {
    pub(crate) subject: &'a Subject,
    pub(crate) opened: Opened,
    pub(crate) layout: Layout,
    pub(crate) books: Books,
}

impl Bench<'_> {
    fn target(&self) -> Result<&Target, Failure> {
        match self.subject {
            Subject::Ours(target) => Ok(target),
            Subject::SomebodyElses { .. } => Err(Failure::Internal("faults are for devices of our own".to_owned())),
        }
    }
}

impl Args {
    fn does(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    fn grid(&self, context: &mut Context) -> Result<(), Failure> {
        let mut rng = context.seed().derive("grid", 0).rng();
        let mut cells = match self.grid {
            Grid::Sample => grid::sample(&mut rng),
            Grid::Whole => grid::whole(),
        };
        cells.truncate(self.cells.unwrap_or(usize::MAX));
        context.evidence().require("cells", cells.len() as u64);
        let target = TargetArgs {
            lie: (self.plant == Some(Broken::ErrnoLost)).then_some(Lie::ErrnoLost),
            ..self.target.clone()
        };
        let until = context.duration().map(|duration| Instant::now() + duration);
        let mut round = 0;
        loop {
            on_a_device(context, &target, |context, bench| {
                cells
                    .iter()
                    .enumerate()
                    .try_for_each(|(index, cell)| try_cell(context, bench, *cell, round << 32 | index as u64))
            })?;
            // A duration asks for more of them, each round with cells of its own.
            if until.is_none_or(|until| Instant::now() >= until) || context.interruption().came() {
                return Ok(());
            }
            round += 1;
            cells = grid::sample(&mut context.seed().derive("grid", round).rng());
        }
    }

    /// Servers that answer in pieces, which is their right, with errors in the middle of it.
    fn in_pieces(&self, context: &mut Context) -> Result<(), Failure> {
        for (mutant, op) in [(Mutant::ReadInPieces, OpKind::Read), (Mutant::WriteInPieces, OpKind::Write)] {
            let mutant = Some(Planted { mutant, every: 2 });
            let args = TargetArgs { mutant, workers_backend: 0, ..self.target.clone() };
            on_a_device(context, &args, |context, bench| {
                // A piece of what two operations share would fail, and both of them with it.
                BlockDir::of(&bench.target()?.path()).set("queue/nomerges", "2")?;
                for (number, cell) in grid::in_pieces(op).into_iter().enumerate() {
                    try_cell(context, bench, cell, u64::MAX - number as u64)?;
                }
                let hits = bench.target()?.mutant_hits()?;
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
    let worked = on_subject(context, &subject, work);
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
            bench.target()?.replan(&cell.plan(shared, own), seed)?;
            times = load(context, bench, cell, ops, seed)?;
            if times > 0 || context.interruption().came() {
                break;
            }
            ops *= 2;
        }
        // It is switched off: nothing fails any more, and every byte is what it may be.
        let file = bench.subject.open()?.file;
        let bytes = verify::all(bench.books.iter(), |buf, offset| crate::torture::read_device(&file, buf, offset))?;
        file.sync_all().map_err(|error| Failure::io("flush once the fault is switched off", &error))?;
        context.evidence().add("recovered_bytes", bytes);
        context.evidence().add("cells", u64::from(times > 0));
        context.detail(format!("{times} times"));
        Ok(())
    })
}

/// How often the fault of the cell has happened.
fn load(context: &Context, bench: &Bench, cell: Cell, ops: u64, seed: Seed) -> Result<u64, Failure> {
    let before = happened(context);
    let plan = plan(bench, cell.mix(), seed)?;
    let accounts = Accounts::new(plan.options().workers, true, bench.opened.capabilities.flush);
    let orders = Orders {
        ops: Some(ops),
        until: None,
        passes: false,
        prefill: false,
        max_io_bytes: bench.opened.max_io_bytes,
        stall: STALL,
        hang: false,
    };
    let shared = Arc::new(Shared::new(orders, plan.options().workers, Some(accounts), context));
    let (subject, opened, layout, books) = (bench.subject, &bench.opened, &bench.layout, &bench.books);
    Crew { subject, opened, plan: &plan, layout, books, outages: Vec::new() }.work(context, &shared)?;
    Ok(happened(context) - before)
}

fn plan(bench: &Bench, mix: Mix, seed: Seed) -> Result<Plan, Failure> {
    let Opened { bytes, logical_block, max_io_bytes, capabilities, .. } = bench.opened;
    // Short, for the errors' sake: there are more of them.
    let mut options = PlanOptions::new(bytes, logical_block, max_io_bytes.min(LONGEST), WORKERS);
    bench.layout.apply(&mut options);
    options.depth = DEPTH;
    options.mix = mix;
    options.size = IoSize::Any;
    options.capabilities = capabilities;
    Plan::new(options, seed).map_err(|error| Failure::Usage(error.to_string()))
}

pub(crate) fn on_subject(
    context: &mut Context,
    subject: &Subject,
    work: impl FnOnce(&mut Context, &Bench) -> Result<(), Failure>,
) -> Result<(), Failure> {
    // Whoever probes the device meanwhile would see errors that are nobody's.
    let _ours_alone = subject.keep_to_ourselves()?;
    let opened = subject.open()?;
    let layout = Layout::new(Sharing::Both, WORKERS, REGION, &opened);
    let books = layout.books(&opened, context.seed(), false);
    let bench = Bench { subject, opened, layout, books };
    work(context, &bench)?;
    let storage = bench.target()?.storage();
    context.step("verify against the storage", CELL_DEADLINE, |context| {
        let bytes = verify::all(bench.books.iter(), |buf, offset| storage.read_at(buf, offset))?;
        context.evidence().add("storage_verified_bytes", bytes);
        context.detail(format!("{bytes} bytes"));
        Ok(())
    })
}

/// Faults until now, whatever their kind.
fn happened(context: &Context) -> u64 {
    context.evidence().snapshot().count("faults")
}

//! `chain`: devices stacked on devices.
//!
//! The lowest keeps the bytes; each of the others keeps its own on the one below, which it opens past the page cache; all
//! in one server process, or each in one of its own. What is done at the top has to arrive at the bottom as it was meant:
//! every byte, every flush, every FUA; and what goes wrong at the bottom has to be told at the top by its name. A file
//! system lives on the top; and the page cache writes through all of it while memory is short, and nothing
//! waits for itself. In the end the chain is closed from the top, and once from the bottom.

mod cgroup;
mod closing;
mod files;
mod orders;
mod pressure;
mod stack;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::{Value, json};
use ublkit_harness::fault::{Errno, Stage};
use ublkit_harness::{IoSize, Mix, OpKind, Plan, PlanOptions};

pub(crate) use self::pressure::{ARGUMENT, main as load};
use self::stack::Chain;
use crate::cli::{CommonArgs, name_of};
use crate::context::Context;
use crate::fault::grid::{Cell, Often, What};
use crate::fault::{Bench, on_subject, plain, try_cell};
use crate::scenario::{Entry, Failure, Needs, Plant, Scenario};
use crate::server::Lie;
use crate::target::{BackendKind, TargetArgs};
use crate::torture::accounts::Accounts;
use crate::torture::crew::Crew;
use crate::torture::outage::Outage;
use crate::torture::shared::{Orders, Shared};
use crate::torture::verify;

pub(crate) const ENTRY: Entry = Entry::new::<Args>(
    "chain",
    "devices stacked on devices: bytes, flushes, errors and memory pressure go through all of them",
)
.short(&[&["--links", "2", "--size", "64M"], &["--links", "3", "--processes", "--size", "64M"]])
.plants(&[
    Plant {
        name: "swallowed-flush",
        about: "a proxy acknowledges flushes and passes none on",
        arguments: &["--only", "load", "--plant", "swallowed-flush"],
    },
    Plant {
        name: "dropped-fua",
        about: "a proxy passes writes with FUA on as plain ones",
        arguments: &["--only", "load", "--plant", "dropped-fua"],
    },
    Plant {
        name: "flat-errno",
        about: "a proxy tells EIO, whatever it was told",
        arguments: &["--only", "errors", "--plant", "flat-errno"],
    },
    Plant {
        name: "off-by-one",
        about: "a proxy is one block off at the end of the device",
        arguments: &["--only", "load", "--plant", "off-by-one"],
    },
]);

/// How many workers load the top, and how many operations each keeps in flight.
const WORKERS: u32 = 4;
const DEPTH: u32 = 8;
/// How long an operation may take before that is a hang.
const STALL: Duration = Duration::from_secs(60);
/// How many operations each worker does, and for how long the power is cut now and then.
const OPS: u64 = 80;
const CUTS_FOR: Duration = Duration::from_secs(5);

/// A part of the scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Seeded random I/O, with faults at the bottom and without
    Load,
    /// A flush and a FUA write at a time, and errno by errno
    Errors,
    /// Power cuts at the bottom, under load
    Power,
    /// A file system
    Files,
    /// Buffered writes far beyond the memory there is; not done unless named
    Pressure,
    /// Closing the bottom while the top is there
    Closing,
}

/// A bug that is planted in the lowest proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Broken {
    SwallowedFlush,
    DroppedFua,
    FlatErrno,
    OffByOne,
}

impl Broken {
    const fn lie(self) -> Lie {
        match self {
            Self::SwallowedFlush => Lie::FlushSwallowed,
            Self::DroppedFua => Lie::FuaDropped,
            Self::FlatErrno => Lie::ErrnoLost,
            Self::OffByOne => Lie::OffByOne,
        }
    }
}

/// The arguments of `chain`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    target: TargetArgs,
    /// How many devices are stacked, the one that keeps the bytes included
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=4), help_heading = "Chain")]
    links: u8,
    /// Serve each device from a process of its own, instead of all from one
    #[arg(long, help_heading = "Chain")]
    processes: bool,
    /// These parts alone
    #[arg(long, value_enum, value_name = "PART,…", value_delimiter = ',', help_heading = "Chain")]
    only: Vec<Part>,
    /// Plant a bug in the lowest proxy
    #[arg(long, value_enum, value_name = "NAME", hide_possible_values = true)]
    plant: Option<Broken>,
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        let mut options = self.target.options();
        let only: Vec<_> = self.only.iter().map(name_of).collect();
        options.insert("links".to_owned(), json!(self.links));
        options.insert("processes".to_owned(), json!(self.processes));
        options.insert("only".to_owned(), json!(only));
        options.insert("plant".to_owned(), json!(self.plant.as_ref().map(name_of)));
        options
    }

    fn needs(&self) -> Needs {
        Needs { ublk: true, tools: if self.does(Part::Files) { &["mkfs.ext4", "e2fsck"] } else { &[] } }
    }

    fn validate(&self) -> Result<(), Failure> {
        if self.target.read_only || self.target.mutant.is_some() {
            return Err(Failure::Usage("--read-only and --mutant say nothing to chain: use torture".to_owned()));
        }
        if self.target.size < 32 << 20 {
            return Err(Failure::Usage("--size: choose at least 32M, so that all parts have room".to_owned()));
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        self.require(context);
        let parts = [Part::Load, Part::Errors, Part::Files, Part::Pressure];
        if parts.into_iter().any(|part| self.does(part)) {
            self.on_a_chain(context, &self.target, |context, chain| {
                if self.does(Part::Load) {
                    Self::load(context, chain)?;
                }
                if self.does(Part::Errors) {
                    orders::check(context, chain)?;
                    context.step("errno by errno", Duration::from_secs(120), |context| {
                        plain::each(context, chain.top()?)
                    })?;
                }
                if self.does(Part::Files) {
                    files::check(context, chain)?;
                }
                if self.does(Part::Pressure) {
                    pressure::check(context, chain)?;
                }
                Ok(())
            })?;
        }
        if self.does(Part::Power) {
            let target = TargetArgs { backend: BackendKind::Medium, ..self.target.clone() };
            self.on_a_chain(context, &target, Self::power)?;
        }
        if self.does(Part::Closing) {
            closing::check(self, context)?;
        }
        if context.interruption().came() { Err(Failure::Interrupted) } else { Ok(()) }
    }
}

impl Args {
    fn does(&self, part: Part) -> bool {
        // Memory pressure is asked for by name: what a limit does to those who write depends on the machine's speed.
        (self.only.is_empty() && part != Part::Pressure) || self.only.contains(&part)
    }

    /// What a run must have done to be one.
    fn require(&self, context: &Context) {
        let links = u64::from(self.links);
        let all: &[(Part, &[(&str, u64)])] = &[
            (
                Part::Load,
                &[
                    ("ops", 100),
                    ("verified_bytes", 64 << 10),
                    ("final_verified_bytes", 64 << 10),
                    ("storage_verified_bytes", 64 << 10),
                    ("flushes_checked", 1),
                    ("durable_writes_checked", 1),
                    ("marked_threads", links),
                    ("cells", cells().len() as u64),
                    ("errors_seen", 5),
                ],
            ),
            (Part::Errors, &[("errnos", 50), ("flushes_at_the_bottom", 8), ("fua_writes_at_the_bottom", 8)]),
            (Part::Power, &[("power_cuts", 1), ("flushes", 1), ("ops", 20)]),
            (Part::Files, &[("files_verified_after_remount", files::FILES as u64), ("fsyncs_at_the_bottom", 1)]),
            (Part::Pressure, &[("pressure_bytes_verified", pressure::BYTES), ("memory_limit_hits", 1)]),
            (Part::Closing, &[("holders_named", 1), ("ids_free_after_letting_go", 1)]),
        ];
        for (part, counts) in all {
            if self.does(*part) {
                counts.iter().for_each(|(name, least)| context.evidence().require(name, *least));
            }
        }
    }

    fn lie(&self) -> Option<Lie> {
        self.plant.map(Broken::lie)
    }

    /// Makes a chain, has `work` do its work on it, and closes it from the top.
    fn on_a_chain(
        &self,
        context: &mut Context,
        target: &TargetArgs,
        work: impl FnOnce(&mut Context, &Chain) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let chain = self.start(context, target)?;
        let worked = work(context, &chain);
        let closed = context.always("close from the top", Duration::from_secs(180), |context| chain.close(context));
        worked.and(closed)
    }

    fn start(&self, context: &mut Context, target: &TargetArgs) -> Result<Chain, Failure> {
        let (links, lie) = (usize::from(self.links), self.lie());
        context.step("start", Duration::from_secs(120), |context| {
            Chain::start(context, target, links, self.processes, lie)
        })
    }

    /// Random I/O at the top, judged by what happens at the bottom.
    fn load(context: &mut Context, chain: &Chain) -> Result<(), Failure> {
        context.step("threads are marked", Duration::from_secs(30), |context| {
            let threads = chain.check_reclaim()?;
            context.evidence().add("marked_threads", threads as u64);
            context.detail(format!("{threads} threads that serve {} devices", chain.len()));
            Ok(())
        })?;
        on_subject(context, chain.subject(), |context, bench| {
            context.step("load", Duration::from_secs(180), |context| {
                Self::draw(context, bench, Some(OPS), Vec::new())
            })?;
            for (number, cell) in cells().into_iter().enumerate() {
                try_cell(context, bench, cell, number as u64)?;
            }
            context.step("verify through a second opening", Duration::from_secs(180), |context| {
                second_opening(context, bench)
            })
        })
    }

    /// The power is cut at the bottom; what was flushed at the top is there.
    fn power(context: &mut Context, chain: &Chain) -> Result<(), Failure> {
        let subject = chain.subject();
        let _ours_alone = subject.keep_to_ourselves()?;
        let opened = subject.open()?;
        let layout =
            crate::torture::sharing::Layout::new(crate::torture::sharing::Sharing::Both, WORKERS, 256 << 10, &opened);
        let books = layout.books(&opened, context.seed(), true);
        let bench = Bench { subject, opened, layout, books };
        context.step("power cuts", Duration::from_secs(180), |context| {
            let every = Duration::from_millis(1500);
            Self::draw(context, &bench, None, vec![(Outage::PowerCut, every)])
        })?;
        context.step("verify what survived", Duration::from_secs(180), |context| second_opening(context, &bench))
    }

    /// Draws operations and does them.
    fn draw(
        context: &Context,
        bench: &Bench,
        ops: Option<u64>,
        outages: Vec<(Outage, Duration)>,
    ) -> Result<(), Failure> {
        let opened = &bench.opened;
        let mut options = PlanOptions::new(opened.bytes, opened.logical_block, opened.max_io_bytes, WORKERS);
        bench.layout.apply(&mut options);
        options.depth = DEPTH;
        // Where the power is cut, much is to be durable.
        options.mix = if outages.is_empty() {
            Mix::default()
        } else {
            Mix { read: 20, write: 40, fua: 10, flush: 20, ..Mix::NOTHING }
        };
        options.size = IoSize::Any;
        options.capabilities = opened.capabilities;
        let seed = context.seed().derive("chain", u64::from(ops.is_none()));
        let plan = Plan::new(options, seed).map_err(|error| Failure::Usage(error.to_string()))?;
        let for_a_while = context.duration().unwrap_or(CUTS_FOR);
        // A duration asks for more of it.
        let ops = if context.duration().is_some() { None } else { ops };
        let orders = Orders {
            ops,
            until: ops.is_none().then(|| Instant::now() + for_a_while),
            passes: false,
            prefill: false,
            max_io_bytes: opened.max_io_bytes,
            stall: STALL,
            hang: false,
        };
        let workers = plan.options().workers;
        // What a power cut leaves speaks for itself: only so is it seen that it would.
        let accounts = outages.is_empty().then(|| Accounts::new(workers, false, opened.capabilities.flush));
        let shared = Arc::new(Shared::new(orders, workers, accounts, context));
        let (subject, layout, books) = (bench.subject, &bench.layout, &bench.books);
        Crew { subject, opened, plan: &plan, layout, books, outages }.work(context, &shared)
    }
}

fn second_opening(context: &mut Context, bench: &Bench) -> Result<(), Failure> {
    let file = bench.subject.open()?.file;
    let bytes = verify::all(bench.books.iter(), |buf, offset| crate::torture::read_device(&file, buf, offset))?;
    context.evidence().add("final_verified_bytes", bytes);
    context.detail(format!("{bytes} bytes"));
    Ok(())
}

/// Faults at the bottom, under load at the top.
fn cells() -> Vec<Cell> {
    let cell = |op, errno, stage, often| Cell { op, what: What::Error(errno, stage), often };
    vec![
        cell(OpKind::Read, Errno::EIO, Stage::Before, Often::Tenth),
        cell(OpKind::Write, Errno::ENOSPC, Stage::After, Often::Tenth),
        cell(OpKind::WriteZeroes, Errno::EIO, Stage::Before, Often::Bursts),
        Cell { op: OpKind::Write, what: What::Delay, often: Often::Tenth },
    ]
}

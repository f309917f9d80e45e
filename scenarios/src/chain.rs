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
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::{Value, json};
use ublkit_harness::fault::{Errno, Stage};
use ublkit_harness::mutant::Planted;
use ublkit_harness::plan::Capabilities;
use ublkit_harness::{Mix, Mutant, OpKind};

pub(crate) use self::pressure::{ARGUMENT, main as load};
use self::stack::Chain;
use crate::cli::{CommonArgs, name_of};
use crate::context::Context;
use crate::fault::grid::{Cell, Often, What};
use crate::fault::{REGION, plain, try_cell};
use crate::scenario::{Entry, Failure, Needs, Plant, Scenario};
use crate::server::Lie;
use crate::target::{BackendKind, TargetArgs};
use crate::torture::bench::{Bench, Work, on_subject};
use crate::torture::outage::Outage;

pub(crate) const ENTRY: Entry = Entry::new::<Args>(
    "chain",
    "devices stacked on devices: bytes, flushes, errors and memory pressure go through all of them",
)
.short(&[
    &["--links", "2", "--size", "64M"],
    &["--links", "3", "--processes", "--size", "64M"],
    &["--links", "2", "--processes", "--size", "64M", "--only", "pressure"],
])
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
        name: "swallowed-flush-orders",
        about: "the same, one flush at a time",
        arguments: &["--only", "errors", "--plant", "swallowed-flush"],
    },
    Plant {
        name: "dropped-fua-orders",
        about: "the same, one write at a time",
        arguments: &["--only", "errors", "--plant", "dropped-fua"],
    },
    Plant {
        name: "swallowed-flush-power",
        about: "the same, by what a power cut leaves",
        arguments: &["--only", "power", "--plant", "swallowed-flush"],
    },
    Plant {
        name: "shorn-write-files",
        about: "a proxy passes the beginning of a write on, and acknowledges all of it: a file system has holes",
        arguments: &["--only", "files", "--plant", "shorn-write"],
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
    Plant {
        name: "swallowed-error",
        about: "a proxy takes errors of the device below for successes",
        arguments: &["--only", "errors", "--plant", "swallowed-error"],
    },
    Plant {
        name: "swallowed-error-closing",
        about: "the same, once the device below is gone",
        arguments: &["--only", "closing", "--plant", "swallowed-error"],
    },
]);

/// How many operations each worker keeps in flight.
const DEPTH: u32 = 8;
/// The smallest device on which all parts have room, in bytes.
const SIZE_MIN: u64 = 32 << 20;
/// How long a step may take, beside what `--duration` asks for.
const LIMIT: Duration = Duration::from_secs(180);
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
    ShornWrite,
    FlatErrno,
    OffByOne,
    SwallowedError,
}

impl Broken {
    /// What the lowest proxy is started with instead of `args`.
    fn planted(self, args: TargetArgs) -> TargetArgs {
        let mutant = |mutant, every| Some(Planted { mutant, every });
        match self {
            Self::SwallowedFlush => TargetArgs { mutant: mutant(Mutant::FlushNoop, 1), ..args },
            Self::DroppedFua => TargetArgs { mutant: mutant(Mutant::FuaIgnored, 1), ..args },
            Self::ShornWrite => TargetArgs { mutant: mutant(Mutant::ShornWrite, 3), ..args },
            Self::FlatErrno => TargetArgs { lie: Some(Lie::ErrnoLost), ..args },
            Self::OffByOne => TargetArgs { lie: Some(Lie::OffByOne), ..args },
            // As rarely as can be of its own: those of the device below are meant.
            Self::SwallowedError => TargetArgs { mutant: mutant(Mutant::ErrorSwallowed, u64::MAX), ..args },
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
        self.common.refuse_ops("chain", "--duration says how long it goes on")?;
        // What arrives at the bottom is judged by them: a chain without them has nothing to say there.
        let offered = self.offered();
        let judged = [Part::Load, Part::Errors, Part::Power, Part::Files].into_iter().any(|part| self.does(part));
        if judged && !(offered.flush && offered.fua) {
            return Err(Failure::Usage(
                "--capabilities: a chain is judged by its flushes and FUA writes; have flush and fua among them, or \
                 --only closing"
                    .to_owned(),
            ));
        }
        const { assert!(pressure::BYTES <= SIZE_MIN) };
        if self.target.size < SIZE_MIN {
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
                    ("cells", cells(self.offered()).len() as u64),
                    ("errors_seen", 5),
                ],
            ),
            (Part::Errors, &[("errnos", 50), ("flushes_at_the_bottom", 8), ("fua_writes_at_the_bottom", 8)]),
            (Part::Power, &[("power_cuts", 1), ("flushes", 1), ("ops", 20)]),
            (Part::Files, &[("files_verified_after_remount", files::FILES as u64), ("fsyncs_at_the_bottom", 1)]),
            (
                Part::Pressure,
                &[
                    ("pressure_bytes_verified", pressure::BYTES),
                    ("memory_limit_hits", 1),
                    ("pages_scanned_for_memory", 1),
                ],
            ),
            (Part::Closing, &[("holders_named", 1), ("ids_free_after_letting_go", 1)]),
        ];
        let hits = self.plant.is_some_and(|plant| plant.planted(self.target.clone()).mutant.is_some());
        context.evidence().require("mutant_hits", u64::from(hits));
        for (part, counts) in all {
            if self.does(*part) {
                counts.iter().for_each(|(name, least)| context.evidence().require(name, *least));
            }
        }
    }

    fn offered(&self) -> Capabilities {
        Capabilities::of(&self.target.geometry())
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
        let closed = context.always("close from the top", LIMIT, |context| chain.close(context));
        worked.and(closed)
    }

    fn start(&self, context: &mut Context, target: &TargetArgs) -> Result<Chain, Failure> {
        let (links, plant) = (usize::from(self.links), self.plant);
        context.step("start", Duration::from_secs(120), |context| {
            Chain::start(context, target, links, self.processes, plant)
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
        on_subject(context, chain.subject(), REGION, |context, bench| {
            context.step("load", limit(context), |context| Self::draw(context, bench, Some(OPS), Vec::new()))?;
            for (number, cell) in cells(bench.opened.capabilities).into_iter().enumerate() {
                try_cell(context, bench, cell, number as u64)?;
            }
            context.step("verify through a second opening", LIMIT, |context| second_opening(context, bench))
        })
    }

    /// The power is cut at the bottom; what was flushed at the top is there.
    fn power(context: &mut Context, chain: &Chain) -> Result<(), Failure> {
        let subject = chain.subject();
        let _ours_alone = subject.keep_to_ourselves()?;
        let bench = Bench::open(context, subject, 256 << 10, true)?;
        context.step("power cuts", limit(context), |context| {
            let every = Duration::from_millis(1500);
            Self::draw(context, &bench, None, vec![(Outage::PowerCut, every)])
        })?;
        context.step("verify what survived", LIMIT, |context| second_opening(context, &bench))
    }

    /// Draws operations and does them.
    fn draw(
        context: &Context,
        bench: &Bench,
        ops: Option<u64>,
        outages: Vec<(Outage, Duration)>,
    ) -> Result<(), Failure> {
        // A duration asks for more of it.
        let ops = if context.duration().is_some() { None } else { ops };
        let for_a_while = context.duration().unwrap_or(CUTS_FOR);
        let work = Work {
            seed: context.seed().derive("chain", u64::from(!outages.is_empty())),
            // Where the power is cut, much is to be durable. By flushes above all: a proxy writes with O_DSYNC what comes with
            // FUA, and the flush that the kernel sends behind that makes up for one that was lost.
            mix: if outages.is_empty() {
                Mix::default()
            } else {
                Mix { read: 20, write: 40, fua: 1, flush: 20, ..Mix::NOTHING }
            },
            depth: DEPTH,
            longest: u64::MAX,
            ops,
            until: ops.is_none().then(|| Instant::now() + for_a_while),
            errors_may_be: false,
            outages,
        };
        bench.work(context, work)
    }
}

fn second_opening(context: &mut Context, bench: &Bench) -> Result<(), Failure> {
    let bytes = bench.verify()?;
    context.evidence().add("final_verified_bytes", bytes);
    context.detail(format!("{bytes} bytes"));
    Ok(())
}

/// How long a step may take that goes on for as long as it was asked to.
fn limit(context: &Context) -> Duration {
    LIMIT.saturating_add(context.duration().unwrap_or_default())
}

/// Faults at the bottom, under load at the top, of what the devices offer.
fn cells(offered: Capabilities) -> Vec<Cell> {
    let cell = |op, errno, stage, often| Cell { op, what: What::Error(errno, stage), often };
    let mut cells = vec![
        cell(OpKind::Read, Errno::EIO, Stage::Before, Often::Tenth),
        cell(OpKind::Write, Errno::ENOSPC, Stage::After, Often::Tenth),
        cell(OpKind::WriteZeroes, Errno::EIO, Stage::Before, Often::Bursts),
        Cell { op: OpKind::Write, what: What::Delay, often: Often::Tenth },
    ];
    cells.retain(|cell| offered.offers(cell.op));
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::testing;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(arguments: &str) -> Args {
        Line::parse_from(["chain"].into_iter().chain(arguments.split_whitespace())).args
    }

    #[test]
    fn a_step_may_take_what_it_was_asked_to() {
        let mut testing = testing::context();
        assert_eq!(limit(&testing.context), LIMIT);
        testing.context.duration = Some(Duration::from_secs(3600));
        assert_eq!(limit(&testing.context), LIMIT + Duration::from_secs(3600));
    }

    #[test]
    fn nobody_asks_for_what_the_devices_do_not_offer() {
        assert_eq!(cells(args("").offered()).len(), 4);
        assert!(cells(args("--capabilities flush,fua").offered()).iter().all(|cell| cell.op != OpKind::WriteZeroes));
    }

    #[test]
    fn a_chain_is_judged_by_flushes_and_fua() {
        for (arguments, right) in [
            ("", true),
            ("--capabilities flush,fua", true),
            ("--capabilities flush", false),
            ("--capabilities none", false),
            ("--capabilities none --only closing", true),
        ] {
            assert_eq!(args(arguments).validate().is_ok(), right, "{arguments}");
        }
    }
}

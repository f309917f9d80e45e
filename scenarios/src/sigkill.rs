//! `sigkill`: a server that is killed at every point of its life, in every recovery mode.
//!
//! The server is a process of its own, and the load and all verification are in this one. Each cell of the grid brings a
//! server to one point of its life, kills it there, and looks:
//!
//! - what became of every operation is what the mode promises: `timeline`;
//! - the device comes into the state that the mode promises, in bounded time;
//! - another server takes it over, or a new device with the same id is served from the same storage;
//! - every byte that was promised to last is there, read through the device and from its storage: `book`;
//! - STOP and DEL work, nothing is left: no id, node, descriptor, thread, nor a process that cannot be killed.

mod aftermath;
mod book;
mod cell;
mod load;
mod mode;
mod point;
mod process;
mod protocol;
mod role;
mod store;
mod table;
mod timeline;
mod visit;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use ublkit::Controller;
use ublkit_harness::Seed;
use ublkit_harness::kernel_log::Complaint;

use self::cell::{Cell, Report};
use self::mode::Mode;
use self::point::{Point, Reached};
use self::store::BLOCK;
use crate::cli::CommonArgs;
use crate::context::Context;
use crate::inventory::Inventory;
use crate::kernel_log::KernelLog;
use crate::scenario::{Entry, Failure, Needs, Scenario};
use crate::sysfs::CharDir;
use crate::units::parse_bytes;

pub(crate) use self::role::{ARGUMENT, main as serve};

/// What one cell may take: its own waits are shorter, one by one.
const CELL_LIMIT: Duration = Duration::from_secs(240);
/// How much memory the loading process may have gained since the first round, in KiB.
const GROWTH_MAX_KIB: u64 = 48 << 10;
/// The driver has this many ids.
const IDS: u32 = 1 << 20;

/// The entry of the registry.
pub const ENTRY: Entry = Entry::new::<Args>(
    "sigkill",
    "kill a server at each point of its life, in each recovery mode, under verified load from another process",
)
.short(&[&["--sample"]])
.plants(PLANTS);

const PLANTS: &[crate::scenario::Plant] = &[
    crate::scenario::Plant {
        name: "commit-before-write",
        about: "a server that completes writes when they are in its own memory, and whose device outlives it",
        arguments: &[
            "--plant",
            "commit-before-write",
            "--phase",
            "working,uncommitted,idle",
            "--mode",
            "wait,reissue",
        ],
    },
    crate::scenario::Plant {
        name: "flush-not-persisted",
        about: "a server that acknowledges flushes, and keeps what they cover in its own memory",
        arguments: &["--plant", "flush-not-persisted", "--phase", "working,idle", "--mode", "none"],
    },
    crate::scenario::Plant {
        name: "stale-storage",
        about: "a server that takes over with a copy of the storage from before its predecessor",
        arguments: &["--plant", "stale-storage", "--phase", "working,idle"],
    },
    crate::scenario::Plant {
        name: "forget-reissued",
        about: "a server that takes over and acknowledges what is given to it again, as if it had been done",
        arguments: &["--plant", "forget-reissued", "--phase", "all-tags,working", "--mode", "reissue"],
    },
    crate::scenario::Plant {
        name: "leaked-id",
        about: "whoever deals with a dead device does not delete it",
        arguments: &["--plant", "leaked-id", "--phase", "idle,working", "--mode", "none"],
    },
];

/// A bug of a server, or of those who clean up after one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Plant {
    /// Writes are completed when they are in the server's own memory, and the device outlives the server
    CommitBeforeWrite,
    /// Flushes are acknowledged, and what they cover stays in the server's own memory
    FlushNotPersisted,
    /// The next server serves a copy of the storage from before its predecessor
    StaleStorage,
    /// The next server acknowledges the first writes that it is given, and does not do them
    ForgetReissued,
    /// A dead device is not deleted
    LeakedId,
}

/// What a device is like.
#[derive(Clone, Copy, Debug)]
struct Shape {
    bytes: u64,
    queues: u16,
    depth: u16,
}

/// The arguments of `sigkill`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    /// Where to kill; everywhere by default
    #[arg(long = "phase", value_name = "NAME,…", value_enum, value_delimiter = ',', help_heading = "Grid")]
    points: Vec<Point>,
    /// What the device was started with; everything by default
    #[arg(long = "mode", value_name = "NAME,…", value_enum, value_delimiter = ',', help_heading = "Grid")]
    modes: Vec<Mode>,
    /// How often the grid is gone through, at most; with --duration alone, as often as begins before that is over [default: 1]
    #[arg(long, value_name = "N", help_heading = "Grid")]
    rounds: Option<u64>,
    /// The number of the first round, to do a later one again: each draws anew
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Grid")]
    first_round: u64,
    /// Do each point in one of the modes, drawn, and not in all of them
    #[arg(long, help_heading = "Grid")]
    sample: bool,
    /// How far a server comes that is killed while it takes over; by default drawn among what the kernel survives
    #[arg(long, value_name = "NAME", value_enum, help_heading = "Grid")]
    reached: Option<Reached>,
    /// Size of the device
    #[arg(long, value_name = "BYTES", default_value = "1M", value_parser = parse_bytes, help_heading = "Device")]
    size: u64,
    /// Queues, each with a thread and a CPU of its own
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = "Device")]
    queues: u16,
    /// Requests that a queue can have in flight; all of them can be held at once
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Device")]
    depth: u16,
    /// Plant a bug, which has to be found
    #[arg(long, value_name = "NAME", help_heading = "Bugs")]
    plant: Option<Plant>,
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        [
            ("phases", json!(self.points())),
            ("modes", json!(self.modes())),
            ("rounds", json!(self.rounds)),
            ("first_round", json!(self.first_round)),
            ("sample", json!(self.sample)),
            ("reached", json!(self.reached)),
            ("size", json!(self.size)),
            ("queues", json!(self.queues)),
            ("depth", json!(self.depth)),
            ("plant", json!(self.plant)),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    fn needs(&self) -> Needs {
        Needs { ublk: true, tools: &[] }
    }

    fn validate(&self) -> Result<(), Failure> {
        if self.size < 64 * BLOCK as u64 || !self.size.is_multiple_of(BLOCK as u64) || self.size > 1 << 30 {
            return Err(Failure::Usage(format!("a size of {}: choose a multiple of 4k from 256k to 1G", self.size)));
        }
        if self.queues < 2 || self.queues > 16 {
            return Err(Failure::Usage(format!("{} queues: choose 2 to 16", self.queues)));
        }
        if self.depth == 0 || self.depth > 64 {
            return Err(Failure::Usage(format!("a depth of {}: choose 1 to 64", self.depth)));
        }
        if self.rounds == Some(0) {
            return Err(Failure::Usage("0 rounds: choose 1 or more".to_owned()));
        }
        if self.common.ops.is_some() {
            return Err(Failure::Usage(
                "--ops says nothing to sigkill: use --rounds, --duration, or --phase and --mode".to_owned(),
            ));
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        let controller = Controller::open()?;
        let id = free_id(context.seed());
        let mut reports = Vec::new();
        let result = self.grid(context, &controller, id, &mut reports);
        table::print(context, &reports);
        let written = table::write(context, &reports);
        result.and(written)
    }
}

/// An id that no device has, and that the driver gives nobody who leaves the choice to it: it begins with the least.
fn free_id(seed: Seed) -> u32 {
    let first = 1 << 16 | seed.derive("id", 0).rng().below(1 << 19) as u32;
    (first..IDS).find(|id| !CharDir::of(*id).exists()).unwrap_or(first)
}

impl Args {
    fn points(&self) -> Vec<Point> {
        if self.points.is_empty() { Point::value_variants().to_vec() } else { self.points.clone() }
    }

    fn modes(&self) -> Vec<Mode> {
        if self.modes.is_empty() { Mode::value_variants().to_vec() } else { self.modes.clone() }
    }

    /// The cells of a round.
    fn cells(&self, seed: Seed, round: u64) -> Vec<(Point, Mode)> {
        let (points, modes) = (self.points(), self.modes());
        if !self.sample {
            return points.iter().flat_map(|point| modes.iter().map(|mode| (*point, *mode))).collect();
        }
        // Each mode as often as the others; which one meets which point is drawn.
        let turn = seed.derive("sample", round).rng().below(modes.len() as u64) as usize;
        points.iter().enumerate().map(|(index, point)| (*point, modes[(index + turn) % modes.len()])).collect()
    }

    fn grid(
        &self,
        context: &mut Context,
        controller: &Controller,
        id: u32,
        reports: &mut Vec<Report>,
    ) -> Result<(), Failure> {
        let begun = Instant::now();
        // Where it may not be read, the end of the run says so.
        let mut log = KernelLog::from_here().ok();
        let before = Inventory::take();
        let mut resident = None;
        for round in self.first_round.. {
            for (point, mode) in self.cells(context.seed(), round) {
                let mut report = Report::new(point, mode, round);
                let result = self.cell(context, controller, id, &before, &mut log, &mut report);
                if let Err(failure) = &result
                    && !matches!(failure, Failure::Interrupted)
                {
                    "FAIL".clone_into(&mut report.verdict);
                    context.note(self.alone(point, mode, round, context.seed()));
                }
                if !report.verdict.is_empty() {
                    reports.push(report);
                }
                result?;
            }
            let now = aftermath::resident_kib();
            let first = *resident.get_or_insert(now);
            if now > first + GROWTH_MAX_KIB {
                let what = format!("the loading process has grown from {first} to {now} KiB since the first round");
                return Err(Failure::broke("leak", what));
            }
            if self.is_over(round + 1 - self.first_round, begun.elapsed(), context.duration()) {
                break;
            }
        }
        Ok(())
    }

    /// Whether `done` rounds are enough, of which the first began `elapsed` ago.
    fn is_over(&self, done: u64, elapsed: Duration, duration: Option<Duration>) -> bool {
        let rounds = self.rounds.or(if duration.is_none() { Some(1) } else { None });
        rounds.is_some_and(|rounds| done >= rounds) || duration.is_some_and(|duration| elapsed >= duration)
    }

    /// How to do this cell again, and no other.
    fn alone(&self, point: Point, mode: Mode, round: u64, seed: Seed) -> String {
        let from = if round > 0 { format!(" --first-round {round}") } else { String::new() };
        let reached = self.reached.map_or_else(String::new, |reached| format!(" --reached {}", name(&reached)));
        let plant = self.plant.map_or_else(String::new, |plant| format!(" --plant {}", name(&plant)));
        format!(
            "this cell alone: ublk-torture sigkill --phase {} --mode {}{from}{reached}{plant} --size {} --queues {} --depth {} \
             --seed {seed}",
            name(&point),
            name(&mode),
            self.size,
            self.queues,
            self.depth
        )
    }

    fn cell(
        &self,
        context: &mut Context,
        controller: &Controller,
        id: u32,
        before: &Inventory,
        log: &mut Option<KernelLog>,
        report: &mut Report,
    ) -> Result<(), Failure> {
        let (point, mode, round) = (report.point, report.mode, report.round);
        let name = format!("{} × {}", name(&point), name(&mode));
        if !controller.features().contains(mode.features()) {
            context.note(format!("left out on this kernel: {name}: its ublk_drv has no {:?}", mode.features()));
            context.evidence().add("cells_lacking", 1);
            "no such mode".clone_into(&mut report.verdict);
            return Ok(());
        }
        if let Some(gate) = point.gate()
            && context.gated(gate, &name)
        {
            gate.name.clone_into(&mut report.verdict);
            return Ok(());
        }
        let evidence = context.evidence();
        let cells = evidence.snapshot().count("cells") + 1;
        evidence.require("cells", cells);
        // START is hit by luck alone: how often it was is in starts_killed_within.
        let by_luck = point == Point::Starting;
        if !by_luck {
            evidence.require("cells_in_place", evidence.snapshot().count("cells_in_place") + 1);
        }
        evidence.require("kills", 1);
        evidence.require("verified_bytes", self.size);
        evidence.require("ids_reused", 1);
        context.step(&name, CELL_LIMIT, |context| {
            let shape = Shape { bytes: self.size, queues: self.queues, depth: self.depth };
            let seed = context.seed().derive(&name, round);
            let mut cell = Cell::new(context, controller, shape, self.plant, self.reached, report.clone(), seed, id)?;
            let result = cell.run();
            *report = cell.report.clone();
            // Its storage goes with it.
            drop(cell);
            result.and_then(|()| look_around(id, before, log))?;
            if report.in_place == 0 && !by_luck {
                return Err(Failure::Internal(format!("{name}: the kill did not fall where it was meant to")));
            }
            "ok".clone_into(&mut report.verdict);
            context.evidence().add("cells_in_place", u64::from(!by_luck));
            let evidence = context.evidence();
            evidence.add("cells", 1);
            evidence.add("kills_in_place", report.in_place);
            evidence.add("operations", report.done);
            evidence.add("failed_in_flight", report.failed);
            evidence.add("waited_for_a_server", report.survived);
            evidence.add("refused", report.refused);
            evidence.add("held", report.held);
            evidence.add("verified_bytes", report.verified_bytes);
            let detail = table::detail(report);
            context.detail(detail);
            Ok(())
        })
    }
}

/// What the command line calls it.
fn name<T: ValueEnum>(value: &T) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// What must not be there after a cell.
fn look_around(id: u32, before: &Inventory, log: &mut Option<KernelLog>) -> Result<(), Failure> {
    for node in [ublkit::ctrl::block_path(id), ublkit::ctrl::character_path(id), CharDir::of(id).path().to_owned()] {
        if node.exists() {
            return Err(Failure::broke("leak", format!("{} is left", node.display())));
        }
    }
    let stuck = aftermath::stuck_threads();
    if !stuck.is_empty() {
        return Err(Failure::broke_with("hang", "threads wait in the kernel, beyond any signal", stuck));
    }
    let left = before.surplus_after_settling();
    if !left.is_empty() {
        let what = format!("{} things are left that were not there at the start", left.len());
        return Err(Failure::broke_with("leak", what, left));
    }
    // Errors of I/O are what is caused here.
    let complaints = log.as_mut().map(|log| log.complaints(false)).unwrap_or_default();
    match complaints.into_iter().next() {
        Some(Complaint { what, excerpt, .. }) => {
            Err(Failure::broke_with("kernel", format!("the kernel complained: {what}"), excerpt))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;

    fn args(line: &str) -> Args {
        let command = Args::augment_args(clap::Command::new("sigkill").no_binary_name(true));
        let matches = command.try_get_matches_from(line.split_whitespace()).expect("parses");
        Args::from_arg_matches(&matches).expect("arguments")
    }

    #[test]
    fn the_grid_is_whole_and_a_sample_has_every_point_and_every_mode() {
        let seed = Seed::new(3);
        let (points, modes) = (Point::value_variants(), Mode::value_variants());
        assert_eq!(args("").cells(seed, 0).len(), points.len() * modes.len());
        let sample = args("--sample").cells(seed, 0);
        assert_eq!(sample.iter().map(|(point, _)| *point).collect::<Vec<_>>(), points);
        for mode in modes {
            assert!(sample.iter().filter(|(_, of)| of == mode).count() >= points.len() / modes.len());
        }
        let one = args("--phase idle,twice --mode wait");
        assert_eq!(one.cells(seed, 0), [(Point::Idle, Mode::Wait), (Point::Twice, Mode::Wait)]);
    }

    #[test]
    fn rounds_and_time_end_it_whichever_is_first() {
        let minute = Duration::from_secs(60);
        assert!(args("").is_over(1, minute, None));
        assert!(!args("").is_over(9, minute / 2, Some(minute)) && args("").is_over(1, minute, Some(minute)));
        let two = args("--rounds 2");
        assert!(!two.is_over(1, minute, None) && two.is_over(2, minute / 2, Some(minute)));
        assert!(two.is_over(1, minute, Some(minute)));
    }

    #[test]
    fn plants_are_those_of_the_command_line() {
        for plant in PLANTS {
            let parsed = args(&plant.arguments.join(" "));
            let value = parsed.plant.and_then(|plant| plant.to_possible_value()).expect("a plant");
            assert_eq!(value.get_name(), plant.name);
        }
        assert_eq!(PLANTS.len(), Plant::value_variants().len());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for wrong in ["--size 4k", "--size 1000000", "--queues 1", "--depth 0", "--rounds 0", "--ops 7"] {
            assert!(matches!(args(wrong).validate(), Err(Failure::Usage(_))), "{wrong}");
        }
        assert!(args("").validate().is_ok());
    }
}

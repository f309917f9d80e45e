//! `torture`: seeded random I/O, every byte verified.
//!
//! Each worker owns a region of the device and a [shadow](ublkit_harness::Shadow) of it, and keeps many operations in flight through an io_uring
//! of its own: reads, writes, flushes, FUA writes, discards, writes of zeroes, of any length and place that the device
//! allows. What it reads is compared with the shadow at once; from time to time it reads its whole region. When all are
//! done, everything is compared twice more: through a second opening of the device, and, for a device served here, in
//! the bytes of its storage.

mod device;
pub mod mutants;
mod verify;
mod worker;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ublkit_harness::event::{Event, Progress};
use ublkit_harness::{IoSize, Mix, Pattern, Plan, PlanOptions, SectorRange};

use self::device::{Opened, Subject};
use self::worker::{Limits, Shared, Tally, Worker};
use crate::cli::CommonArgs;
use crate::context::Context;
use crate::scenario::{Failure, Needs, Scenario};
use crate::target::TargetArgs;
use crate::units::parse_bytes;

/// How long a run goes on when nobody says.
const DEFAULT_DURATION: Duration = Duration::from_secs(30);
/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// How long the last operations may take once the workers were told to end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(120);
/// How long one pass of the final verification may take.
const VERIFY_DEADLINE: Duration = Duration::from_secs(300);

/// The arguments of `torture`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    target: TargetArgs,
    /// Workers, each with a region of the device to itself
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Workload")]
    workers: u32,
    /// Operations that each worker keeps in flight
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Workload")]
    io_depth: u16,
    /// How often each kind of operation is drawn
    #[arg(long, value_name = "LIST", default_value_t = Mix::default(), help_heading = "Workload")]
    mix: Mix,
    /// How long operations are: `any`, or a fixed number of bytes
    #[arg(long, value_name = "BYTES", default_value = "any", value_parser = parse_io_size, help_heading = "Workload")]
    io_size: IoSize,
    /// The largest region of a worker. Regions are spread over the device, the last one up to its end; small ones are
    /// overwritten more often, and passes over them are shorter
    #[arg(long, value_name = "BYTES", default_value = "16M", value_parser = parse_bytes, help_heading = "Workload")]
    region: u64,
    /// Write every sector once before the random operations begin; always done where the content is not known
    #[arg(long, help_heading = "Workload")]
    prefill: bool,
    /// Leave out the passes over the whole region while operations are drawn
    #[arg(long, help_heading = "Workload")]
    no_passes: bool,
    /// Torture this block device, whoever serves it, instead of one of our own. Its content is destroyed
    #[arg(long, value_name = "PATH", requires = "yes_destroy_data", help_heading = "Device of somebody else's")]
    device: Option<std::path::PathBuf>,
    /// Yes, destroy what is on it
    #[arg(long, requires = "device", help_heading = "Device of somebody else's")]
    yes_destroy_data: bool,
}

fn parse_io_size(text: &str) -> Result<IoSize, String> {
    if text == "any" { Ok(IoSize::Any) } else { parse_bytes(text).map(IoSize::Fixed) }
}

fn read_device(file: &File, buf: &mut [u8], offset: u64) -> Result<(), Failure> {
    file.read_exact_at(buf, offset).map_err(|error| Failure::io(format_args!("read the device at {offset}"), &error))
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        let mut options = match &self.device {
            Some(path) => BTreeMap::from([("device".to_owned(), json!(path))]),
            None => self.target.options(),
        };
        let io_size = match self.io_size {
            IoSize::Any => json!("any"),
            IoSize::Fixed(bytes) => json!(bytes),
        };
        options.extend(
            [
                ("workers", json!(self.workers)),
                ("io_depth", json!(self.io_depth)),
                ("mix", json!(self.mix.to_string())),
                ("io_size", io_size),
                ("region", json!(self.region)),
                ("prefill", json!(self.prefill)),
                ("passes", json!(!self.no_passes)),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        options
    }

    fn needs(&self) -> Needs {
        Needs { ublk: self.device.is_none(), tools: &[] }
    }

    fn validate(&self) -> Result<(), Failure> {
        if self.workers == 0 || self.workers > 256 {
            return Err(Failure::Usage(format!("{} workers: choose 1 to 256", self.workers)));
        }
        if self.io_depth == 0 || self.io_depth > 1024 {
            return Err(Failure::Usage(format!("an I/O depth of {}: choose 1 to 1024", self.io_depth)));
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        let subject = context.step("start", Duration::from_secs(60), |context| match &self.device {
            Some(path) => Subject::somebody_elses(path),
            None => self.target.start(context).map(Subject::Ours),
        })?;
        // Whatever comes of it, the device is closed; the first failure is the one that counts.
        let tortured = self.torture(context, &subject);
        let closed = context.always("close", Duration::from_secs(120), |context| subject.close(context));
        tortured.and(closed)
    }
}

impl Args {
    fn torture(&self, context: &mut Context, subject: &Subject) -> Result<(), Failure> {
        let opened = context.step("open", Duration::from_secs(30), |_| subject.open())?;
        let plan = self.plan(context, &opened)?;
        self.require(context, &plan, &opened);
        let mut workers = Vec::new();
        let drawn = context.step("torture", Self::deadline(context), |context| {
            let outcome;
            (workers, outcome) = self.work(context, &plan, &opened)?;
            outcome?;
            let (ops, bytes) = workers.iter().fold((0, 0), |(ops, bytes), worker| {
                (ops + worker.tally().ops(), bytes + worker.tally().verified_bytes())
            });
            context.detail(format!("{ops} operations, {bytes} bytes verified"));
            Ok(())
        });
        if let Err(failure) = drawn {
            if matches!(failure, Failure::DeviceBroke(_)) {
                Self::survey(context, subject, &mut workers);
            }
            return Err(failure);
        }
        context.always("verify through a second opening", VERIFY_DEADLINE, |context| {
            let file = subject.open()?.file;
            let bytes = verify::all(&mut workers, |buf, offset| read_device(&file, buf, offset))?;
            context.evidence().add("final_verified_bytes", bytes);
            context.detail(format!("{bytes} bytes"));
            Ok(())
        })?;
        if let Subject::Ours(target) = subject {
            context.always("verify against the storage", VERIFY_DEADLINE, |context| {
                let bytes = verify::all(&mut workers, |buf, offset| target.storage().read_at(buf, offset))?;
                context.evidence().add("storage_verified_bytes", bytes);
                context.detail(format!("{bytes} bytes"));
                Ok(())
            })?;
            context.evidence().add("served_requests", target.served_requests()?);
        }
        if context.interruption().came() { Err(Failure::Interrupted) } else { Ok(()) }
    }

    /// After the first wrong byte, looks for others: a write that went astray has two victims, and which one is met first
    /// is chance.
    fn survey(context: &mut Context, subject: &Subject, workers: &mut [Worker]) {
        // What it finds is told and changes nothing: the run has failed already.
        let _ = context.always("survey", VERIFY_DEADLINE, |context| {
            let file = subject.open()?.file;
            let found = verify::survey(workers, |buf, offset| read_device(&file, buf, offset));
            context.detail(format!("{} places on the device hold what they should not", found.len()));
            for mismatch in found {
                context.sink().send(mismatch);
            }
            Ok(())
        });
    }

    fn plan(&self, context: &Context, opened: &Opened) -> Result<Plan, Failure> {
        let mut options = PlanOptions::new(opened.bytes, opened.logical_block, opened.max_io_bytes, self.workers);
        options.depth = u32::from(self.io_depth);
        options.mix = self.mix;
        options.size = self.io_size;
        options.capabilities = opened.capabilities;
        let most = (self.region / opened.logical_block).max(1) * opened.logical_block / ublkit_harness::SECTOR as u64;
        let last = options.regions.len() - 1;
        for (index, region) in options.regions.iter_mut().enumerate() {
            let sectors = region.sectors.min(most);
            // The last one keeps to the end of the device, where the edge is.
            let first = if index == last { region.end() - sectors } else { region.first };
            *region = SectorRange::new(first, sectors);
        }
        Plan::new(options, context.seed().derive("torture", 0)).map_err(|error| Failure::Usage(error.to_string()))
    }

    /// What a run must have done to be one.
    fn require(&self, context: &Context, plan: &Plan, opened: &Opened) {
        let evidence = context.evidence();
        let mix = plan.options().offered_mix();
        evidence.require("ops", 100);
        evidence.require("verified_bytes", 64 << 10);
        evidence.require("final_verified_bytes", 1);
        for (name, weight) in [
            ("reads", mix.read),
            ("writes", mix.write),
            ("fua_writes", mix.fua),
            ("flushes", mix.flush),
            ("discards", mix.discard),
            ("zeroes", mix.zeroes),
        ] {
            evidence.require(name, u64::from(weight > 0));
        }
        if !self.no_passes {
            evidence.require("passes", 1);
        }
        if opened.ours {
            evidence.require("served_requests", 100);
            evidence.require("storage_verified_bytes", 1);
        }
    }

    fn limits(&self, context: &Context) -> (Limits, Option<Instant>) {
        // A number of operations alone means no limit of time.
        let duration = context.duration().or_else(|| context.ops().is_none().then_some(DEFAULT_DURATION));
        let until = duration.map(|duration| Instant::now() + duration);
        let ops = context.ops().map(|ops| ops.div_ceil(u64::from(self.workers)).max(1));
        (Limits { ops, until }, until)
    }

    /// When the step is a hang: its own time, and enough beside it for what is under way to end.
    fn deadline(context: &Context) -> Duration {
        // Operations are watched one by one (`worker::STALL`); a run by count has only that bound and this generous one.
        let by_count = Duration::from_secs(24 * 3600);
        let own = context.duration().or_else(|| context.ops().is_none().then_some(DEFAULT_DURATION));
        own.map_or(by_count, |own| own + DRAIN_DEADLINE)
    }

    /// Runs the workers, tells how far they are, and returns them.
    fn work(
        &self,
        context: &Context,
        plan: &Plan,
        opened: &Opened,
    ) -> Result<(Vec<Worker>, Result<(), Failure>), Failure> {
        let (limits, until) = self.limits(context);
        let shared = Arc::new(Shared::new(context, opened, limits, !self.no_passes, self.prefill || !opened.zeroed));
        let pattern = Arc::new(Pattern::new(context.seed(), opened.device_id));
        let start = Instant::now();
        let results: Vec<_> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..plan.options().workers)
                .map(|index| {
                    let worker = Worker::new(index, plan, opened, Arc::clone(&pattern), Arc::clone(&shared));
                    std::thread::Builder::new()
                        .name(format!("torture-{index}"))
                        .spawn_scoped(scope, move || worker.run())
                        .map_err(|error| Failure::Environment(format!("failed to start a thread: {error}")))
                })
                .collect();
            if handles.iter().any(Result::is_err) {
                shared.stop();
            }
            let mut last = Tally::default();
            while handles.iter().flatten().any(|handle| !handle.is_finished()) {
                std::thread::sleep(Duration::from_millis(20).min(PROGRESS_EVERY));
                if context.interruption().came() {
                    shared.stop();
                }
                if shared.since_progress() >= PROGRESS_EVERY {
                    last = Self::tell(context, &shared, &last, start, until);
                }
            }
            handles
                .into_iter()
                .map(|handle| {
                    handle.and_then(|handle| {
                        handle.join().map_err(|_panic| Failure::Internal("a worker panicked".to_owned()))
                    })
                })
                .collect()
        });
        let total = shared.total();
        total.add_to(context.evidence());
        context.evidence().add("work_ms", start.elapsed().as_millis() as u64);
        let mut workers = Vec::with_capacity(results.len());
        let mut outcome = Ok(());
        for result in results {
            let (worker, own) = result?;
            workers.push(worker);
            outcome = outcome.and(own);
        }
        Ok((workers, outcome))
    }

    fn tell(context: &Context, shared: &Shared, last: &Tally, start: Instant, until: Option<Instant>) -> Tally {
        let since = shared.mark_progress().as_secs_f64().max(1e-3);
        let total = shared.total();
        let elapsed = start.elapsed();
        let by_time = until.map(|until| elapsed.as_secs_f64() / (until - start).as_secs_f64().max(1e-3));
        let by_ops = context.ops().map(|ops| total.ops() as f64 / ops.max(1) as f64);
        let fraction = match (by_time, by_ops) {
            (Some(time), Some(ops)) => Some(time.max(ops)),
            (one, other) => one.or(other),
        };
        context.sink().send(Event::Progress(Progress {
            what: "torture".to_owned(),
            ops: total.ops(),
            bytes: total.bytes(),
            verified_bytes: total.verified_bytes(),
            elapsed_ms: elapsed.as_millis() as u64,
            ops_per_s: (total.ops() - last.ops()) as f64 / since,
            bytes_per_s: (total.bytes() - last.bytes()) as f64 / since,
            fraction: fraction.map(|fraction| fraction.min(1.0)),
        }));
        total
    }
}

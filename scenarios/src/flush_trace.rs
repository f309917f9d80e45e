//! `flush-trace`: where does the time go between an application's fsync and the backend?
//!
//! An ext4 on the device is written to and made to write back in one way after another, while both sides of the driver
//! are watched: the backend's calls by a recorder in the server, the kernel's requests by the block layer's trace points.
//! Together they say of each moment who had the work: the backend, the server on the way to it or back, the
//! kernel, or nobody. What is drawn of it is a picture, a trace for trace viewers, and numbers.
//!
//! It is a test too. Each request of the kernel must have reached the backend before it was told to be done, a flush after the
//! writes that it covers; what an fsync promised must have been flushed when it returned; and the server must not sit on
//! requests.

mod attribution;
mod chrome;
mod judge;
mod kernel;
mod matching;
mod numbers;
mod planted;
mod recorder;
mod story;
mod svg;
mod workload;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::judge::Rules;
use self::kernel::{Requests, Trace};
use self::numbers::{Numbers, duration};
use self::planted::Bug;
use self::story::Story;
use self::workload::{Kind, Played, Stage, WritebackAge};
use crate::cli::{CommonArgs, DURATION_VARIABLE, name_of};
use crate::clock::nanoseconds;
use crate::context::Context;
use crate::gates::KernelVersion;
use crate::probe::filesystem::{Mounted, make};
use crate::scenario::{Failure, Needs, Scenario};
use crate::target::{Mode, Target, TargetArgs};
use crate::units::{format_bytes, parse_duration};

pub(crate) use self::planted::PLANTS;
pub(crate) use self::recorder::{Recorded, Recorder, Recording, cost_ns};

/// How much longer than its own settings say the kernel may take to write back.
const PATIENCE: Duration = Duration::from_secs(30);
/// The smallest device that the file system and the files on it have room on.
const SIZE_MIN: u64 = 32 << 20;
/// How long requests that are under way may take to end before the recording is taken.
const SETTLE: Duration = Duration::from_secs(10);
/// How often it is looked whether they have.
const LOOK: Duration = Duration::from_millis(20);

/// What the server is told about recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tracing {
    /// How many calls there is room for.
    pub(crate) room: usize,
    /// One in so many calls is forgotten without being counted: a planted bug. 0 for none.
    pub(crate) lose: u64,
}

/// The arguments of `flush-trace`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    target: TargetArgs,
    /// How often the phases are gone through; the wait for writeback takes place in the first round only
    #[arg(long, value_name = "N", default_value_t = 3, help_heading = "Workload")]
    rounds: u32,
    /// Have the kernel write back dirty pages when they are so old, on the whole machine, until the run ends. Without
    /// this it does so when it is set to, after some 30 seconds
    #[arg(long, value_name = "TIME", value_parser = parse_duration, help_heading = "Workload")]
    writeback_age: Option<Duration>,
    /// Calls of the backend that there is room for
    #[arg(long, value_name = "N", default_value_t = 65_536, help_heading = "Recording")]
    records: usize,
    /// The most that the server may take of a request beside the call of the backend; one in ten must be as quick
    #[arg(long, value_name = "TIME", default_value = "25ms", value_parser = parse_duration, help_heading = "Recording")]
    server_delay: Duration,
    /// Plant a bug in the server or in the recorder
    #[arg(long, value_enum, value_name = "NAME")]
    plant: Option<Bug>,
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        let mut options = self.target.options();
        options.extend(
            [
                ("rounds", json!(self.rounds)),
                ("writeback_age_ms", json!(self.writeback_age.map(|age| age.as_millis() as u64))),
                ("records", json!(self.records)),
                ("server_delay_ms", json!(self.server_delay.as_millis() as u64)),
                ("plant", json!(self.plant.as_ref().map(name_of))),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        options
    }

    fn needs(&self) -> Needs {
        Needs { ublk: true, tools: &["mkfs.ext4"] }
    }

    fn validate(&self) -> Result<(), Failure> {
        self.common.refuse_ops("flush-trace", "--rounds says how much is done")?;
        if self.common.duration.is_some() {
            return Err(Failure::Usage(
                "--duration says nothing to flush-trace, whose recording has room for so much: use --rounds, and \
                 --records if they are many"
                    .to_owned(),
            ));
        }
        if self.target.read_only {
            return Err(Failure::Usage(
                "--read-only: flush-trace makes a file system on the device and writes to it; leave it out"
                    .to_owned(),
            ));
        }
        if self.target.size < SIZE_MIN {
            return Err(Failure::Usage(format!(
                "--size {}: flush-trace makes a file system on the device; choose {} or more",
                self.target.size,
                format_bytes(SIZE_MIN)
            )));
        }
        if self.rounds == 0 || self.rounds > 1000 {
            return Err(Failure::Usage(format!("{} rounds: choose 1 to 1000", self.rounds)));
        }
        if !(1..=1 << 24).contains(&self.records) {
            return Err(Failure::Usage(format!("room for {} records: choose 1 to {}", self.records, 1 << 24)));
        }
        if self.writeback_age.is_some_and(|age| age < Duration::from_millis(100)) {
            return Err(Failure::Usage("--writeback-age: choose 100ms or more".to_owned()));
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        if context.duration().is_some() {
            context.note(format!("{DURATION_VARIABLE} is passed over: flush-trace goes by --rounds"));
        }
        let evidence = context.evidence();
        let phases = u64::from(self.rounds) * (Kind::ALL.len() as u64 - 1) + 1;
        for (name, minimum) in [
            ("calls_recorded", 50),
            ("recording_whole", 1),
            ("kernel_requests", 50),
            ("requests_matched", 50),
            ("phases", phases),
            ("durable_calls", phases),
            ("flushes_recorded", if self.flushes() { u64::from(self.rounds) * 2 } else { 0 }),
            ("time_attributed_percent", 99),
            ("mutant_hits", u64::from(self.target.mutant.is_some())),
        ] {
            evidence.require(name, minimum);
        }
        let target = context.step("start", Duration::from_secs(60), |context| {
            let tracing = Some(Tracing { room: self.records, lose: self.plant.map_or(0, Bug::lose) });
            let lie = self.plant.and_then(Bug::lie);
            let target = TargetArgs { lie, tracing, ..self.target.clone() }.start(context)?;
            context.detail(format!("{} of {}", target.path().display(), format_bytes(target.geometry().size)));
            Ok(target)
        })?;
        let traced = self.trace(context, &target);
        let closed = context.always("close", Duration::from_secs(120), |context| target.close(context));
        traced.and(closed)
    }
}

impl Args {
    fn flushes(&self) -> bool {
        self.target.geometry().volatile_cache
    }

    /// Everything that takes place while the device exists.
    fn trace(&self, context: &mut Context, target: &Target) -> Result<(), Failure> {
        let s = Duration::from_secs;
        let trace = context.step("watch", s(20), |_| Trace::start(&target.path()))?;
        let since = nanoseconds();
        // Before anything is dirty: the kernel's next look at a device is set for when it first had something to write back.
        let _until_the_end = self.writeback_age.map(|age| WritebackAge::set(context, age)).transpose()?;
        context.step("mkfs", s(120), |context| make(context, target))?;
        let mounted = context.step("mount", s(60), |context| Mounted::mount(context, &target.path()))?;
        let played = self.play(context, target, mounted.path());
        let unmounted = context.always("unmount", s(120), |_| mounted.unmount());
        let played = played?;
        unmounted?;
        let (story, numbers) = context.step("put together", s(60), |context| {
            let (recording, requests) = settled(target, &trace)?;
            let TargetArgs { backend, size, queues, workers_backend, mode, .. } = &self.target;
            let device = format!(
                "{} on {}, queues: {queues}, workers: {workers_backend}, data copied by {}",
                format_bytes(*size),
                name_of(backend),
                match mode {
                    Mode::Copy => "the driver",
                    Mode::UserCopy => "the server",
                }
            );
            let release = nix::sys::utsname::uname().map_or_else(
                |_| KernelVersion::here().to_string(),
                |uname| uname.release().to_string_lossy().into_owned(),
            );
            let about = (release, context.seed().get(), device);
            let story = Story::new(about, recording, requests, played, since);
            let numbers = Numbers::of(&story);
            let per_call = numbers.kinds.iter().find(|kind| kind.backend.count > 0).map(|kind| kind.backend.p50);
            context.detail(format!(
                "{} calls, {} requests; recording a call takes {}, the median {} takes {}",
                numbers.recorded,
                story.requests.all.len(),
                duration(numbers.recording_cost_ns),
                numbers.kinds.first().map(|kind| kind.kind.to_string()).unwrap_or_default(),
                duration(per_call.unwrap_or(0))
            ));
            Ok((story, numbers))
        })?;
        if story.recording.overflow > 0 {
            context.note(format!(
                "{} calls found no room in the recording: add --records {}",
                story.recording.overflow,
                (story.recording.calls * 2).next_power_of_two()
            ));
        }
        if story.requests.lost > 0 {
            context.note(format!("the kernel had no room for {} events of its own", story.requests.lost));
        }
        numbers.table().into_iter().for_each(|line| context.note(line));
        for phase in &numbers.phases {
            for gap in phase.largest_gaps.iter().take(1) {
                context.note(format!("{}: largest gap {}", phase.name, numbers::sentence(gap)));
            }
        }
        Self::write(context, &story, &numbers)?;
        context.step("judge", s(60), |context| {
            let rules = Rules { flushes: self.flushes(), server_delay: self.server_delay };
            judge::judge(context, &story, &numbers, rules)?;
            let shares = numbers.shares_ns;
            context.detail(format!(
                "of the time the backend had {:.1} %, the server {:.1} %, the kernel {:.1} %; for {:.1} % nothing was asked",
                shares.percent(shares.backend),
                shares.percent(shares.before + shares.after),
                shares.percent(shares.kernel),
                shares.percent(shares.nothing)
            ));
            Ok(())
        })
    }

    fn play(&self, context: &mut Context, target: &Target, dir: &Path) -> Result<Vec<Played>, Failure> {
        let age = WritebackAge::of_this_machine()?.ok_or_else(|| {
            Failure::Environment(
                "this kernel does not write back by itself (vm.dirty_writeback_centisecs is 0): add --writeback-age 2s"
                    .to_owned(),
            )
        })?;
        let stage = Stage { target, dir, patience: age + PATIENCE };
        let mut played = Vec::new();
        for round in 1..=self.rounds {
            for kind in Kind::ALL.into_iter().filter(|kind| round == 1 || *kind != Kind::Writeback) {
                let name = format!("{} {round}", kind.name());
                let phase = context.step(&name, stage.patience + Duration::from_secs(60), |context| {
                    let phase = stage.play(context, kind, round)?;
                    let calls = phase.waits.iter().map(|wait| format!("{} {}", wait.name, duration(wait.span.len())));
                    context.detail(calls.collect::<Vec<_>>().join(", "));
                    Ok(phase)
                })?;
                played.push(phase);
            }
        }
        Ok(played)
    }

    /// Picture, trace and numbers.
    fn write(context: &mut Context, story: &Story, numbers: &Numbers) -> Result<(), Failure> {
        let Some(dir) = context.report_dir().map(Path::to_owned) else {
            context.note("no picture and no trace are written: add --report DIR");
            return Ok(());
        };
        context.step("write", Duration::from_secs(60), |context| {
            let json = |value: Result<String, serde_json::Error>| {
                value.map_err(|error| Failure::Internal(format!("what was seen cannot be written as JSON: {error}")))
            };
            let files = [
                ("timeline.svg", svg::draw(story, numbers)),
                ("trace.json", json(serde_json::to_string(&chrome::trace(story)))?),
                ("numbers.json", json(serde_json::to_string_pretty(numbers))?),
            ];
            for (name, content) in &files {
                let path = dir.join(name);
                fs::write(&path, content)
                    .map_err(|error| Failure::Environment(format!("failed to write {}: {error}", path.display())))?;
            }
            context.detail(format!("{} in {}", files.map(|(name, _)| name).join(", "), dir.display()));
            Ok(())
        })
    }
}

/// What was seen on both sides, once nothing is under way any more.
fn settled(target: &Target, trace: &Trace) -> Result<(Recording, Requests), Failure> {
    let deadline = Instant::now() + SETTLE;
    let mut before = trace.requests()?;
    loop {
        std::thread::sleep(LOOK);
        let requests = trace.requests()?;
        let open = requests.all.iter().filter(|request| request.completed.is_none()).count();
        // Where events were lost, ends may be among them: the evidence says that there is no telling.
        if (open == 0 || requests.lost > 0) && requests == before {
            // Afterwards: what the kernel has seen ended has been recorded by then.
            let recording = target.recording()?;
            if trace.requests()? == requests {
                return Ok((recording, requests));
            }
        }
        if Instant::now() > deadline {
            return Err(Failure::Hang(format!(
                "{SETTLE:?} after the file system was unmounted, {open} of {} requests had not ended, or more were coming",
                requests.all.len()
            )));
        }
        before = requests;
    }
}

//! `torture`: seeded random I/O, every byte verified.
//!
//! Each worker keeps many operations in flight through an io_uring of its own: reads, writes, flushes, FUA writes,
//! discards, writes of zeroes, of any length and place that the device allows. One half of the workers owns a region each,
//! with a [shadow](ublkit_harness::Shadow) that knows what is there; the others share one, where their operations
//! overlap as they will, and a [ledger](ublkit_harness::Ledger) that knows what each order of them may leave there.
//! What is read is compared at once; from time to time a worker reads its whole region. When all are done, everything is
//! compared twice more: through a second opening of the device, and, for a device served here, in the bytes of its
//! storage.

pub(crate) mod accounts;
pub(crate) mod bench;
mod book;
pub(crate) mod crew;
pub(crate) mod device;
mod excuses;
mod failed;
mod faults;
mod flights;
pub mod mutants;
pub(crate) mod outage;
mod recorder;
mod scripted;
pub(crate) mod shared;
pub(crate) mod sharing;
pub(crate) mod stage;
mod swarm;
mod tally;
mod turns;
pub(crate) mod verify;
mod worker;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ublkit_harness::fault::FaultPlan;
use ublkit_harness::script::Setup;
use ublkit_harness::{IoSize, Mix, Plan, PlanOptions, SectorRange, Seed};

use self::accounts::Accounts;
use self::crew::{Crew, Job};
use self::device::{Opened, Subject};
use self::excuses::Excuses;
use self::failed::Underway;
use self::faults::Choice;
use self::outage::Outage;
use self::recorder::Recorder;
use self::shared::{Orders, Shared};
use self::sharing::{Books, Layout, Sharing};
use self::stage::{Place, ServedBy, Stage};
use crate::aligned::AlignedBuf;
use crate::cli::CommonArgs;
use crate::context::Context;
use crate::external::ExternalArgs;
use crate::kept;
use crate::kernel_log::KernelLog;
use crate::refusals;
use crate::scenario::{Failure, Needs, Scenario};
use crate::server::Hang;
use crate::target::{BackendKind, Storage, Target, TargetArgs};
use crate::units::{parse_bytes, parse_duration};

/// How long a run goes on when nobody says.
const DEFAULT_DURATION: Duration = Duration::from_secs(30);
/// How long the last operations may take once the workers were told to end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(120);
/// How long one pass of the final verification may take.
const VERIFY_DEADLINE: Duration = Duration::from_secs(300);
/// How long a failure is made smaller when nobody says; on a device that was there before, not at all.
const SHRINK: Duration = Duration::from_secs(30);
/// What may be needed for that beyond its time.
const SHRINK_DRAIN: Duration = Duration::from_secs(300);

/// The arguments of `torture`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    target: TargetArgs,
    /// Workers
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Workload")]
    workers: u32,
    /// Operations that each worker keeps in flight
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Workload")]
    io_depth: u16,
    /// Whether workers share a region, where their operations overlap, or have one each; or half of them this, half that
    #[arg(long, value_enum, default_value = "both", help_heading = "Workload")]
    sharing: Sharing,
    /// How often each kind of operation is drawn
    #[arg(long, value_name = "LIST", default_value_t = Mix::default(), help_heading = "Workload")]
    mix: Mix,
    /// How long operations are: `any`, or a fixed number of bytes
    #[arg(long, value_name = "BYTES", default_value = "any", value_parser = parse_io_size, help_heading = "Workload")]
    io_size: IoSize,
    /// The largest region of a worker, or of those that share one. Regions are spread over the device, the last one up to its end; small ones are
    /// overwritten more often, and passes over them are shorter
    #[arg(long, value_name = "BYTES", default_value = "16M", value_parser = parse_bytes, help_heading = "Workload")]
    region: u64,
    /// Write every sector once before the random operations begin; always done where the content is not known
    #[arg(long, help_heading = "Workload")]
    prefill: bool,
    /// How much of what is written can be compressed away, in percent; at most 90 are, whatever is asked for
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(..=100), help_heading = "Workload")]
    compressible: u8,
    /// Leave out the passes over the whole region while operations are drawn
    #[arg(long, help_heading = "Workload")]
    no_passes: bool,
    /// Draw from the seed what is not given: the device, how it is driven, and what goes wrong. All of it is told
    #[arg(long, conflicts_with_all = ["device", "server"], help_heading = "Workload")]
    swarm: bool,
    /// How long an operation may take before that is a hang
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration, help_heading = "Workload")]
    stall: Duration,
    /// Faults between the device and its storage: rules such as `write rate 1/500: error EIO after`, separated by
    /// semicolons; `draw` for rare errors and delays; or `none`. By default drawn, unless a bug is planted
    #[arg(long, value_name = "PLAN", conflicts_with_all = ["device", "server"], help_heading = "Faults")]
    faults: Option<Choice>,
    /// Cut the power about so often, under load: what no flush had made durable may be lost. Needs `--backend medium`
    #[arg(long, value_name = "TIME", value_parser = parse_duration, conflicts_with_all = ["device", "server"], help_heading = "Faults")]
    cut_every: Option<Duration>,
    /// Have another server take over about so often, under load
    #[arg(long, value_name = "TIME", value_parser = parse_duration, conflicts_with_all = ["device", "server"], help_heading = "Faults")]
    restart_every: Option<Duration>,
    /// Plant a hang, which has to end with status 3 and a look at everything; shorten --stall and --deadline
    #[arg(long, value_enum, value_name = "WHERE", conflicts_with_all = ["device", "server"], help_heading = "Faults")]
    hang: Option<Hang>,
    /// How long a failure may be made smaller, by doing parts of the run again, before it is kept in the report. 30s where the
    /// device is made anew for each; 0s with `--device` alone, whose content may be evidence
    #[arg(long, value_name = "TIME", value_parser = parse_duration, help_heading = "Failures")]
    shrink: Option<Duration>,
    #[command(flatten)]
    external: ExternalArgs,
}

fn parse_io_size(text: &str) -> Result<IoSize, String> {
    if text == "any" { Ok(IoSize::Any) } else { parse_bytes(text).map(IoSize::Fixed) }
}

fn milliseconds(time: Option<Duration>) -> Value {
    json!(time.map(|time| time.as_millis() as u64))
}

pub(crate) fn read_device(file: &File, buf: &mut [u8], offset: u64) -> Result<(), Failure> {
    file.read_exact_at(buf, offset).map_err(|error| Failure::io(format_args!("read the device at {offset}"), &error))
}

/// Has somebody read the device, again and again, while it is closed.
fn late_reader(target: &Target) -> Result<(), Failure> {
    let file = target.open_direct()?;
    let read = move || {
        let mut buf = AlignedBuf::zeroed(4096);
        while file.read_exact_at(&mut buf, 0).is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let started = std::thread::Builder::new().name("late-reader".to_owned()).spawn(read);
    started.map(drop).map_err(|error| Failure::Environment(format!("failed to start a thread: {error}")))
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        let mut options = if self.external.is_asked_for() {
            self.external.options().into_iter().collect()
        } else {
            self.target.options()
        };
        let io_size = match self.io_size {
            IoSize::Any => json!("any"),
            IoSize::Fixed(bytes) => json!(bytes),
        };
        options.extend(
            [
                ("workers", json!(self.workers)),
                ("io_depth", json!(self.io_depth)),
                ("sharing", json!(self.sharing)),
                ("mix", json!(self.mix.to_string())),
                ("io_size", io_size),
                ("region", json!(self.region)),
                ("prefill", json!(self.prefill)),
                ("compressible", json!(self.compressible)),
                ("swarm", json!(self.swarm)),
                ("passes", json!(!self.no_passes)),
                ("faults", self.fault_choice().option()),
                ("stall_ms", milliseconds(Some(self.stall))),
                ("hang", json!(self.hang)),
                ("cut_every_ms", milliseconds(self.cut_every)),
                ("restart_every_ms", milliseconds(self.restart_every)),
                ("shrink_ms", milliseconds(Some(self.shrink()))),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        options
    }

    fn needs(&self) -> Needs {
        Needs { ublk: !self.external.is_asked_for(), tools: &[] }
    }

    fn meets_kernel_device(&self) -> bool {
        // Somebody else's device too.
        true
    }

    fn validate(&self) -> Result<(), Failure> {
        self.external.validate()?;
        if self.workers == 0 || self.workers > 256 {
            return Err(Failure::Usage(format!("{} workers: choose 1 to 256", self.workers)));
        }
        if self.io_depth == 0 || self.io_depth > 1024 {
            return Err(Failure::Usage(format!("an I/O depth of {}: choose 1 to 1024", self.io_depth)));
        }
        if self.stall < Duration::from_secs(1) {
            return Err(Failure::Usage("a stall of less than 1s: busy machines pause for longer".to_owned()));
        }
        if self.outages().iter().any(|(_, every)| *every < Duration::from_millis(100)) {
            return Err(Failure::Usage("outages more often than every 100ms leave no time for work".to_owned()));
        }
        if self.cut_every.is_some() && self.target.backend != BackendKind::Medium {
            return Err(Failure::Usage(
                "--cut-every needs a disk that can lose its cache: add --backend medium".to_owned(),
            ));
        }
        if self.target.read_only && (self.prefill || self.mix().total() == 0) {
            return Err(Failure::Usage(
                "--read-only: the device is filled beforehand, and takes reads and flushes alone: leave --prefill out, \
                 and have reads in the --mix"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        if !self.errors_may_be() && self.outages().is_empty() && !self.external.is_asked_for() {
            context.no_io_errors();
        }
        let kernel_log = KernelLog::from_here();
        let filled = self.target.read_only.then(|| self.fill(context)).transpose()?;
        let subject = context.step("start", Duration::from_secs(120), |context| {
            self.start(context, filled.as_ref().map(|filled| &filled.storage))
        })?;
        // Whatever comes of it, the device is closed; the first failure is the one that counts.
        let mut underway = None;
        let tortured = self.torture(context, &subject, filled, &mut underway);
        if let (Some(Hang::Stop), Subject::Ours(target)) = (self.hang, &subject) {
            late_reader(target)?;
        }
        let closed = context.always("close", Duration::from_secs(120), |context| subject.close(context));
        let outcome = tortured.and(closed);
        context.last_words.none();
        if let (Err(Failure::DeviceBroke(broken)), Some(underway)) = (&outcome, underway) {
            let said = kernel_log.map(|mut log| log.read().iter().map(ToString::to_string).collect());
            let kept = underway.failed(&broken.event, said.unwrap_or_default());
            // What becomes of it changes nothing: the run has failed.
            let _ = context.always("keep the failure", self.shrink() + SHRINK_DRAIN, |context| {
                failed::keep(context, &underway.stage, &kept, self.shrink())
            });
        }
        outcome
    }
}

impl Args {
    /// With everything drawn that is to be, of which `is_given` does not say that it was given. The seed is known from then
    /// on.
    pub(crate) fn drawn(mut self, is_given: impl Fn(&str) -> bool) -> Self {
        if self.swarm {
            let seed = *self.common.seed.get_or_insert_with(Seed::from_os);
            swarm::draw(&mut self, is_given, &mut seed.derive("swarm", 0).rng());
        }
        self
    }
}

/// A storage with content, and who knows it.
struct Filled {
    storage: Storage,
    books: Books,
}

impl Args {
    /// Fills a storage by way of a device that may be written, as the one under test may not.
    fn fill(&self, context: &mut Context) -> Result<Filled, Failure> {
        context.step("fill", VERIFY_DEADLINE, |context| {
            let target = TargetArgs { read_only: false, mutant: None, ..self.target.clone() }.start(context)?;
            let storage = target.storage().clone();
            let subject = Subject::Ours(target);
            let filled = self.fill_device(context, &subject);
            let closed = subject.close(context);
            let books = filled.and_then(|books| closed.map(|()| books))?;
            Ok(Filled { storage, books })
        })
    }

    fn fill_device(&self, context: &Context, subject: &Subject) -> Result<Books, Failure> {
        let opened = subject.open()?;
        let layout = self.layout(&opened);
        let plan = self.plan(context, &opened, &layout)?;
        let books = layout.books(&opened, context.seed(), !self.outages().is_empty());
        let until = None;
        let orders = Orders { ops: Some(0), until, passes: false, prefill: true, ..self.orders(context, &opened) };
        let shared = Shared::new(orders, plan.options().workers, None, context);
        let job = Job::Draw { plan: &plan, layout: &layout, books: &books, outages: Vec::new() };
        Crew { subject, opened: &opened, job }.work(context, &Arc::new(shared))?;
        Ok(books)
    }

    fn layout(&self, opened: &Opened) -> Layout {
        Layout::new(self.sharing, self.workers, self.region, opened).compressible(self.compressible)
    }

    fn start(&self, context: &Context, storage: Option<&Storage>) -> Result<Subject, Failure> {
        if let Some(external) = self.external.start(context)? {
            return Ok(Subject::SomebodyElses(external));
        }
        let target = TargetArgs { faults: self.fault_plan(context), hang: self.hang, ..self.target.clone() };
        if !target.faults.is_empty() {
            context.note(format!("faults: {}", target.faults.to_string().replace('\n', "; ")));
        }
        match storage {
            Some(storage) => target.serve(context, storage),
            None => target.start(context),
        }
        .map(Subject::Ours)
    }

    fn torture(
        &self,
        context: &mut Context,
        subject: &Subject,
        filled: Option<Filled>,
        underway: &mut Option<Underway>,
    ) -> Result<(), Failure> {
        let (_ours_alone, opened) =
            context.step("open", Duration::from_secs(30), |_| Ok((subject.keep_to_ourselves()?, subject.open()?)))?;
        let layout = self.layout(&opened);
        let underway = underway.insert(self.underway(context, subject, &opened, &layout));
        if let Some(report) = context.report_dir().map(ToOwned::to_owned) {
            let underway = underway.clone();
            context.last_words.are(move |hang| match underway.failed(hang, Vec::new()).write(None, &report) {
                Ok(dir) => vec![kept::to_replay(&dir)],
                Err(failure) => vec![failure.to_string()],
            });
        }
        if let Subject::Ours(target) = subject {
            context.step("threads are marked", Duration::from_secs(30), |context| {
                let threads = target.check_reclaim()?;
                context.detail(format!("{threads} threads that serve it"));
                Ok(())
            })?;
        }
        self.expect_refusals(context, subject)?;
        let outages = self.outages();
        let books = match filled {
            Some(filled) => filled.books,
            None => layout.books(&opened, context.seed(), !outages.is_empty()),
        };
        let plan = self.plan(context, &opened, &layout)?;
        self.require(context, &plan, &opened, &layout);
        let drawn = context.step("torture", Self::deadline(context), |context| {
            let orders = self.orders(context, &opened);
            let workers = plan.options().workers;
            let accounts =
                opened.ours.then(|| Accounts::new(workers, self.errors_may_be(), opened.capabilities.flush));
            let recorder = Arc::clone(&underway.recorder);
            let shared = Arc::new(Shared::new(orders, workers, accounts, context).recorded_by(recorder));
            let job = Job::Draw { plan: &plan, layout: &layout, books: &books, outages };
            let outcome = Crew { subject, opened: &opened, job }.work(context, &shared);
            let total = shared.total();
            outcome?;
            context.detail(format!("{} operations, {} bytes verified", total.ops(), total.verified_bytes()));
            Ok(())
        });
        if let Err(failure) = drawn {
            if matches!(failure, Failure::DeviceBroke(_)) {
                Self::survey(context, subject, &books);
            }
            return Err(failure);
        }
        context.always("verify through a second opening", VERIFY_DEADLINE, |context| {
            let file = subject.open()?.file;
            let excuses = Excuses::new(subject, self.errors_may_be())?;
            let bytes = verify::all(books.iter(), |buf, offset| excuses.read(&file, buf, offset))?;
            context.evidence().add("final_verified_bytes", bytes);
            context.detail(format!("{bytes} bytes"));
            Ok(())
        })?;
        // Once more, now that it was under load.
        self.expect_refusals(context, subject)?;
        if let Subject::Ours(target) = subject {
            context.always("verify against the storage", VERIFY_DEADLINE, |context| {
                let bytes = verify::all(books.iter(), |buf, offset| target.storage().read_at(buf, offset))?;
                context.evidence().add("storage_verified_bytes", bytes);
                context.detail(format!("{bytes} bytes"));
                Ok(())
            })?;
            context.evidence().add("served_requests", target.served_requests()?);
        }
        if context.interruption().came() { Err(Failure::Interrupted) } else { Ok(()) }
    }

    fn shrink(&self) -> Duration {
        self.shrink.unwrap_or(if self.external.is_there_already() { Duration::ZERO } else { SHRINK })
    }

    /// What has to be known of the run when it fails.
    fn underway(&self, context: &Context, subject: &Subject, opened: &Opened, layout: &Layout) -> Underway {
        let TargetArgs { backend, mode, workers_backend, mutant, .. } = self.target;
        let place = if self.external.is_asked_for() {
            Place::External(self.external.clone())
        } else {
            Place::Served(ServedBy { backend, mode, workers_backend })
        };
        Underway {
            stage: Stage { place, device: opened.device_id, stall: self.stall },
            seed: context.seed(),
            setup: Setup {
                compressible: self.compressible,
                ..failed::setup(subject, opened, self.workers, self.io_depth)
            },
            mutant,
            faults: if opened.ours { self.fault_plan(context) } else { FaultPlan::NONE },
            regions: layout.regions().to_vec(),
            recorder: Arc::new(Recorder::default()),
            repro: context.repro.clone(),
        }
    }

    /// A device that is read-only takes nothing.
    fn expect_refusals(&self, context: &mut Context, subject: &Subject) -> Result<(), Failure> {
        let Subject::Ours(target) = subject else { return Ok(()) };
        if !self.target.read_only {
            return Ok(());
        }
        context.always("changes are refused", Duration::from_secs(60), |context| {
            let attempts = refusals::check(context, target)?;
            context.detail(format!("{attempts} attempts"));
            Ok(())
        })
    }

    /// After the first wrong byte, looks for others: a write that went astray has two victims, and which one is met first
    /// is chance.
    fn survey(context: &mut Context, subject: &Subject, books: &Books) {
        // What it finds is told and changes nothing: the run has failed already.
        let _ = context.always("survey", VERIFY_DEADLINE, |context| {
            let file = subject.open()?.file;
            let found = verify::survey(books.iter(), |buf, offset| read_device(&file, buf, offset));
            context.detail(format!("{} places on the device hold what they should not", found.len()));
            for mismatch in found {
                context.sink().send(mismatch);
            }
            Ok(())
        });
    }

    fn plan(&self, context: &Context, opened: &Opened, layout: &Layout) -> Result<Plan, Failure> {
        let mut options = PlanOptions::new(opened.bytes, opened.logical_block, opened.max_io_bytes, self.workers);
        layout.apply(&mut options);
        options.depth = u32::from(self.io_depth);
        options.mix = self.mix();
        options.size = self.io_size;
        options.capabilities = opened.capabilities;
        Plan::new(options, context.seed().derive("torture", 0)).map_err(|error| Failure::Usage(error.to_string()))
    }

    /// What a run must have done to be one.
    fn require(&self, context: &Context, plan: &Plan, opened: &Opened, layout: &Layout) {
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
        let changes = mix.write + mix.fua + mix.discard + mix.zeroes > 0;
        evidence.require("overlaps", u64::from(layout.overlaps(self.io_depth) && changes));
        evidence.require("power_cuts", u64::from(self.cut_every.is_some()));
        evidence.require("mutant_hits", u64::from(self.target.mutant.is_some()));
        evidence.require("restarts", u64::from(self.restart_every.is_some()));
        evidence.require("refusals", if self.target.read_only { refusals::ATTEMPTS } else { 0 });
        if opened.ours {
            evidence.require("served_requests", 100);
            evidence.require("storage_verified_bytes", 1);
        }
    }

    /// The mix, without what changes a device that may not be changed.
    fn mix(&self) -> Mix {
        let Mix { read, flush, .. } = self.mix;
        if self.target.read_only { Mix { read, flush, ..Mix::NOTHING } } else { self.mix }
    }

    fn orders(&self, context: &Context, opened: &Opened) -> Orders {
        // A number of operations alone means no limit of time.
        let duration = context.duration().or_else(|| context.ops().is_none().then_some(DEFAULT_DURATION));
        Orders {
            ops: context.ops().map(|ops| ops.div_ceil(u64::from(self.workers)).max(1)),
            until: duration.map(|duration| Instant::now() + duration),
            passes: !self.no_passes,
            prefill: self.prefill || !opened.zeroed,
            max_io_bytes: opened.max_io_bytes,
            stall: self.stall,
            hang: self.hang == Some(Hang::Worker),
        }
    }

    /// When the step is a hang: its own time, and enough beside it for what is under way to end.
    fn deadline(context: &Context) -> Duration {
        // Operations are watched one by one; a run by count has only that bound and this generous one.
        let by_count = Duration::from_secs(24 * 3600);
        let own = context.duration().or_else(|| context.ops().is_none().then_some(DEFAULT_DURATION));
        own.map_or(by_count, |own| own + DRAIN_DEADLINE)
    }

    fn fault_choice(&self) -> &Choice {
        // What is planted, or somebody else's, is tried alone unless faults are asked for.
        let own =
            if self.external.is_asked_for() || self.target.mutant.is_some() { &Choice::None } else { &Choice::Draw };
        self.faults.as_ref().unwrap_or(own)
    }

    fn fault_plan(&self, context: &Context) -> FaultPlan {
        // Where the shared region will be, if there is one.
        let range = SectorRange::device(self.target.size.min(self.region));
        self.fault_choice().plan(range, &mut context.seed().derive("fault plan", 0).rng())
    }

    /// Whether operations may fail, as long as somebody can tell why.
    fn errors_may_be(&self) -> bool {
        *self.fault_choice() != Choice::None || self.target.mutant.is_some()
    }

    fn outages(&self) -> Vec<(Outage, Duration)> {
        let every = [(Outage::PowerCut, self.cut_every), (Outage::Restart, self.restart_every)];
        every.into_iter().filter_map(|(outage, every)| Some((outage, every?))).collect()
    }
}

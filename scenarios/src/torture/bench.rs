//! A device of our own that is worked on again and again, with what is known of its content.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ublkit_harness::{IoSize, Mix, Plan, PlanOptions, Seed};

use super::accounts::Accounts;
use super::crew::{Crew, Job};
use super::device::{Opened, Subject};
use super::outage::Outage;
use super::shared::{Orders, Shared};
use super::sharing::{Books, Layout, Sharing};
use super::verify;
use crate::context::Context;
use crate::scenario::Failure;

/// How many workers there are.
const WORKERS: u32 = 4;
/// How long an operation may take before that is a hang.
const STALL: Duration = Duration::from_secs(60);
/// How long it may take to compare everything.
const VERIFY: Duration = Duration::from_secs(120);

/// A device of our own, and what is known of its content.
pub(crate) struct Bench<'a> {
    pub(crate) subject: &'a Subject,
    pub(crate) opened: Opened,
    pub(crate) layout: Layout,
    books: Books,
}

/// What the workers do.
pub(crate) struct Work {
    pub(crate) seed: Seed,
    pub(crate) mix: Mix,
    /// How many operations each worker keeps in flight.
    pub(crate) depth: u32,
    /// The longest request, but for some that go beyond, in bytes.
    pub(crate) longest: u64,
    /// How many operations each worker does, and until when.
    pub(crate) ops: Option<u64>,
    pub(crate) until: Option<Instant>,
    /// Operations may fail, if the storage made an error for each.
    pub(crate) errors_may_be: bool,
    /// What goes out, and how often. A power cut leaves what speaks for itself: then nobody is asked but the content.
    pub(crate) outages: Vec<(Outage, Duration)>,
}

impl<'a> Bench<'a> {
    /// Regions of at most `region` bytes; `power` says that it may be cut.
    pub(crate) fn open(context: &Context, subject: &'a Subject, region: u64, power: bool) -> Result<Self, Failure> {
        let opened = subject.open()?;
        let layout = Layout::new(Sharing::Both, WORKERS, region, &opened);
        let books = layout.books(&opened, context.seed(), power);
        Ok(Self { subject, opened, layout, books })
    }

    /// Draws operations, and does them.
    pub(crate) fn work(&self, context: &Context, work: Work) -> Result<(), Failure> {
        let Opened { bytes, logical_block, max_io_bytes, capabilities, .. } = self.opened;
        let mut options = PlanOptions::new(bytes, logical_block, max_io_bytes.min(work.longest), WORKERS);
        self.layout.apply(&mut options);
        options.depth = work.depth;
        options.mix = work.mix;
        options.size = IoSize::Any;
        options.capabilities = capabilities;
        let plan = Plan::new(options, work.seed).map_err(|error| Failure::Usage(error.to_string()))?;
        let orders = Orders {
            ops: work.ops,
            until: work.until,
            passes: false,
            prefill: false,
            max_io_bytes,
            stall: STALL,
            hang: false,
        };
        let workers = plan.options().workers;
        let asked = work.outages.is_empty();
        let accounts = asked.then(|| Accounts::new(workers, work.errors_may_be, capabilities.flush));
        let shared = Arc::new(Shared::new(orders, workers, accounts, context));
        let Self { subject, opened, layout, books } = self;
        let job = Job::Draw { plan: &plan, layout, books, outages: work.outages };
        Crew { subject, opened, job }.work(context, &shared)
    }

    /// Compares everything, through a second opening of the device. Returns how many bytes that were.
    pub(crate) fn verify(&self) -> Result<u64, Failure> {
        let file = self.subject.open()?.file;
        verify::all(self.books.iter(), |buf, offset| super::read_device(&file, buf, offset))
    }

    /// As [`verify`](Self::verify), in what is behind the device.
    fn verify_storage(&self) -> Result<u64, Failure> {
        let storage = self.subject.ours()?.storage();
        verify::all(self.books.iter(), |buf, offset| storage.read_at(buf, offset))
    }
}

/// Has `work` do its work on a device that nobody else looks at, and compares its storage.
pub(crate) fn on_subject(
    context: &mut Context,
    subject: &Subject,
    region: u64,
    work: impl FnOnce(&mut Context, &Bench) -> Result<(), Failure>,
) -> Result<(), Failure> {
    // Whoever probes the device meanwhile would see errors that are nobody's.
    let _ours_alone = subject.keep_to_ourselves()?;
    let bench = Bench::open(context, subject, region, false)?;
    work(context, &bench)?;
    context.step("verify against the storage", VERIFY, |context| {
        let bytes = bench.verify_storage()?;
        context.evidence().add("storage_verified_bytes", bytes);
        context.detail(format!("{bytes} bytes"));
        Ok(())
    })
}

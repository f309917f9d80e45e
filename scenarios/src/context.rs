//! What a scenario is given to run with.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ublkit_harness::event::{Event, StepFinished, StepStarted};
use ublkit_harness::{EventSink, Evidence, Seed, Watchdog};

use crate::gates::{Gate, KernelVersion};
use crate::in_flight::InFlight;
use crate::runs::RunRecord;
use crate::scenario::{Broken, Failure};

/// What a remark begins with that says what a gate leaves out.
pub(crate) const LEFT_OUT: &str = "left out on this kernel: ";

/// Evidence that several threads add to.
#[derive(Clone, Debug, Default)]
pub struct SharedEvidence(Arc<Mutex<Evidence>>);

impl SharedEvidence {
    /// As [`Evidence::require`].
    pub fn require(&self, name: &str, minimum: u64) {
        self.lock().require(name, minimum);
    }

    /// As [`Evidence::add`].
    pub fn add(&self, name: &str, count: u64) {
        self.lock().add(name, count);
    }

    /// As [`Evidence::merge`].
    pub fn merge(&self, other: &Evidence) {
        self.lock().merge(other);
    }

    /// What there is now.
    #[must_use]
    pub fn snapshot(&self) -> Evidence {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Evidence> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the run was asked to end. Cheap enough to look at for every operation.
#[derive(Clone, Debug, Default)]
pub struct Interruption(Arc<AtomicBool>);

impl Interruption {
    /// Whether SIGINT, SIGTERM or SIGHUP came.
    #[must_use]
    pub fn came(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a run that is lost says in the end.
type Say = Box<dyn FnOnce(&Event) -> Vec<String> + Send>;

/// What is still to be done when the run is lost to a hang, once everything else is told of that: it is given the hang, and
/// returns remarks. There are seconds for it.
#[derive(Clone, Default)]
pub(crate) struct LastWords(Arc<Mutex<Option<Say>>>);

impl LastWords {
    /// From now on this is to be done.
    pub(crate) fn are(&self, say: impl FnOnce(&Event) -> Vec<String> + Send + 'static) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(say));
    }

    /// Nothing is to be done any more.
    pub(crate) fn none(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The run is lost.
    pub(crate) fn say(&self, hang: &Event) -> Vec<String> {
        let say = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        say.map(|say| say(hang)).unwrap_or_default()
    }
}

impl std::fmt::Debug for LastWords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LastWords").finish_non_exhaustive()
    }
}

/// What a scenario is given to run with.
#[derive(Debug)]
pub struct Context {
    pub(crate) seed: Seed,
    pub(crate) duration: Option<Duration>,
    pub(crate) ops: Option<u64>,
    pub(crate) report_dir: Option<PathBuf>,
    pub(crate) sink: EventSink,
    pub(crate) evidence: SharedEvidence,
    pub(crate) watchdog: Arc<Watchdog>,
    pub(crate) interruption: Interruption,
    pub(crate) record: RunRecord,
    /// The command that runs it again.
    pub(crate) repro: String,
    pub(crate) last_words: LastWords,
    /// What the workers of the run wait for.
    pub(crate) in_flight: InFlight,
    pub(crate) detail: String,
    /// What no step may take longer than.
    pub(crate) deadline: Option<Duration>,
    /// The kernel may not complain of I/O errors.
    pub(crate) io_is_sound: bool,
}

/// How long a step that has failed waits for the watchdog to end the process: longer than that takes.
const LOST: Duration = Duration::from_secs(60);

impl Context {
    /// The seed of the run.
    #[must_use]
    pub fn seed(&self) -> Seed {
        self.seed
    }

    /// How long the run was asked to last, by `--duration` or `UBLK_TORTURE_DURATION`.
    #[must_use]
    pub fn duration(&self) -> Option<Duration> {
        self.duration
    }

    /// How many operations the run was asked to do, by `--ops`.
    #[must_use]
    pub fn ops(&self) -> Option<u64> {
        self.ops
    }

    /// Where the report goes, if one was asked for. The directory exists.
    #[must_use]
    pub fn report_dir(&self) -> Option<&Path> {
        self.report_dir.as_deref()
    }

    /// Where events are sent to.
    #[must_use]
    pub fn sink(&self) -> &EventSink {
        &self.sink
    }

    /// The work done so far, and how much of it makes a run.
    #[must_use]
    pub fn evidence(&self) -> &SharedEvidence {
        &self.evidence
    }

    /// The watchdog, for what a [step](Self::step) does not cover.
    #[must_use]
    pub fn watchdog(&self) -> &Arc<Watchdog> {
        &self.watchdog
    }

    /// To be looked at in loops.
    #[must_use]
    pub fn interruption(&self) -> &Interruption {
        &self.interruption
    }

    /// `deadline`, or what no step may take longer than, whichever is shorter.
    pub(crate) fn at_most(&self, deadline: Duration) -> Duration {
        self.deadline.map_or(deadline, |most| most.min(deadline))
    }

    /// A remark for the reader.
    pub fn note(&self, text: impl Into<String>) {
        self.sink.send(Event::note(text));
    }

    /// Whether `what` has to be left out because of a bug of this kernel's; if so, that is said and counted.
    #[must_use]
    pub fn gated(&self, gate: &Gate, what: &str) -> bool {
        let shut = gate.is_shut(KernelVersion::here());
        if shut {
            self.note(format!("{LEFT_OUT}{what}: {}: {} (fixed: {})", gate.name, gate.bug, gate.fixed));
            self.evidence.add(&format!("gated_{}", gate.name.replace('-', "_")), 1);
        }
        shut
    }

    /// From here on, if the kernel complains of a device's I/O errors or of lost writes, the run has failed: nobody injects
    /// any, and no device goes away under those who use it. All its other complaints count in any case.
    pub fn no_io_errors(&mut self) {
        self.io_is_sound = true;
    }

    /// Says what the step that is under way saw, for its closing event. Said twice, the last one counts.
    pub fn detail(&mut self, text: impl Into<String>) {
        self.detail = text.into();
    }

    /// Does one part of the scenario: tells that it begins and how it ended, and has the watchdog end the process with
    /// a full dump if it is not over by `deadline`, or by `--deadline` if that is shorter. It does the same when `work`
    /// returns [`Failure::Hang`]. A broken promise is reported at once.
    ///
    /// Its last waits should be shorter than `deadline`: a failure that says what was awaited is worth more than a dump.
    ///
    /// # Errors
    /// What `work` returned; [`Failure::Interrupted`] without doing it when the run was asked to end.
    pub fn step<T>(
        &mut self,
        name: &str,
        deadline: Duration,
        work: impl FnOnce(&mut Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        if self.interruption.came() {
            return Err(Failure::Interrupted);
        }
        self.always(name, deadline, work)
    }

    /// A [step](Self::step) that is done after an interruption too: what puts things back in order.
    ///
    /// # Errors
    /// What `work` returned.
    pub fn always<T>(
        &mut self,
        name: &str,
        deadline: Duration,
        work: impl FnOnce(&mut Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let deadline = self.at_most(deadline);
        let deadline_ms = deadline.as_millis() as u64;
        self.sink.send(Event::StepStarted(StepStarted { name: name.to_owned(), deadline_ms }));
        self.detail.clear();
        let guard = self.watchdog.guard(name, deadline);
        let mut result = work(self);
        let elapsed_ms = guard.deadline().elapsed().as_millis() as u64;
        drop(guard);
        if let Err(Failure::Hang(what)) = &result {
            // Given up in time, and a hang all the same: where everything stands is to be seen, and nothing to be left.
            self.watchdog.expire(format!("{name}: {what}"), Duration::from_millis(elapsed_ms));
            std::thread::sleep(LOST);
        }
        self.end_if_lost();
        if let Err(failure) = &mut result {
            self.report(failure);
        }
        let detail = match &result {
            Ok(_) => std::mem::take(&mut self.detail),
            // Its event has the rest.
            Err(failure) => failure.to_string().lines().next().unwrap_or_default().to_owned(),
        };
        let name = name.to_owned();
        self.sink.send(Event::StepFinished(StepFinished {
            name,
            ok: result.is_ok(),
            detail,
            elapsed_ms,
            deadline_ms,
        }));
        result
    }

    /// Does not return once a deadline has passed: the watchdog is about to end the process, and what comes of work that
    /// it puts an end to is not to be told.
    pub(crate) fn end_if_lost(&self) {
        if self.watchdog.has_expired() {
            std::thread::sleep(LOST);
        }
    }

    /// Sends the event of a broken promise, once.
    pub(crate) fn report(&self, failure: &mut Failure) {
        if let Failure::DeviceBroke(Broken { event, reported: reported @ false }) = failure {
            self.sink.send(event.as_ref().clone());
            *reported = true;
        }
    }
}

/// A context for tests of what is run in one.
#[cfg(test)]
pub(crate) mod testing {
    use ublkit_harness::watchdog::WatchdogOptions;
    use ublkit_harness::{EventLoop, Seed, Watchdog};

    use super::{Arc, Context, Interruption, LastWords, SharedEvidence};
    use crate::in_flight::InFlight;
    use crate::runs::StateDir;

    pub(crate) struct Testing {
        pub(crate) context: Context,
        pub(crate) _loop: EventLoop,
    }

    pub(crate) fn context() -> Testing {
        let event_loop = EventLoop::start(Vec::new()).expect("a thread");
        let watchdog = Watchdog::start(WatchdogOptions::default(), |report| panic!("{report:?}")).expect("a thread");
        let context = Context {
            seed: Seed::new(7),
            duration: None,
            ops: None,
            report_dir: None,
            sink: event_loop.sink(),
            evidence: SharedEvidence::default(),
            watchdog: Arc::new(watchdog),
            interruption: Interruption::default(),
            record: StateDir::default().record(),
            repro: String::new(),
            last_words: LastWords::default(),
            in_flight: InFlight::default(),
            detail: String::new(),
            deadline: None,
            io_is_sound: false,
        };
        Testing { context, _loop: event_loop }
    }
}

//! The workers of a run: started, told of, put through outages, and seen to their end.

use std::sync::Arc;
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use ublkit_harness::event::{Event, Progress};
use ublkit_harness::script::Act;
use ublkit_harness::{Plan, SeededRng};

use super::book::Book;
use super::device::{Opened, Subject};
use super::outage::Outage;
use super::scripted::Scripted;
use super::shared::Shared;
use super::sharing::{Books, Layout};
use super::tally::Tally;
use super::worker::{Source, Work, Worker};
use crate::context::Context;
use crate::scenario::Failure;

/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// How often the crew looks around.
const LOOK_AROUND: Duration = Duration::from_millis(20);

/// What the workers work on.
pub(crate) struct Crew<'a> {
    pub(crate) subject: &'a Subject,
    pub(crate) opened: &'a Opened,
    pub(crate) job: Job<'a>,
}

/// What the workers do.
pub(crate) enum Job<'a> {
    /// They draw operations.
    Draw {
        plan: &'a Plan,
        layout: &'a Layout,
        books: &'a Books,
        /// What goes out, and how often.
        outages: Vec<(Outage, Duration)>,
    },
    /// They do what a script says, on a device that one book is kept of.
    Follow { script: &'a Arc<Scripted>, book: &'a Arc<Book> },
}

impl Job<'_> {
    fn workers(&self) -> u32 {
        match self {
            Self::Draw { plan, .. } => plan.options().workers,
            Self::Follow { script, .. } => script.workers(),
        }
    }

    fn of(&self, worker: u32) -> Work {
        match self {
            Self::Draw { plan, layout, books, .. } => Work {
                source: Source::Plan(Box::new(plan.worker(worker))),
                depth: plan.options().depth as u16,
                longest_bytes: plan.options().longest_bytes() as usize,
                book: layout.book_of(books, worker),
                part: layout.part(worker),
            },
            Self::Follow { script, book } => Work {
                source: Source::Script(Arc::clone(script)),
                depth: script.depth(),
                longest_bytes: script.longest_bytes(),
                book: Arc::clone(book),
                part: (0, 1),
            },
        }
    }

    fn script(&self) -> Option<&Scripted> {
        match self {
            Self::Draw { .. } => None,
            Self::Follow { script, .. } => Some(script),
        }
    }

    /// The power was cut while nothing was in flight.
    fn power_cut(&self) {
        match self {
            Self::Draw { books, .. } => books.iter().for_each(Book::power_cut),
            Self::Follow { book, .. } => book.power_cut(),
        }
    }
}

/// Outages to come.
struct Schedule {
    rng: SeededRng,
    next: Vec<(Outage, Duration, Instant)>,
}

impl Schedule {
    fn new(outages: &[(Outage, Duration)], mut rng: SeededRng) -> Self {
        let now = Instant::now();
        let next = outages.iter().map(|&(outage, every)| (outage, every, now + drawn(every, &mut rng))).collect();
        Self { rng, next }
    }

    /// One whose time has come, if there is one.
    fn due(&mut self) -> Option<Outage> {
        let now = Instant::now();
        let (outage, every, at) = self.next.iter_mut().find(|(_, _, at)| *at <= now)?;
        *at = now + drawn(*every, &mut self.rng);
        Some(*outage)
    }
}

/// Half as long as `every`, to half as long again: outages meet the workers in all their moods.
fn drawn(every: Duration, rng: &mut SeededRng) -> Duration {
    let every = every.as_micros() as u64;
    Duration::from_micros(rng.within(every / 2..=every + every / 2))
}

impl Crew<'_> {
    /// Runs the workers until all have ended. Their counts are added to the evidence, whatever comes of it.
    pub(crate) fn work(&self, context: &Context, shared: &Arc<Shared>) -> Result<(), Failure> {
        let start = Instant::now();
        self.switch_faults(shared, true)?;
        let results: Vec<_> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..self.job.workers())
                .map(|index| {
                    let worker = Worker::new(index, self.opened, self.job.of(index), Arc::clone(shared));
                    std::thread::Builder::new()
                        .name(format!("torture-{index}"))
                        .spawn_scoped(scope, move || worker.run())
                        .map_err(|error| Failure::Environment(format!("failed to start a thread: {error}")))
                })
                .collect();
            for _ in handles.iter().filter(|handle| handle.is_err()) {
                shared.stop();
                shared.outages.leave();
            }
            let over = || handles.iter().flatten().all(ScopedJoinHandle::is_finished);
            let outcome = self.oversee(context, shared, start, over);
            if outcome.is_err() {
                shared.stop();
            }
            let joined = handles.into_iter().map(|handle| {
                handle.and_then(|handle| {
                    handle.join().unwrap_or_else(|_panic| Err(Failure::Internal("a worker panicked".to_owned())))
                })
            });
            joined.chain([outcome]).collect()
        });
        shared.total().add_to(context.evidence());
        context.evidence().add("work_ms", start.elapsed().as_millis() as u64);
        let worked: Result<(), Failure> = results.into_iter().collect();
        let switched = self.switch_faults(shared, false);
        worked.and(switched)?;
        if let (Some(accounts), Subject::Ours(target)) = (&shared.accounts, self.subject) {
            context.evidence().merge(&accounts.judge(target)?);
        }
        Ok(())
    }

    fn switch_faults(&self, shared: &Shared, on: bool) -> Result<(), Failure> {
        if let (Some(accounts), Subject::Ours(target)) = (&shared.accounts, self.subject) {
            if on {
                accounts.switched(on);
            }
            target.faults(on)?;
            if !on {
                accounts.switched(on);
            }
        }
        Ok(())
    }

    /// Tells how far the workers are, and puts them through outages.
    fn oversee(
        &self,
        context: &Context,
        shared: &Shared,
        start: Instant,
        over: impl Fn() -> bool,
    ) -> Result<(), Failure> {
        let mut last = Tally::default();
        let mut schedule = match &self.job {
            Job::Draw { outages, .. } => Schedule::new(outages, context.seed().derive("outages", 0).rng()),
            Job::Follow { .. } => Schedule::new(&[], context.seed().rng()),
        };
        let script = self.job.script();
        let mut cues = script.map(Scripted::cues).unwrap_or_default().iter().copied().peekable();
        while !over() {
            match (script, cues.peek()) {
                (Some(script), Some(&(number, act))) => {
                    if script.turns().wait(number, LOOK_AROUND) && !shared.stopped() {
                        self.cue(context, shared, act)?;
                        script.turns().done();
                        cues.next();
                    }
                }
                _ => std::thread::sleep(LOOK_AROUND),
            }
            if context.interruption().came() {
                shared.stop();
            }
            self.subject.alive()?;
            if shared.since_progress() >= PROGRESS_EVERY {
                last = tell(context, shared, &last, start);
                if let (Some(accounts), Subject::Ours(target)) = (&shared.accounts, self.subject) {
                    accounts.settle(target)?;
                }
            }
            if !shared.stopped()
                && let Some(outage) = schedule.due()
            {
                self.go_through(context, shared, outage)?;
            }
        }
        Ok(())
    }

    /// What a script says that is no worker's.
    fn cue(&self, context: &Context, shared: &Shared, act: Act) -> Result<(), Failure> {
        match act {
            Act::PowerCut => self.go_through(context, shared, Outage::PowerCut),
            Act::Kill => self.go_through(context, shared, Outage::Restart),
            Act::FaultsOff => self.switch_faults(shared, false),
            Act::FaultsOn => self.switch_faults(shared, true),
            // Those are the workers', or whoever's who opens the device.
            Act::Op { .. } | Act::Sweep | Act::Reopen => Ok(()),
        }
    }

    fn go_through(&self, context: &Context, shared: &Shared, outage: Outage) -> Result<(), Failure> {
        let Subject::Ours(target) = self.subject else { return Ok(()) };
        let record = |act| shared.recorder.iter().for_each(|recorder| recorder.act(act));
        record(match outage {
            Outage::PowerCut => Act::PowerCut,
            Outage::Restart => Act::Kill,
        });
        shared.outages.coming(outage);
        let dead = target.kill(outage);
        shared.outages.out();
        if outage == Outage::PowerCut {
            self.job.power_cut();
        }
        let alive = target.revive();
        // As the workers do by themselves.
        record(Act::Sweep);
        shared.outages.over();
        let name = match outage {
            Outage::PowerCut => "power_cuts",
            Outage::Restart => "restarts",
        };
        context.evidence().add(name, 1);
        dead.and(alive)
    }
}

fn tell(context: &Context, shared: &Shared, last: &Tally, start: Instant) -> Tally {
    let since = shared.mark_progress().as_secs_f64().max(1e-3);
    let total = shared.total();
    let elapsed = start.elapsed();
    let until = shared.orders.until;
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

//! Where a plan has come to: what the rules have counted, and which of them fires on a call.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ublkit::Backend;

use super::{Effect, Errno, FaultBackend, FaultPlan, HoldId, Injection, Rule, Stage, Timing, Trigger};
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::sector::SECTOR;
use crate::seed::{Seed, SeededRng};
use crate::stamp::Stamp;

/// What stamps calls that faults happen to.
pub type Clock = Arc<dyn Fn() -> Stamp + Send + Sync>;

/// How many overwritten ranges are remembered for reads that are to be stale, and how much of each.
const PAST: usize = 32;
pub(super) const PAST_BYTES: u64 = 256 << 10;

/// A plan under way. Clones share it; it goes on where a server was replaced by another one.
#[derive(Clone)]
pub struct Faults(Arc<Shared>);

struct Shared {
    plan: FaultPlan,
    has_timing: bool,
    has_calls: bool,
    has_stale: bool,
    on: AtomicBool,
    /// Injections that were not taken yet: whether there are any is asked after every call.
    untaken: AtomicUsize,
    block_sectors: AtomicU64,
    clock: Option<Clock>,
    progress: Mutex<Progress>,
    release: Condvar,
}

struct Progress {
    state: u32,
    rules: Vec<RuleProgress>,
    injections: Vec<Injection>,
    next_number: u64,
    holds: u64,
    released: u64,
    past: VecDeque<Past>,
}

struct RuleProgress {
    counts: RuleCounts,
    rng: SeededRng,
}

/// What a range held before it was changed.
struct Past {
    range: SectorRange,
    bytes: Vec<u8>,
}

/// What a rule has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleCounts {
    /// Calls that it is for.
    pub calls: u64,
    /// Calls that it fired on.
    pub fired: u64,
}

/// A rule that fires on a call.
pub(super) struct Fired {
    pub(super) effect: Effect,
    /// What the details are drawn from.
    pub(super) rng: SeededRng,
    rule: u32,
    number: u64,
    began: Stamp,
}

impl Faults {
    /// A plan that begins now. What is drawn follows from `seed` and the order of the calls.
    #[must_use]
    pub fn new(plan: FaultPlan, seed: Seed) -> Self {
        Self::build(plan, seed, None)
    }

    /// The same, with a clock for the stamps of injections.
    #[must_use]
    pub fn with_clock(plan: FaultPlan, seed: Seed, clock: Clock) -> Self {
        Self::build(plan, seed, Some(clock))
    }

    fn build(plan: FaultPlan, seed: Seed, clock: Option<Clock>) -> Self {
        let has = |what: &dyn Fn(Effect) -> bool| plan.rules.iter().any(|rule| what(rule.effect));
        let rules = (0..plan.rules.len() as u64)
            .map(|index| RuleProgress { counts: RuleCounts::default(), rng: seed.derive("fault", index).rng() });
        let progress = Progress {
            state: 0,
            rules: rules.collect(),
            injections: Vec::new(),
            next_number: 0,
            holds: 0,
            released: 0,
            past: VecDeque::new(),
        };
        Self(Arc::new(Shared {
            has_timing: has(&Effect::is_timing),
            has_calls: has(&|effect| !effect.is_timing()),
            has_stale: has(&|effect| effect == Effect::Stale),
            plan,
            on: AtomicBool::new(true),
            untaken: AtomicUsize::new(0),
            block_sectors: AtomicU64::new(1),
            clock,
            progress: Mutex::new(progress),
            release: Condvar::new(),
        }))
    }

    /// `inner` with these faults.
    pub fn backend<B: Backend>(&self, inner: B) -> FaultBackend<B> {
        FaultBackend::with_faults(inner, self.clone())
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> &FaultPlan {
        &self.0.plan
    }

    /// Switches the faults on or off. While they are off no rule counts, and whatever is held is released.
    pub fn switch(&self, on: bool) {
        self.0.on.store(on, Ordering::Release);
        if !on {
            self.release_all();
        }
    }

    /// Whether the faults are on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.on.load(Ordering::Acquire)
    }

    /// The injections since the last time this was asked, oldest first.
    #[must_use]
    pub fn take_injections(&self) -> Vec<Injection> {
        if self.0.untaken.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let mut progress = self.progress();
        self.0.untaken.store(0, Ordering::Release);
        std::mem::take(&mut progress.injections)
    }

    /// Takes note of an error that somebody else made, above the backend: an operation failed with `errno`, a positive
    /// number, as if a fault had been injected.
    pub fn admit(&self, kind: OpKind, range: SectorRange, errno: i32) {
        let Some(named) = Errno::new(errno) else { return };
        let effect = Effect::Error { errno: named, stage: Stage::Before };
        let began = self.now();
        let mut progress = self.progress();
        let number = progress.injections.last().map_or(0, |last| last.number + 1);
        let ended = self.now();
        progress.injections.push(Injection {
            number,
            rule: u32::MAX,
            kind,
            range,
            effect,
            errno: Some(errno),
            began,
            ended,
        });
        self.0.untaken.fetch_add(1, Ordering::Release);
    }

    /// What each rule has done so far.
    #[must_use]
    pub fn counts(&self) -> Vec<RuleCounts> {
        self.progress().rules.iter().map(|rule| rule.counts).collect()
    }

    /// The state that the plan is in.
    #[must_use]
    pub fn state(&self) -> u32 {
        self.progress().state
    }

    /// What a request has to suffer before the backend is called for it. To be asked once for each request, by whoever
    /// serves it; it is an injection of its own.
    #[must_use]
    pub fn timing(&self, kind: OpKind, range: SectorRange) -> Option<Timing> {
        if !self.0.has_timing || !self.is_on() {
            return None;
        }
        let blocks = range.sectors / self.0.block_sectors.load(Ordering::Relaxed);
        let mut fired = self.fire(kind, range, true, |effect, _| effect != Effect::Short || blocks >= 2)?;
        let timing = match fired.effect {
            Effect::Delay(time) => Timing::Delay(time),
            Effect::Short => Timing::Short { blocks: fired.rng.within(1..=blocks - 1) },
            _ => {
                let mut progress = self.progress();
                progress.holds += 1;
                Timing::Hold(HoldId(progress.holds - 1))
            }
        };
        self.record(&fired, kind, range);
        Some(timing)
    }

    /// The error that a call to the storage below a backend ends with, at which stage, and what the rest is drawn from; if
    /// there is one. It is an injection like others, in a place that need not be the device's.
    pub(crate) fn error_below(&self, kind: OpKind, range: SectorRange) -> Option<(Errno, Stage, SeededRng)> {
        if !self.judges_calls() {
            return None;
        }
        let fired = self.fire(kind, range, false, |effect, _| matches!(effect, Effect::Error { .. }))?;
        self.record(&fired, kind, range);
        match fired.effect {
            Effect::Error { errno, stage } => Some((errno, stage, fired.rng)),
            _ => None,
        }
    }

    /// How many requests are held.
    #[must_use]
    pub fn held(&self) -> u64 {
        let progress = self.progress();
        progress.holds - progress.released
    }

    /// Whether a request that was held is not any more.
    #[must_use]
    pub fn released(&self, hold: HoldId) -> bool {
        hold.0 < self.progress().released
    }

    /// Waits until a request that is held no longer is, `timeout` at most. Whether it was released.
    #[must_use]
    pub fn wait_released(&self, hold: HoldId, timeout: Duration) -> bool {
        let still = |progress: &mut Progress| hold.0 >= progress.released;
        let waited = self.0.release.wait_timeout_while(self.progress(), timeout, still);
        let (progress, _timed_out) = waited.unwrap_or_else(PoisonError::into_inner);
        hold.0 < progress.released
    }

    /// Releases the request that has been held for longest, if any is held.
    pub fn release_oldest(&self) {
        let mut progress = self.progress();
        progress.released = progress.holds.min(progress.released + 1);
        self.0.release.notify_all();
    }

    /// Releases every request that is held now.
    pub fn release_all(&self) {
        let mut progress = self.progress();
        progress.released = progress.holds;
        self.0.release.notify_all();
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.0.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Stamp {
        self.0.clock.as_ref().map_or(0, |clock| clock())
    }

    pub(super) fn set_block_sectors(&self, sectors: u64) {
        self.0.block_sectors.store(sectors.max(1), Ordering::Relaxed);
    }

    /// Whether calls of the backend need to be looked at.
    #[inline]
    pub(super) fn judges_calls(&self) -> bool {
        self.0.has_calls && self.0.on.load(Ordering::Relaxed)
    }

    /// Whether what is overwritten has to be remembered.
    pub(super) fn needs_past(&self) -> bool {
        self.0.has_stale
    }

    /// The rule that fires on a call, if one does. `possible` says whether an effect can happen to the call at all, and is
    /// told whether anything is remembered of its range; a rule does not count a call that its effect cannot happen to.
    pub(super) fn fire(
        &self,
        kind: OpKind,
        range: SectorRange,
        timing: bool,
        possible: impl Fn(Effect, bool) -> bool,
    ) -> Option<Fired> {
        let mut progress = self.progress();
        let Progress { state, rules, past, next_number, .. } = &mut *progress;
        let remembered = past.iter().any(|past| past.range.overlaps(range));
        let mut first = None;
        for ((index, rule), own) in (0..).zip(&self.0.plan.rules).zip(rules) {
            if rule.effect.is_timing() == timing
                && rule.is_for(kind, range, *state)
                && possible(rule.effect, remembered)
                && own.fires(rule)
                && first.is_none()
            {
                own.counts.fired += 1;
                first = Some((index, rule, Seed::new(own.rng.next_u64()).rng()));
            }
        }
        let (index, rule, rng) = first?;
        *state = rule.then.unwrap_or(*state);
        *next_number += 1;
        let number = *next_number - 1;
        Some(Fired { effect: rule.effect, rng, rule: index, number, began: self.now() })
    }

    /// What fired has happened.
    pub(super) fn record(&self, fired: &Fired, kind: OpKind, range: SectorRange) {
        let Fired { effect, rule, number, began, .. } = *fired;
        let errno = effect.errno().map(Errno::number);
        let mut progress = self.progress();
        progress.injections.push(Injection { number, rule, kind, range, effect, errno, began, ended: self.now() });
        self.0.untaken.fetch_add(1, Ordering::Release);
    }

    /// Remembers what a range held.
    pub(super) fn remember(&self, range: SectorRange, bytes: Vec<u8>) {
        let mut progress = self.progress();
        progress.past.truncate(PAST - 1);
        progress.past.push_front(Past { range, bytes });
    }

    /// Puts what is remembered of a range where it belongs in its content.
    pub(super) fn recall(&self, range: SectorRange, content: &mut [u8]) {
        let progress = self.progress();
        let Some(past) = progress.past.iter().find(|past| past.range.overlaps(range)) else { return };
        let (first, end) = (range.first.max(past.range.first), range.end().min(past.range.end()));
        let bytes =
            |origin: SectorRange| (first - origin.first) as usize * SECTOR..(end - origin.first) as usize * SECTOR;
        if let (Some(content), Some(old)) = (content.get_mut(bytes(range)), past.bytes.get(bytes(past.range))) {
            content.copy_from_slice(old);
        }
    }
}

impl RuleProgress {
    /// Counts a call that the rule is for. Whether it fires, if no rule before it does.
    fn fires(&mut self, rule: &Rule) -> bool {
        self.counts.calls += 1;
        let call = self.counts.calls;
        let triggered = match rule.trigger {
            Trigger::Always => true,
            Trigger::Nth(n) => call == n,
            Trigger::Every(n) => call.is_multiple_of(n.max(1)),
            // Drawn for every call, so that what other rules do leaves the draws as they are.
            Trigger::Rate { hits, out_of } => self.rng.chance(hits, out_of),
            Trigger::Burst { hits, out_of } => (call - 1) % out_of.max(1) < hits,
        };
        triggered
            && rule.calls.is_none_or(|(from, to)| (from..=to).contains(&call))
            && rule.times.is_none_or(|times| self.counts.fired < times)
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").field("plan", &self.0.plan).field("on", &self.is_on()).finish_non_exhaustive()
    }
}

//! One busy block: the values it may hold, and what is known of when.
//!
//! Stamps here are one more than outside, so that 0 is before everything.

use crate::classify::Content;
use crate::outcome::Outcome;
use crate::sector::{Generation, is_newer};
use crate::stamp::Stamp;

/// How many values that are no longer in flight a block remembers one by one.
pub(super) const VALUES_MAX: usize = 64;

/// How many alternative explanations of what was seen a block may have after one read.
const WORLDS_MAX: usize = 256;

/// With more worlds than this, a read that zeroes or unknown content explain is not held against them any more: it counts
/// as judged, and narrows nothing down.
pub(super) const WORLDS_MANY: usize = 64;

/// How much scratch is kept from one read to the next.
const SPARE_MAX: usize = 256;

/// Not yet, or never.
pub(super) const OPEN: Stamp = Stamp::MAX;

/// What a value looks like to a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Matter {
    Zero,
    Written(Generation),
    /// Anything may be read.
    Any,
    /// The values that were too many, as one.
    Blur,
}

/// One change of the block.
#[derive(Clone, Copy, Debug)]
struct Value {
    /// When its change began; of one that happens again, when it did so for the first time.
    began: Stamp,
    matter: Matter,
    in_flight: bool,
    /// It is another's change that may happen again.
    again: bool,
}

/// What one world says of a value: the zone of its cluster, which is its write and the reads that saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Zone {
    /// The first end in the cluster: the value was there no later than then.
    ended: Stamp,
    /// The last begin in the cluster: the value was there no earlier than then.
    began: Stamp,
    /// The least `ended` of those values that come after this one: no read that began later may see it.
    until: Stamp,
    /// Whether the value was ever there; otherwise it may have been.
    real: bool,
}

/// What the values that were too many were.
#[derive(Clone, Copy, Debug, Default)]
struct Blur {
    /// The oldest and the newest generation.
    written: Option<(Generation, Generation)>,
    zero: bool,
    any: bool,
}

/// No value that the block may hold explains a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unexplained;

/// How a read that is right was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Judged {
    /// With all that follows from it.
    Fully,
    /// There were more explanations than can be followed, so that nothing follows from it.
    Loosely,
}

/// What is to become of a block after a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sweep {
    /// It can hold nothing but this.
    Quiet(Content),
    /// There will be more to drop when the horizon moves on.
    Again,
    /// Nothing changes until something happens.
    Rest,
}

/// A block that something in flight changes, or that may hold one of several contents.
#[derive(Clone, Debug, Default)]
pub(super) struct Block {
    pub(super) number: u64,
    /// The newest generation that a write began with.
    pub(super) newest: Generation,
    /// Whether zeroes were ever to be there, the initial ones apart.
    pub(super) zeroed: bool,
    /// Whether it waits to be swept.
    pub(super) queued: bool,
    /// How many values explain more than one content.
    wild: u32,
    blur: Blur,
    values: Vec<Value>,
    /// As many as values for each world.
    zones: Vec<Zone>,
}

impl Value {
    /// Whether what it explains may have another explanation, or it explains more than one content.
    const fn is_wild(&self) -> bool {
        self.again || matches!(self.matter, Matter::Any | Matter::Blur)
    }
}

impl Matter {
    const fn new(content: Content) -> Self {
        match content {
            Content::Zero => Self::Zero,
            Content::Written(generation) => Self::Written(generation),
            Content::Unknown => Self::Any,
        }
    }

    const fn content(self) -> Content {
        match self {
            Self::Zero => Content::Zero,
            Self::Written(generation) => Content::Written(generation),
            Self::Any | Self::Blur => Content::Unknown,
        }
    }
}

impl Zone {
    /// A value that was there long ago, and may still be.
    const QUIET: Self = Self { ended: 0, began: 0, until: OPEN, real: true };

    /// Whether a read that began at `began` may see the value.
    #[inline]
    fn explains(&self, began: Stamp) -> bool {
        self.began.max(began) <= self.until
    }

    /// Whether only what comes later will have a say in it; then it is made to look as if it had always been so.
    #[inline]
    fn calm(&mut self, horizon: Stamp) -> bool {
        if self.until != OPEN || self.began >= horizon || self.ended >= horizon {
            return false;
        }
        *self = Self::QUIET;
        true
    }

    /// Whether nothing that is possible with `other` is impossible with this. What is dead at `horizon` permits nothing.
    fn permits_all_of(&self, other: &Self, horizon: Stamp) -> bool {
        other.until < horizon
            || self.ended >= other.ended
                && self.began <= other.began
                && self.until >= other.until
                && self.real <= other.real
    }
}

impl Blur {
    fn take_in(&mut self, matter: Matter) {
        match matter {
            Matter::Zero => self.zero = true,
            Matter::Any => self.any = true,
            Matter::Written(new) => {
                let (oldest, newest) = self.written.unwrap_or((new, new));
                let oldest = if is_newer(oldest, new) { new } else { oldest };
                self.written = Some((oldest, if is_newer(new, newest) { new } else { newest }));
            }
            Matter::Blur => {}
        }
    }

    fn explains(&self, seen: Content) -> bool {
        let written =
            |seen| self.written.is_some_and(|(oldest, newest)| !is_newer(oldest, seen) && !is_newer(seen, newest));
        self.any
            || match seen {
                Content::Zero => self.zero,
                Content::Written(generation) => written(generation),
                Content::Unknown => false,
            }
    }
}

/// Every value that was there before value `at` can be seen no longer than until that one was there.
#[inline]
fn kill_older(world: &mut [Zone], at: usize) {
    let by = world[at];
    for zone in &mut *world {
        if zone.ended < by.began {
            zone.until = zone.until.min(by.ended);
        }
    }
    world[at].until = by.until;
}

/// A read from `began` to `now` saw value `at`.
#[inline]
fn observe(world: &mut [Zone], at: usize, began: Stamp, now: Stamp) {
    let zone = &mut world[at];
    if zone.ended == OPEN {
        zone.ended = now;
    } else if zone.real && zone.began >= began {
        return;
    }
    zone.real = true;
    zone.began = zone.began.max(began);
    kill_older(world, at);
}

/// Whether it makes no difference, now or later, that a read that began at `began` saw value `at`.
fn is_moot(world: &[Zone], at: usize, began: Stamp) -> bool {
    let zone = world[at];
    // It matters to values that ended before the read began, unless they are known already to come before this one.
    let before = |other: &Zone| other.ended < began && other.until > zone.ended;
    zone.real
        && zone.ended != OPEN
        && (zone.began >= began || !world.iter().enumerate().any(|(index, other)| index != at && before(other)))
}

/// Drops the last of `worlds` if it permits nothing that another does not, and otherwise those it makes superfluous.
fn admit_last(worlds: &mut Vec<Zone>, values: usize, horizon: Stamp) {
    let mut last = worlds.len() - values;
    let covers =
        |one: &[Zone], other: &[Zone]| one.iter().zip(other).all(|(one, other)| one.permits_all_of(other, horizon));
    let (old, new) = worlds.split_at_mut(last);
    if old.chunks_exact(values).any(|old| covers(old, new)) {
        worlds.truncate(last);
        return;
    }
    let mut at = 0;
    while at < last {
        let (old, new) = worlds.split_at(last);
        if covers(&new[..values], &old[at..at + values]) {
            worlds.copy_within(last - values..last, at);
            worlds.copy_within(last..last + values, last - values);
            last -= values;
            worlds.truncate(last + values);
        } else {
            at += values;
        }
    }
}

impl Block {
    /// Makes it a block that holds one of `contents`.
    #[inline]
    pub(super) fn start(&mut self, number: u64, newest: Generation, zeroed: bool, contents: &[Content]) {
        (self.number, self.newest, self.zeroed, self.queued) = (number, newest, zeroed, false);
        (self.wild, self.blur) = (0, Blur::default());
        self.values.clear();
        self.zones.clear();
        for content in contents {
            self.note(*content);
            self.values.push(Value { began: 0, matter: Matter::new(*content), in_flight: false, again: false });
            self.zones.push(Zone::QUIET);
        }
    }

    /// Makes it no block at all, and gives back memory that few blocks need.
    #[inline]
    pub(super) fn stop(&mut self) {
        self.values.clear();
        self.zones.clear();
        self.queued = false;
        if self.values.capacity() > 8 {
            self.values = Vec::new();
        }
        if self.zones.capacity() > 8 {
            self.zones = Vec::new();
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.values.is_empty()
    }

    #[inline]
    fn note(&mut self, content: Content) {
        match content {
            Content::Zero => self.zeroed = true,
            Content::Written(generation) if is_newer(generation, self.newest) => self.newest = generation,
            Content::Written(_) => {}
            Content::Unknown => self.wild += 1,
        }
    }

    /// What began at `began` and is in flight may happen once more from `now` on.
    pub(super) fn repeat(&mut self, content: Content, began: Stamp, now: Stamp) {
        self.begin(content, now);
        if let Some(value) = self.values.last_mut() {
            (value.began, value.again) = (began, true);
        }
        self.count_wild();
    }

    #[inline]
    fn worlds(&self) -> usize {
        if self.zones.len() == self.values.len() { 1 } else { self.zones.len() / self.values.len() }
    }

    #[inline]
    pub(super) fn begin(&mut self, content: Content, now: Stamp) {
        let (worlds, values) = (self.worlds(), self.values.len());
        self.note(content);
        self.values.push(Value { began: now, matter: Matter::new(content), in_flight: true, again: false });
        let zone = Zone { ended: OPEN, began: now, until: OPEN, real: false };
        if worlds == 1 {
            self.zones.push(zone);
        } else {
            for world in (1..=worlds).rev() {
                self.zones.insert(world * values, zone);
            }
        }
    }

    /// Ends what began at `began`. Says how many values were too many, where `most` may be remembered one by one.
    ///
    /// # Panics
    /// When nothing that began then is in flight.
    #[inline]
    pub(super) fn end(&mut self, content: Content, began: Stamp, now: Stamp, outcome: Outcome, most: usize) -> u64 {
        let values = self.values.len();
        let at = self.values.iter().position(|value| value.began == began && value.in_flight && !value.again);
        let at = at.expect("a change that ends is in flight");
        for again in 0..values {
            if self.values[again].again && self.values[again].began == began && self.values[again].in_flight {
                self.values[again].in_flight = false;
                for world in self.zones.chunks_exact_mut(values) {
                    // By then it has happened, or it never will.
                    if world[again].ended == OPEN && outcome != Outcome::Unknown {
                        world[again].ended = now;
                    }
                }
            }
        }
        debug_assert_eq!(self.values[at].matter, Matter::new(content), "it ends as what it began as");
        self.values[at].in_flight = false;
        for world in self.zones.chunks_exact_mut(values) {
            let zone = &mut world[at];
            if zone.ended != OPEN || outcome == Outcome::Unknown {
                continue;
            }
            zone.ended = now;
            if outcome == Outcome::Done {
                zone.real = true;
                kill_older(world, at);
            }
        }
        if values > most { self.forget(most) } else { 0 }
    }

    /// Forgets one by one what is too much; what remains of it is one value that explains too much rather than too
    /// little: all the generations between, for as long as the last of them could be seen.
    #[cold]
    fn forget(&mut self, most: usize) -> u64 {
        let mut forgotten = 0;
        loop {
            let values = self.values.len();
            let ended = |at: &usize| !self.values[*at].in_flight && self.values[*at].matter != Matter::Blur;
            if (0..values).filter(ended).count() < most {
                return forgotten;
            }
            let until = |at: &usize| self.zones.chunks_exact(values).map(|world| world[*at].until).max();
            let Some(victim) = (0..values).filter(ended).min_by_key(until) else { return forgotten };
            let matter = self.values[victim].matter;
            self.blur.take_in(matter);
            let blur = self.values.iter().position(|value| value.matter == Matter::Blur);
            let into = blur.unwrap_or(victim);
            for world in self.zones.chunks_exact_mut(values) {
                let (one, other) = (world[into], world[victim]);
                let (ended, until) = (one.ended.max(other.ended), one.until.max(other.until));
                world[into] = Zone { ended, began: 0, until, real: false };
            }
            if into == victim {
                self.values[victim].matter = Matter::Blur;
            } else {
                self.remove(|at| at == victim);
            }
            self.count_wild();
            forgotten += 1;
        }
    }

    fn count_wild(&mut self) {
        self.wild = self.values.iter().filter(|value| value.is_wild()).count() as u32;
    }

    /// Removes values from all worlds.
    fn remove(&mut self, gone: impl Fn(usize) -> bool) {
        let values = self.values.len();
        let mut at = 0;
        self.zones.retain(|_| {
            at += 1;
            !gone((at - 1) % values)
        });
        let mut at = 0;
        self.values.retain(|_| {
            at += 1;
            !gone(at - 1)
        });
    }

    /// Whether value `at` may look like `seen`. `exact`: there is a value of just that generation.
    #[inline]
    fn may_be(&self, at: usize, seen: Content, exact: bool) -> bool {
        match self.values[at].matter {
            Matter::Zero => seen == Content::Zero,
            Matter::Written(generation) => seen == Content::Written(generation),
            Matter::Any => true,
            Matter::Blur => self.blur.any || !exact && self.blur.explains(seen),
        }
    }

    /// A read from `began` to `now` saw `seen`. `spare` is used for scratch.
    #[inline]
    pub(super) fn read(
        &mut self,
        seen: Content,
        (began, now): (Stamp, Stamp),
        horizon: Stamp,
        spare: &mut Vec<Zone>,
    ) -> Result<Judged, Unexplained> {
        let is_seen = |value: &Value| value.matter.content() == seen;
        if self.wild == 0
            && let Content::Written(_) = seen
            && self.zones.len() == self.values.len()
        {
            let at = self.values.iter().position(is_seen).ok_or(Unexplained)?;
            if !self.zones[at].explains(began) {
                return Err(Unexplained);
            }
            observe(&mut self.zones, at, began, now);
            return Ok(Judged::Fully);
        }
        let many = self.worlds() > WORLDS_MANY;
        if !many && self.branch(seen, (began, now), horizon, spare, false) {
            self.adopt(spare)?;
            return Ok(Judged::Fully);
        }
        // One world for each there was, at most.
        self.branch(seen, (began, now), horizon, spare, true);
        self.adopt(spare)?;
        Ok(Judged::Loosely)
    }

    fn adopt(&mut self, spare: &mut Vec<Zone>) -> Result<(), Unexplained> {
        if spare.is_empty() {
            return Err(Unexplained);
        }
        self.zones.clear();
        self.zones.extend_from_slice(spare);
        spare.shrink_to(SPARE_MAX);
        Ok(())
    }

    /// Follows every explanation of what was seen that could make a difference; of those that are `loose`, by zeroes or
    /// unknown content, none. Returns false when there are too many.
    #[cold]
    fn branch(
        &mut self,
        seen: Content,
        (began, now): (Stamp, Stamp),
        horizon: Stamp,
        spare: &mut Vec<Zone>,
        loose: bool,
    ) -> bool {
        let values = self.values.len();
        let exact = self.is_exact(seen);
        spare.clear();
        for world in self.zones.chunks_exact(values) {
            for at in 0..values {
                if !self.may_be(at, seen, exact) || !world[at].explains(began) {
                    continue;
                }
                let vague = self.values[at].again || matches!(self.values[at].matter, Matter::Any | Matter::Zero);
                let blur = self.values[at].matter == Matter::Blur;
                if blur || loose && vague || is_moot(world, at, began) {
                    // What permits everything that the others do makes them superfluous.
                    spare.extend_from_slice(world);
                    admit_last(spare, values, horizon);
                    break;
                }
                let branch = spare.len();
                spare.extend_from_slice(world);
                observe(&mut spare[branch..], at, began, now);
                admit_last(spare, values, horizon);
            }
            if !loose && spare.len() > WORLDS_MAX * values {
                return false;
            }
        }
        true
    }

    /// Whether `seen` is a generation that is remembered, and therefore none of those that are not.
    fn is_exact(&self, seen: Content) -> bool {
        matches!(seen, Content::Written(_)) && self.values.iter().any(|value| value.matter == Matter::new(seen))
    }

    /// What a read that began at `began` and ends now may return.
    pub(super) fn candidates(&self, began: Stamp) -> Vec<Content> {
        let mut contents = Vec::new();
        for world in self.zones.chunks_exact(self.values.len()) {
            for (value, zone) in self.values.iter().zip(world) {
                let content = value.matter.content();
                if zone.explains(began) && !contents.contains(&content) {
                    contents.push(content);
                }
            }
        }
        contents
    }

    /// Forgets what no read that begins at `horizon` or later can tell.
    #[inline]
    pub(super) fn sweep(&mut self, horizon: Stamp) -> Sweep {
        let worlds = self.worlds();
        if worlds == 1 {
            let (mut kept, mut zero, mut any) = (0, false, false);
            for at in 0..self.values.len() {
                let (value, mut zone) = (self.values[at], self.zones[at]);
                if zone.until < horizon {
                    self.wild -= u32::from(value.is_wild());
                    continue;
                }
                if zone.calm(horizon) && !value.in_flight {
                    let twin = match value.matter {
                        Matter::Zero => Some(&mut zero),
                        Matter::Any => Some(&mut any),
                        Matter::Written(_) | Matter::Blur => None,
                    };
                    if twin.is_some_and(|twin| std::mem::replace(twin, true)) {
                        self.wild -= u32::from(value.is_wild());
                        continue;
                    }
                }
                self.values[kept] = value;
                self.zones[kept] = zone;
                kept += 1;
            }
            self.values.truncate(kept);
            self.zones.truncate(kept);
        } else {
            self.sweep_worlds(horizon);
        }
        if let ([value], [zone]) = (&self.values[..], &self.zones[..])
            && !value.in_flight
            && zone.ended != OPEN
            && value.matter != Matter::Blur
        {
            return Sweep::Quiet(value.matter.content());
        }
        let values = self.values.iter().cycle();
        let more = |(value, zone): (&Value, &Zone)| {
            let recent = |stamp| stamp >= horizon && stamp != OPEN;
            !value.in_flight && (recent(zone.ended) || recent(zone.began)) || recent(zone.until)
        };
        if values.zip(&self.zones).any(more) { Sweep::Again } else { Sweep::Rest }
    }

    #[cold]
    fn sweep_worlds(&mut self, horizon: Stamp) {
        let values = self.values.len();
        for world in self.zones.chunks_exact_mut(values) {
            for (zone, value) in world.iter_mut().zip(&self.values) {
                if !value.in_flight {
                    zone.calm(horizon);
                }
            }
            // Which of several values that look the same is which makes no difference once they have ended.
            for matter in [Matter::Zero, Matter::Any] {
                let same = |at: &usize| self.values[*at].matter == matter && !self.values[*at].in_flight;
                let mut zones: Vec<Zone> = (0..values).filter(same).map(|at| world[at]).collect();
                zones.sort_by_key(|zone| (std::cmp::Reverse(zone.until), zone.ended, zone.began, zone.real));
                let mut quiet = false;
                for (at, mut zone) in (0..values).filter(same).zip(zones) {
                    if zone == Zone::QUIET && std::mem::replace(&mut quiet, true) {
                        zone.until = 0;
                    }
                    world[at] = zone;
                }
            }
        }
        let worlds = std::mem::take(&mut self.zones);
        for world in worlds.chunks_exact(values) {
            self.zones.extend_from_slice(world);
            admit_last(&mut self.zones, values, horizon);
        }
        let dead: Vec<bool> =
            (0..values).map(|at| self.zones.chunks_exact(values).all(|world| world[at].until < horizon)).collect();
        self.remove(|at| dead[at]);
        self.count_wild();
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.values.capacity() * size_of::<Value>() + self.zones.capacity() * size_of::<Zone>()
    }
}

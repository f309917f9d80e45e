//! One block of which more than one content may survive, or that something in flight touches.

use super::cell::Cell;
use super::lump::Lump;
use crate::classify::Content;
use crate::outcome::Outcome;
use crate::stamp::Stamp;

/// The most versions of a block that are remembered one by one, not counting those in flight.
pub(super) const REMEMBERED: usize = 64;

/// The end of what has not ended.
pub(super) const NEVER: Stamp = Stamp::MAX;

/// How far a version has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It began.
    InFlight,
    /// It may take effect at any time.
    Lost,
    /// It was acknowledged; a flush that is submitted from now on makes it durable.
    Acknowledged,
    /// Nothing that happens makes it any more durable than it is: it failed, or it is durable, or it was there at first.
    Fixed,
}

/// One content that the block was given.
#[derive(Clone, Copy, Debug)]
struct Version {
    began: Stamp,
    /// 0 for what was there at first.
    ended: Stamp,
    content: Cell,
    fate: Fate,
}

/// Versions that are not remembered one by one.
#[derive(Clone, Debug, Default)]
struct Lumps {
    ended: Lump,
    /// Those whose outcome is not known. They are kept apart because no durable change ever rules them out.
    lost: Lump,
}

/// The versions of one block.
#[derive(Clone, Debug, Default)]
pub(super) struct Slot {
    pub(super) block: u64,
    /// Whether the queue of slots to look at again has it.
    pub(super) queued: bool,
    /// The greatest beginning of a durable change; what ended before it is gone. 0 if there is none.
    floor: Stamp,
    /// The flushes that are accounted for: the greatest beginning of one.
    flushed: Stamp,
    /// In the order in which they began. Empty when the slot is free.
    versions: Vec<Version>,
    lumps: Option<Box<Lumps>>,
}

impl Slot {
    pub(super) fn occupy(&mut self, block: u64, base: Content, flushed: Stamp) {
        (self.block, self.floor, self.flushed) = (block, 0, flushed);
        self.versions.push(Version::base(base));
    }

    pub(super) fn vacate(&mut self) {
        self.versions.clear();
        self.versions.shrink_to(REMEMBERED / 8);
        self.lumps = None;
    }

    #[inline]
    pub(super) const fn is_free(&self) -> bool {
        self.versions.is_empty()
    }

    pub(super) fn begin(&mut self, content: Content, now: Stamp) {
        if self.versions.len() >= REMEMBERED {
            self.collapse();
        }
        self.versions.push(Version { began: now, ended: NEVER, content: Cell::new(content), fate: Fate::InFlight });
    }

    /// The change that began at `began` ended; says whether the next flush makes a difference to it.
    pub(super) fn end(&mut self, began: Stamp, now: Stamp, outcome: Outcome, durable: bool) -> bool {
        let Some(version) = self.versions.iter_mut().rev().find(|version| version.began == began) else {
            return false;
        };
        (version.ended, version.fate) = match outcome {
            Outcome::Unknown => (NEVER, Fate::Lost),
            Outcome::Failed => (now, Fate::Fixed),
            Outcome::Done if durable => (now, Fate::Fixed),
            Outcome::Done => (now, Fate::Acknowledged),
        };
        if outcome == Outcome::Done && durable && began > self.floor {
            self.floor = began;
            self.prune();
        }
        outcome == Outcome::Done && !durable
    }

    /// Accounts for the flushes up to the one that began at `flushed`.
    #[inline]
    pub(super) fn refresh(&mut self, flushed: Stamp) {
        if self.flushed == flushed {
            return;
        }
        self.flushed = flushed;
        let floor = self.floor;
        for version in &mut self.versions {
            if version.is_durable_by(flushed) {
                version.fate = Fate::Fixed;
                self.floor = self.floor.max(version.began);
            }
        }
        if self.floor != floor {
            self.prune();
        }
    }

    /// Forgets what ended before a durable change began.
    fn prune(&mut self) {
        let floor = self.floor;
        self.versions.retain(|version| version.ended >= floor);
        if let Some(lumps) = &mut self.lumps
            && lumps.ended.ended() < floor
        {
            lumps.ended = Lump::default();
        }
        self.drop_empty_lumps();
    }

    /// Lumps the older half of what has ended.
    #[cold]
    fn collapse(&mut self) {
        let lumps = self.lumps.get_or_insert_default();
        let mut rest = self.versions.len() - REMEMBERED / 2;
        self.versions.retain(|version| {
            let lumped = rest > 0 && version.fate != Fate::InFlight;
            rest -= usize::from(lumped);
            match version.fate {
                _ if !lumped => {}
                Fate::Lost => lumps.lost.add(version.content(), NEVER),
                _ => lumps.ended.add(version.content(), version.ended),
            }
            !lumped
        });
        self.drop_empty_lumps();
    }

    /// The content, if there is only one and nothing is in flight.
    #[inline]
    pub(super) fn settled(&self) -> Option<Cell> {
        let first = self.versions.first()?.content;
        let one = self.lumps.is_none() && self.versions.iter().all(|v| v.content == first && v.ended != NEVER);
        one.then_some(first)
    }

    /// When the last version ended of those that the next flush makes durable.
    pub(super) fn awaits_flush(&self) -> Option<Stamp> {
        let waiting = self.versions.iter().filter(|version| version.fate == Fate::Acknowledged);
        waiting.map(|version| version.ended).max()
    }

    /// What may survive, given the flushes up to the one that began at `flushed`: the oldest first, each content once.
    pub(super) fn contents(&self, flushed: Stamp) -> Vec<Content> {
        let floor = self.floor_at(flushed);
        let mut contents = Vec::new();
        self.live_lumps(floor).for_each(|lump| lump.list(&mut contents));
        for version in self.versions.iter().filter(|version| version.ended >= floor) {
            let content = version.content();
            if !contents.contains(&content) {
                contents.push(content);
            }
        }
        contents
    }

    /// Whether `seen` may survive.
    pub(super) fn allows(&self, seen: Content, flushed: Stamp) -> bool {
        let floor = self.floor_at(flushed);
        let mut live = self.versions.iter().filter(|version| version.ended >= floor);
        live.any(|version| version.allows(seen)) || self.live_lumps(floor).any(|lump| lump.allows(seen))
    }

    /// [`refresh`](Self::refresh) without changing anything.
    fn floor_at(&self, flushed: Stamp) -> Stamp {
        let durable = self.versions.iter().filter(|version| version.is_durable_by(flushed));
        durable.map(|version| version.began).max().unwrap_or(0).max(self.floor)
    }

    fn live_lumps(&self, floor: Stamp) -> impl Iterator<Item = &Lump> {
        let lumps = self.lumps.iter().flat_map(|lumps| [&lumps.ended, &lumps.lost]);
        lumps.filter(move |lump| !lump.is_empty() && lump.ended() >= floor)
    }

    /// The power is cut: whatever may survive is what is there at first from now on.
    pub(super) fn cut(&mut self) {
        let mut base: Vec<Version> = Vec::with_capacity(self.versions.len());
        for version in &self.versions {
            if !base.iter().any(|other| other.content == version.content) {
                base.push(Version::base(version.content()));
            }
        }
        self.versions = base;
        self.floor = 0;
        if let Some(lumps) = &mut self.lumps {
            let Lumps { mut ended, lost } = std::mem::take(&mut **lumps);
            ended.absorb(&lost, 0);
            lumps.ended = ended;
        }
    }

    /// A read saw `seen`. If that was there at first, nothing else that was there at first is possible any more.
    pub(super) fn settle(&mut self, seen: Content) {
        let is_base = |version: &Version| version.ended == 0;
        let base_lump = |lump: &Lump| !lump.is_empty() && lump.ended() == 0;
        let (bases, since): (Vec<Version>, Vec<Version>) = self.versions.iter().copied().partition(is_base);
        let (base_lumps, lumps_since): (Vec<&Lump>, Vec<&Lump>) =
            self.live_lumps(0).partition(|lump| base_lump(lump));
        let allowed_since = since.iter().any(|v| v.allows(seen)) || lumps_since.iter().any(|lump| lump.allows(seen));
        if allowed_since {
            return;
        }
        let allowed = |seen| bases.iter().any(|v| v.allows(seen)) || base_lumps.iter().any(|lump| lump.allows(seen));
        let untouched = since.is_empty() && lumps_since.is_empty();
        if !allowed(seen) && !untouched {
            return;
        }
        // Where nothing is promised, the next read may see something else.
        let base = Version::base(if allowed(Content::Unknown) { Content::Unknown } else { seen });
        self.versions = std::iter::once(base).chain(since).collect();
        if let Some(lumps) = &mut self.lumps
            && base_lump(&lumps.ended)
        {
            lumps.ended = Lump::default();
        }
        self.drop_empty_lumps();
    }

    fn drop_empty_lumps(&mut self) {
        self.lumps.take_if(|lumps| lumps.ended.is_empty() && lumps.lost.is_empty());
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let lumps = self.lumps.as_ref().map_or(0, |_| size_of::<Lumps>());
        size_of::<Self>() + self.versions.capacity() * size_of::<Version>() + lumps
    }
}

impl Version {
    const fn base(content: Content) -> Self {
        Self { began: 0, ended: 0, content: Cell::new(content), fate: Fate::Fixed }
    }

    #[inline]
    fn content(&self) -> Content {
        self.content.content().unwrap_or(Content::Unknown)
    }

    /// Whether a block that holds this version may show `seen`.
    fn allows(&self, seen: Content) -> bool {
        super::shows(self.content(), seen)
    }

    /// Whether a flush that began at `flushed` and succeeded made it durable.
    #[inline]
    fn is_durable_by(&self, flushed: Stamp) -> bool {
        self.fate == Fate::Acknowledged && self.ended < flushed
    }
}

//! A device with a volatile cache, run in every way it may behave.
//!
//! Nothing here compares intervals. The model is told what happens, event by event, and keeps every state that one block
//! of an obedient device may be in: which changes took effect in which order, and how far the medium has got at
//! least. A change takes effect at any one moment while it is in flight; the medium goes through the same contents in
//! the same order, some time later.

use crate::classify::Content;
use crate::outcome::Outcome;

/// The most changes of one history.
pub(super) const CHANGES: usize = 8;

/// What one block has been through, in one way of behaving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    /// The contents from the oldest that the medium may hold to the newest: changes by number, or `BASE`.
    log: [u8; CHANGES + 1],
    len: u8,
    /// The changes that took effect, a bit for each.
    applied: u8,
    /// What `BASE` stands for: a change by number, or `BASE` itself for what was there at the very first.
    base: u8,
}

const BASE: u8 = CHANGES as u8;

/// Every state that one block may be in.
#[derive(Clone, Debug)]
pub(super) struct Model {
    volatile_cache: bool,
    /// The contents of the changes, and last of all what was there at the very first.
    contents: [Content; CHANGES + 1],
    /// Those that may take effect now.
    able: u8,
    acknowledged: u8,
    states: Vec<State>,
    /// Whether the states are there already that come of what may take effect now.
    complete: bool,
}

impl State {
    const fn of_base(base: u8) -> Self {
        Self { log: [BASE; CHANGES + 1], len: 1, applied: 0, base }
    }

    fn log(&self) -> &[u8] {
        &self.log[..usize::from(self.len)]
    }

    /// The change, or `BASE`, as the source of a content.
    fn source(&self, entry: u8) -> u8 {
        if entry == BASE { self.base } else { entry }
    }

    fn apply(mut self, change: u8) -> Self {
        self.log[usize::from(self.len)] = change;
        self.len += 1;
        self.applied |= 1 << change;
        self
    }

    /// The medium has got to the last of `changes` that took effect, if it was not further yet.
    fn persist(&mut self, changes: u8) {
        let reached = self.log().iter().rposition(|entry| *entry != BASE && changes >> entry & 1 == 1).unwrap_or(0);
        let rest = self.len - reached as u8;
        self.log.copy_within(reached.., 0);
        self.log[usize::from(rest)..].fill(BASE);
        self.len = rest;
    }
}

impl Model {
    pub(super) fn new(initial: Content, volatile_cache: bool) -> Self {
        let contents = [initial; CHANGES + 1];
        Self {
            volatile_cache,
            contents,
            able: 0,
            acknowledged: 0,
            states: vec![State::of_base(BASE)],
            complete: true,
        }
    }

    /// Changes that may still take effect.
    pub(super) fn able(&self) -> u32 {
        self.able.count_ones()
    }

    pub(super) fn begin(&mut self, change: u8, content: Content) {
        self.contents[usize::from(change)] = content;
        self.able |= 1 << change;
        self.complete = false;
    }

    pub(super) fn end(&mut self, change: u8, outcome: Outcome, through: bool) {
        if self.able >> change & 1 == 0 || outcome == Outcome::Unknown {
            return;
        }
        self.run();
        self.able &= !(1 << change);
        if outcome == Outcome::Done {
            self.states.retain(|state| state.applied >> change & 1 == 1);
            self.acknowledged |= 1 << change;
            if through || !self.volatile_cache {
                self.persist(1 << change);
            }
        }
    }

    /// What a flush that is submitted now has to make durable.
    pub(super) const fn submit_flush(&self) -> u8 {
        self.acknowledged
    }

    /// The flush that was submitted with `covered` succeeded.
    pub(super) fn flushed(&mut self, covered: u8) {
        self.persist(covered & self.acknowledged);
    }

    /// What a power cut now may leave.
    pub(super) fn survivors(&mut self) -> Vec<Content> {
        self.run();
        let mut contents = Vec::new();
        for state in &self.states {
            for entry in state.log() {
                let content = self.contents[usize::from(state.source(*entry))];
                if !contents.contains(&content) {
                    contents.push(content);
                }
            }
        }
        contents
    }

    pub(super) fn power_cut(&mut self) {
        self.run();
        let left = self.states.iter().flat_map(|state| state.log().iter().map(|entry| state.source(*entry)));
        self.states = left.map(State::of_base).collect();
        self.unite();
        self.able = 0;
        self.acknowledged = 0;
    }

    /// What a read that is over in no time may return now.
    pub(super) fn readable(&mut self) -> Vec<Content> {
        self.run();
        self.states.iter().map(|state| self.content_now(state)).collect()
    }

    /// Such a read returned `seen`. What holds anything explains it as well as what holds `seen`, and allows more.
    pub(super) fn read(&mut self, seen: Content) {
        self.run();
        let states = std::mem::take(&mut self.states);
        let showing = |content| states.iter().copied().filter(|s| self.content_now(s) == content).collect();
        let (seen, anything): (Vec<_>, Vec<_>) = (showing(seen), showing(Content::Unknown));
        self.states = if anything.is_empty() { seen } else { anything };
        // What is in flight may take effect right after the read.
        self.complete = false;
    }

    fn content_now(&self, state: &State) -> Content {
        let last = state.log()[state.log().len() - 1];
        self.contents[usize::from(state.source(last))]
    }

    /// Lets any of the changes in flight take effect, in any order, or not yet.
    fn run(&mut self) {
        if std::mem::replace(&mut self.complete, true) {
            return;
        }
        let mut at = 0;
        while let Some(state) = self.states.get(at).copied() {
            let able = (0..CHANGES as u8).filter(|change| self.able & !state.applied & 1 << change != 0);
            self.states.extend(able.map(|change| state.apply(change)));
            at += 1;
        }
        self.unite();
    }

    fn persist(&mut self, changes: u8) {
        self.states.iter_mut().for_each(|state| state.persist(changes));
        self.unite();
    }

    fn unite(&mut self) {
        self.states.sort_unstable();
        self.states.dedup();
    }
}

//! What survives a power cut: against an enumerated device, and rule by rule.

mod bounds;
mod histories;
mod model;
mod rules;

use super::Durable;
use crate::classify::Content::{self, Written as W};
use crate::outcome::Outcome;
use crate::stamp::Stamp;

/// One block, and the time.
struct Device {
    durable: Durable,
    now: Stamp,
}

impl Device {
    fn new(initial: Content, volatile_cache: bool) -> Self {
        Self { durable: Durable::new(1, initial, volatile_cache), now: 0 }
    }

    fn tick(&mut self) -> Stamp {
        self.now += 1;
        self.now
    }

    fn begin(&mut self, content: Content) -> Stamp {
        let now = self.tick();
        self.durable.begin_change(0..1, |_| content, now);
        now
    }

    fn end(&mut self, began: Stamp, outcome: Outcome, through: bool) {
        let now = self.tick();
        self.durable.end_change(0..1, began, now, outcome, through);
    }

    fn change(&mut self, content: Content, outcome: Outcome) {
        let began = self.begin(content);
        self.end(began, outcome, false);
    }

    fn flush(&mut self) {
        let began = self.tick();
        self.tick();
        self.durable.flush_done(began);
    }

    fn survivors(&self) -> Vec<Content> {
        self.durable.survivors(0)
    }

    /// What the cut told of the block.
    fn cut(&mut self) -> Vec<Content> {
        let now = self.tick();
        let mut left = Vec::new();
        self.durable.power_cut(now, |_, contents| left = contents.to_vec());
        left
    }
}

//! Evidence: what a run did, and how little of it would prove nothing.

use std::collections::BTreeMap;
use std::fmt;

/// Named counters with the minimums that make a run meaningful.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    counters: BTreeMap<String, Counter>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counter {
    count: u64,
    minimum: u64,
}

/// A minimum that was not reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortfall {
    /// The counter.
    pub name: String,
    /// What it came to.
    pub count: u64,
    /// What it had to come to.
    pub minimum: u64,
}

/// A run did too little to prove anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vacuous {
    /// Every minimum that was not reached, by name.
    pub missed: Vec<Shortfall>,
}

impl Evidence {
    /// No counters yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// States that the run is vacuous unless `name` comes to at least `minimum`.
    ///
    /// Stated twice, the higher minimum counts.
    pub fn require(&mut self, name: &str, minimum: u64) {
        let counter = self.counter(name);
        counter.minimum = counter.minimum.max(minimum);
    }

    /// Adds `count` to `name`.
    pub fn add(&mut self, name: &str, count: u64) {
        let counter = self.counter(name);
        counter.count = counter.count.saturating_add(count);
    }

    /// What `name` came to; 0 when it was never mentioned.
    #[must_use]
    pub fn count(&self, name: &str) -> u64 {
        self.counters.get(name).map_or(0, |counter| counter.count)
    }

    /// Adds the counts of `other`, and takes over its minimums.
    pub fn merge(&mut self, other: &Self) {
        for (name, counter) in &other.counters {
            self.add(name, counter.count);
            self.require(name, counter.minimum);
        }
    }

    /// Every counter by name.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<String, u64> {
        self.counters.iter().map(|(name, counter)| (name.clone(), counter.count)).collect()
    }

    /// Whether the work done reaches every stated minimum.
    ///
    /// # Errors
    /// Each minimum that was missed. Evidence without any minimum is vacuous too: nothing was asked of it.
    pub fn judge(&self) -> Result<(), Vacuous> {
        let missed: Vec<_> = self
            .counters
            .iter()
            .filter(|(_, counter)| counter.count < counter.minimum)
            .map(|(name, counter)| Shortfall { name: name.clone(), count: counter.count, minimum: counter.minimum })
            .collect();
        let asked = self.counters.values().any(|counter| counter.minimum > 0);
        if asked && missed.is_empty() { Ok(()) } else { Err(Vacuous { missed }) }
    }

    fn counter(&mut self, name: &str) -> &mut Counter {
        self.counters.entry(name.to_owned()).or_default()
    }
}

impl fmt::Display for Vacuous {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.missed.is_empty() {
            return f.write_str("no minimum of work was stated");
        }
        for (at, Shortfall { name, count, minimum }) in self.missed.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{name}: {count} of at least {minimum}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Vacuous {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_minimum_is_named() {
        let mut evidence = Evidence::new();
        evidence.require("writes", 100);
        evidence.require("reads", 1);
        evidence.add("writes", 99);
        evidence.add("reads", 5);
        let vacuous = evidence.judge().expect_err("too little");
        assert_eq!(vacuous.to_string(), "writes: 99 of at least 100");
        evidence.add("writes", 1);
        assert_eq!(evidence.judge(), Ok(()));
    }

    #[test]
    fn nothing_asked_is_vacuous() {
        let mut evidence = Evidence::new();
        evidence.add("reads", 5);
        assert_eq!(evidence.judge().expect_err("too little").to_string(), "no minimum of work was stated");
    }

    #[test]
    fn merging_adds_counts_and_keeps_the_higher_minimum() {
        let mut whole = Evidence::new();
        whole.require("ops", 10);
        let mut worker = Evidence::new();
        worker.add("ops", 6);
        worker.require("ops", 3);
        whole.merge(&worker);
        assert!(whole.judge().is_err());
        whole.merge(&worker);
        assert_eq!(whole.judge(), Ok(()));
        assert_eq!(whole.counts()["ops"], 12);
    }
}

//! A reporter that keeps every event, for tests.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::Reporter;
use crate::event::Event;

/// Keeps every event.
#[derive(Debug, Default)]
pub struct Collector {
    events: Collected,
}

/// The events a [`Collector`] keeps.
#[derive(Clone, Debug, Default)]
pub struct Collected(Arc<Mutex<Vec<Event>>>);

impl Collector {
    /// A collector, and the events it will keep.
    #[must_use]
    pub fn new() -> (Self, Collected) {
        let collector = Self::default();
        let events = collector.events.clone();
        (collector, events)
    }
}

impl Collected {
    /// The events so far.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Reporter for Collector {
    fn report(&mut self, event: &Event) -> io::Result<()> {
        self.events.0.lock().unwrap_or_else(PoisonError::into_inner).push(event.clone());
        Ok(())
    }
}

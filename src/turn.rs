//! Who in this process serves a device: the driver knows servers by their process alone.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// How many turns each device has had, by its id.
static TURNS: Mutex<BTreeMap<u32, u64>> = Mutex::new(BTreeMap::new());

/// A server's turn at a device. It is over when a later one of the same device begins in this process.
#[derive(Debug)]
pub(crate) struct Turn {
    id: u32,
    number: u64,
}

impl Turn {
    pub(crate) fn take(id: u32) -> Self {
        let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
        let number = turns.entry(id).or_default();
        *number += 1;
        Self { id, number: *number }
    }

    pub(crate) fn is_over(&self) -> bool {
        let turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
        turns.get(&self.id).is_some_and(|last| *last != self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_over_when_the_next_begins() {
        // Ids that no device has.
        let (first, elsewhere) = (Turn::take(u32::MAX), Turn::take(u32::MAX - 1));
        assert!(!first.is_over());
        let second = Turn::take(u32::MAX);
        assert!(first.is_over() && !second.is_over() && !elsewhere.is_over());
    }
}

//! Whose turn it is: the actions of a script begin in its order, whichever thread does them.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Whose turn it is, and who has how much in flight.
#[derive(Debug)]
pub(crate) struct Turns {
    /// Whose each action is; nobody's, for those that are no worker's.
    owners: Vec<Option<u32>>,
    state: Mutex<State>,
    /// One for each worker, and the last for whoever does what is no worker's: nobody is woken up for another one's turn.
    changed: Vec<Condvar>,
}

#[derive(Debug)]
struct State {
    /// The number of the action that may begin.
    next: usize,
    in_flight: Vec<u32>,
}

impl Turns {
    /// Actions of `workers` workers, in their order. Action 0 comes first.
    pub(crate) fn new(workers: u32, owners: Vec<Option<u32>>) -> Self {
        let state = State { next: 0, in_flight: vec![0; workers as usize] };
        Self { owners, state: Mutex::new(state), changed: (0..=workers).map(|_| Condvar::new()).collect() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the owner of action `number` waits.
    fn place(&self, number: usize) -> &Condvar {
        let owner = self.owners.get(number).copied().flatten();
        &self.changed[owner.map_or(self.changed.len() - 1, |worker| worker as usize)]
    }

    fn wait_until(&self, number: usize, patience: Duration, is: impl Fn(&State) -> bool) -> bool {
        let waited = self.place(number).wait_timeout_while(self.state(), patience, |state| !is(state));
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        is(&state)
    }

    /// Waits for `patience` at most until action `number` may begin. Says whether it may.
    pub(crate) fn wait(&self, number: usize, patience: Duration) -> bool {
        self.wait_until(number, patience, |state| state.next == number)
    }

    /// As [`wait`](Self::wait), and until nobody has anything in flight.
    pub(crate) fn wait_alone(&self, number: usize, patience: Duration) -> bool {
        let alone = |state: &State| state.next == number && state.in_flight.iter().all(|count| *count == 0);
        self.wait_until(number, patience, alone)
    }

    fn go_on(&self, state: &mut State) {
        state.next += 1;
        self.place(state.next).notify_one();
    }

    /// The action whose turn it is has begun, and its worker has so much in flight now.
    pub(crate) fn pass(&self, worker: u32, in_flight: u32) {
        let mut state = self.state();
        state.in_flight[worker as usize] = in_flight;
        self.go_on(&mut state);
    }

    /// The action whose turn it is, which is no worker's, is done.
    pub(crate) fn done(&self) {
        self.go_on(&mut self.state());
    }

    /// A worker has so much in flight now.
    pub(crate) fn has_in_flight(&self, worker: u32, in_flight: u32) {
        let mut state = self.state();
        let before = std::mem::replace(&mut state.in_flight[worker as usize], in_flight);
        if before != in_flight && in_flight == 0 {
            self.place(state.next).notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(5);

    #[test]
    fn actions_begin_in_order_whoever_does_them() {
        let turns = Turns::new(3, (0..30).map(|number| Some(number % 3)).collect());
        let begun = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for worker in 0..3 {
                let (turns, begun) = (&turns, &begun);
                scope.spawn(move || {
                    for number in (worker as usize..30).step_by(3) {
                        assert!(turns.wait(number, LONG));
                        begun.lock().expect("nobody panics").push(number);
                        turns.pass(worker, 0);
                    }
                });
            }
        });
        assert_eq!(begun.into_inner().expect("nobody panics"), (0..30).collect::<Vec<_>>());
    }

    #[test]
    fn who_wants_to_be_alone_waits_for_what_is_in_flight() {
        let turns = Turns::new(2, vec![Some(1), None, Some(0)]);
        assert!(!turns.wait(1, SHORT), "it is another one's turn");
        turns.pass(1, 2);
        assert!(turns.wait(1, SHORT) && !turns.wait_alone(1, SHORT));
        turns.has_in_flight(1, 1);
        assert!(!turns.wait_alone(1, SHORT));
        turns.has_in_flight(1, 0);
        assert!(turns.wait_alone(1, SHORT));
        turns.done();
        assert!(turns.wait(2, SHORT));
    }
}

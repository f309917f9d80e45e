//! Many callers close the same device at the same moment, while other devices are started and closed beside it.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use ublkit::backends::Memory;
use ublkit::{Closed, Deletion, Device, WriteFlags};
use ublkit_harness::{Pattern, Seed};

use super::cycle::{BLOCK, DEVICE_BYTES, await_one, open_client};
use super::protocol::{Concurred, ConcurrentOrder, Plant, Report, Trouble};
use super::worker::say;
use crate::runner::no_thread;
use crate::sysfs::CharDir;

/// How long closing waits for whoever looks at a new disk.
const DELETE_DEADLINE: Duration = Duration::from_secs(30);

/// A device that will be closed by everybody at once.
struct Contended {
    device: Device,
    /// In sysfs: not used again, unlike the id.
    inode: Option<u64>,
    /// For what is planted: somebody closes already.
    closing: AtomicBool,
}

impl Contended {
    fn start(seed: Seed) -> Result<Self, Trouble> {
        let device = Device::builder(Memory::new(DEVICE_BYTES)).depth(8).delete_deadline(DELETE_DEADLINE).start()?;
        let id = device.id();
        say(&Report::Made { id });
        let contended = Self { inode: CharDir::of(id).inode(), device, closing: AtomicBool::new(false) };
        contended.try_io(seed)?;
        Ok(contended)
    }

    /// What is written is what another opening reads, at the beginning and at the end.
    fn try_io(&self, seed: Seed) -> Result<(), Trouble> {
        let pattern = Pattern::new(seed, self.device.id());
        let mut expected = vec![0; BLOCK];
        for offset in [0, DEVICE_BYTES - BLOCK as u64] {
            let first_lba = offset / 512;
            let mut client = open_client(&self.device.path())?;
            pattern.fill(&mut expected, first_lba, |_| 1);
            client.buffer_mut(0)[..BLOCK].copy_from_slice(&expected);
            client.write(0, offset, BLOCK, WriteFlags::NONE);
            await_one(&mut client, "write")?;
            drop(client);
            let mut client = open_client(&self.device.path())?;
            client.read(0, offset, BLOCK);
            await_one(&mut client, "read")?;
            if client.buffer(0)[..BLOCK] != expected[..] {
                let what = format!("device {}: what was written at {offset} is not there", self.device.id());
                return Err(Trouble::broke("content", what));
            }
        }
        Ok(())
    }

    /// Closes it as a caller does.
    fn close(&self, plant: Option<Plant>) -> Answer {
        let first = !self.closing.swap(true, Ordering::SeqCst);
        let told = match plant {
            Some(Plant::EarlyAnswer) if !first => "closed".to_owned(),
            _ => match self.device.close() {
                Ok(Closed { deletion: Deletion::Complete, .. }) => "closed".to_owned(),
                Ok(deferred) => deferred.to_string(),
                Err(error) => format!("failed to {error}"),
            },
        };
        let there = self.inode.is_some() && CharDir::of(self.device.id()).inode() == self.inode;
        let told = if plant == Some(Plant::SplitAnswer) && !first { "closed already".to_owned() } else { told };
        Answer { there: told == "closed" && there, told }
    }
}

/// What one caller was told.
#[derive(Clone, Debug)]
struct Answer {
    told: String,
    /// It was told that the device is gone, and it is not.
    there: bool,
}

/// Lets threads go at the same moment, or sends them away: unlike a barrier, without the number that there is to be being
/// known to those who wait, and with a way out if they do not become as many.
#[derive(Debug, Default)]
struct StartSignal {
    state: Mutex<StartState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct StartState {
    waiting: usize,
    /// Whether they are to go, once that is decided.
    go: Option<bool>,
}

impl StartSignal {
    /// Waits for the decision: whether to go.
    fn wait(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting += 1;
        self.changed.notify_all();
        loop {
            match state.go {
                Some(go) => return go,
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Lets them go as soon as so many wait.
    fn go(&self, threads: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.waiting < threads {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.decide(state, true);
    }

    fn decide(&self, mut state: MutexGuard<'_, StartState>, go: bool) {
        state.go.get_or_insert(go);
        drop(state);
        self.changed.notify_all();
    }

    /// When what this returns is dropped, those who have not been let go are sent away.
    fn abort_at_end(&self) -> AbortAtEnd<'_> {
        AbortAtEnd(self)
    }
}

struct AbortAtEnd<'a>(&'a StartSignal);

impl Drop for AbortAtEnd<'_> {
    fn drop(&mut self) {
        self.0.decide(self.0.state.lock().unwrap_or_else(PoisonError::into_inner), false);
    }
}

/// Does the rounds.
pub(super) fn run(order: &ConcurrentOrder, enough: &AtomicBool) -> Result<Concurred, Trouble> {
    let mut concurred = Concurred::default();
    let begun = Instant::now();
    for round in 0.. {
        if order.extent.is_over(round, begun.elapsed()) || enough.load(Ordering::SeqCst) {
            break;
        }
        one_round(order, round, &mut concurred)?;
        say(&Report::Progress { done: round + 1, of: order.extent.exactly().unwrap_or(0) });
    }
    Ok(concurred)
}

fn one_round(order: &ConcurrentOrder, round: u64, concurred: &mut Concurred) -> Result<(), Trouble> {
    let seed = order.seed.derive("round", round);
    let contended: Vec<Contended> = (0..order.devices)
        .map(|index| Contended::start(seed.derive("device", u64::from(index))))
        .collect::<Result<_, _>>()?;
    concurred.bytes_verified += 2 * BLOCK as u64 * contended.len() as u64;
    let start = StartSignal::default();
    let (over, meanwhile) = (AtomicBool::new(false), AtomicU64::new(0));
    let trouble = Mutex::new(None);
    let answers = std::thread::scope(|scope| {
        // However it ends, nobody waits for a signal that does not come.
        let _aborted = start.abort_at_end();
        let thread = |name: String| std::thread::Builder::new().name(name);
        let starter = thread("starter".to_owned()).spawn_scoped(scope, || {
            if !start.wait() {
                return;
            }
            // At least one, however fast the others are.
            loop {
                let started = Contended::start(seed.derive("meanwhile", meanwhile.load(Ordering::SeqCst)))
                    .and_then(|one| close_alone(&one));
                if let Err(failed) = started {
                    trouble.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failed);
                    break;
                }
                meanwhile.fetch_add(1, Ordering::SeqCst);
                if over.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        let starter = starter.map_err(|error| no_thread(&error))?;
        let mut callers = Vec::new();
        for one in &contended {
            for caller in 0..order.callers {
                let name = format!("close {} of {}", caller + 1, one.device.id());
                let close = || start.wait().then(|| one.close(order.plant));
                callers.push(thread(name).spawn_scoped(scope, close).map_err(|error| no_thread(&error))?);
            }
        }
        start.go(callers.len() + 1);
        let answers: Vec<_> = callers.into_iter().map(ScopedJoinHandle::join).collect();
        over.store(true, Ordering::SeqCst);
        let _panicked = starter.join();
        let panicked = |_| Trouble::broke("close", "a thread that closed a device panicked");
        answers.into_iter().map(|answer| answer.map_err(panicked)).collect::<Result<Vec<_>, Trouble>>()
    })?;
    if let Some(trouble) = trouble.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(trouble);
    }
    let answers: Vec<Answer> = answers.into_iter().flatten().collect();
    for (one, answers) in contended.iter().zip(answers.chunks(order.callers as usize)) {
        judge(one, answers)?;
        say(&Report::Gone { id: one.device.id() });
        concurred.closes += 1;
        concurred.callers += answers.len() as u64;
    }
    concurred.started_meanwhile += meanwhile.load(Ordering::SeqCst);
    if order.plant == Some(Plant::SkippedDelete) {
        super::worker::Planted::forget_a_device()?;
    }
    Ok(())
}

fn close_alone(one: &Contended) -> Result<(), Trouble> {
    judge(one, &[one.close(None)])?;
    say(&Report::Gone { id: one.device.id() });
    Ok(())
}

/// Every caller is told the same, and it is so.
fn judge(one: &Contended, answers: &[Answer]) -> Result<(), Trouble> {
    let id = one.device.id();
    let told: BTreeSet<&str> = answers.iter().map(|answer| answer.told.as_str()).collect();
    if let Some(answer) = answers.iter().find(|answer| answer.there) {
        let what = format!("a caller was told that device {id} is {}, and it was still there", answer.told);
        return Err(Trouble::broke("close", what));
    }
    let told: Vec<&str> = told.into_iter().collect();
    match told[..] {
        ["closed"] => Ok(()),
        [other] => Err(Trouble::broke("close", format!("device {id}: closing it came to: {other}"))),
        _ => {
            let what = format!("{} callers of one close of device {id} were told different things", answers.len());
            let detail = told.into_iter().map(str::to_owned).collect();
            Err(Trouble::Broke { oracle: "close".to_owned(), what, detail })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_go_once_all_wait_and_none_if_they_do_not_become_as_many() {
        for complete in [true, false] {
            let (start, went) = (StartSignal::default(), AtomicU64::new(0));
            std::thread::scope(|scope| {
                let _aborted = start.abort_at_end();
                for _ in 0..3 {
                    scope.spawn(|| went.fetch_add(u64::from(start.wait()), Ordering::SeqCst));
                }
                if complete {
                    start.go(3);
                }
            });
            assert_eq!(went.into_inner(), if complete { 3 } else { 0 });
        }
    }
}

//! Many callers close the same device at the same moment, while other devices are started and closed beside it.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::Duration;

use ublkit::backends::Memory;
use ublkit::{Closed, Deletion, Device, WriteFlags};
use ublkit_harness::{Pattern, Seed};

use super::cycle::{BLOCK, DEVICE_BYTES, await_one, open_client};
use super::protocol::{Concurred, ConcurrentOrder, Plant, Report, Trouble};
use super::worker::say;
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

/// Does the rounds.
pub(super) fn run(order: &ConcurrentOrder, enough: &AtomicBool) -> Result<Concurred, Trouble> {
    let mut concurred = Concurred::default();
    for round in 0..order.rounds {
        if enough.load(Ordering::SeqCst) {
            break;
        }
        one_round(order, round, &mut concurred)?;
        say(&Report::Progress { done: u64::from(round) + 1, of: u64::from(order.rounds) });
    }
    Ok(concurred)
}

fn one_round(order: &ConcurrentOrder, round: u32, concurred: &mut Concurred) -> Result<(), Trouble> {
    let seed = order.seed.derive("round", u64::from(round));
    let contended: Vec<Contended> = (0..order.devices)
        .map(|index| Contended::start(seed.derive("device", u64::from(index))))
        .collect::<Result<_, _>>()?;
    concurred.bytes_verified += 2 * BLOCK as u64 * contended.len() as u64;
    let barrier = Barrier::new(contended.len() * order.callers as usize + 1);
    let (over, meanwhile) = (AtomicBool::new(false), AtomicU64::new(0));
    let trouble = Mutex::new(None);
    let mut answers = Vec::new();
    std::thread::scope(|scope| {
        let starter = scope.spawn(|| {
            barrier.wait();
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
        let callers: Vec<_> = contended
            .iter()
            .flat_map(|one| (0..order.callers).map(move |_| one))
            .map(|one| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    one.close(order.plant)
                })
            })
            .collect();
        answers = callers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        over.store(true, Ordering::SeqCst);
        let _panicked = starter.join();
    });
    if let Some(trouble) = trouble.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(trouble);
    }
    let answers: Vec<Answer> = answers
        .into_iter()
        .collect::<Result<_, _>>()
        .map_err(|_| Trouble::broke("close", "a thread that closed a device panicked"))?;
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

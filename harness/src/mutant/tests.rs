//! Each mutant is wrong as it says and right otherwise; plan and shadow find those that need no more than that.

mod backend;
mod cuts;
mod durable;
mod server;
mod simulated;

use std::io;
use std::sync::{Mutex, PoisonError};

use ublkit::{Geometry, WriteFlags, ZeroFlags};

use super::*;
use crate::mismatch::Mismatch;
use crate::oracle::Oracle;
use crate::outcome::Outcome;
use crate::plan::{OpKind, Plan, PlanOptions};
use crate::range::SectorRange;
use crate::sector::Pattern;
use crate::shadow::{DiscardPromise, Shadow, ShadowOptions};

/// A backend in memory that is always right.
#[derive(Debug)]
pub(crate) struct Memory(Mutex<Vec<u8>>);

impl Memory {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Mutex::new(vec![0; bytes]))
    }

    fn with(&self, offset: u64, len: u64, action: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let end = offset.saturating_add(len) as usize;
        action(bytes.get_mut(offset as usize..end).ok_or(io::ErrorKind::InvalidInput)?);
        Ok(())
    }
}

impl Backend for Memory {
    fn geometry(&self) -> Geometry {
        let size = self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64;
        Geometry::bytes(size).fua().discard(4096).write_zeroes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(offset, buf.len() as u64, |bytes| buf.copy_from_slice(bytes))
    }

    fn write_at(&self, buf: &[u8], offset: u64, _flags: WriteFlags) -> io::Result<()> {
        self.with(offset, buf.len() as u64, |bytes| bytes.copy_from_slice(buf))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.with(offset, len, |bytes| bytes.fill(0))
    }

    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> io::Result<()> {
        self.discard(offset, len)
    }
}

/// One worker's plan, straight into a backend, and a last look at everything.
fn torture(backend: &dyn Backend, seed: u64, ops: usize) -> Result<u64, Box<Mismatch>> {
    torture_with(backend, seed, ops, DiscardPromise::Zeroes)
}

/// The same, where discards promise this.
fn torture_with(backend: &dyn Backend, seed: u64, ops: usize, promise: DiscardPromise) -> Result<u64, Box<Mismatch>> {
    let device_bytes = backend.geometry().size;
    let region = SectorRange::device(device_bytes);
    let plan = Plan::new(PlanOptions::new(device_bytes, 512, 64 << 10, 1), Seed::new(seed)).expect("valid options");
    let mut shadow = Shadow::new(ShadowOptions {
        region,
        worker: 0,
        pattern: Arc::new(Pattern::new(plan.seed(), 0)),
        foreign: Arc::new([]),
        device_sectors: region.sectors,
        initially_zero: true,
    });
    let mut verified = 0;
    let mut buf = Vec::new();
    for op in plan.worker(0).take(ops) {
        let (range, offset, len) = (op.range, op.range.offset_bytes(), op.range.len_bytes());
        buf.resize(len as usize, 0);
        let (ticket, done) = match op.kind {
            OpKind::Read => {
                let ticket = shadow.begin_read(op.index, range);
                match backend.read_at(&mut buf, offset) {
                    Ok(()) => verified += shadow.finish_read(ticket, &buf)?.bytes,
                    Err(_) => shadow.finish(ticket, Outcome::Failed),
                }
                continue;
            }
            OpKind::Flush => {
                let _may_fail = backend.flush();
                continue;
            }
            OpKind::Write => {
                let ticket = shadow.begin_write(op.index, range, &mut buf);
                (ticket, backend.write_at(&buf, offset, WriteFlags::NONE))
            }
            OpKind::WriteFua => {
                let ticket = shadow.begin_write_fua(op.index, range, &mut buf);
                (ticket, backend.write_at(&buf, offset, WriteFlags::FUA))
            }
            OpKind::Discard => {
                let ticket = shadow.begin_discard(op.index, range, promise);
                (ticket, backend.discard(offset, len))
            }
            OpKind::WriteZeroes => {
                let ticket = shadow.begin_write_zeroes(op.index, range);
                (ticket, backend.write_zeroes(offset, len, ZeroFlags::NONE))
            }
        };
        shadow.finish(ticket, if done.is_ok() { Outcome::Done } else { Outcome::Failed });
    }
    buf.resize(region.len_bytes() as usize, 0);
    while backend.read_at(&mut buf, 0).is_err() {}
    Ok(verified + shadow.verify(region, &buf)?.bytes)
}

const DEVICE: usize = 1 << 20;

/// One that errs so seldom that it never does.
fn dormant(mutant: Mutant) -> Planted {
    Planted { mutant, every: u64::MAX }
}

fn planted(mutant: Mutant, every: u64, seed: u64) -> (Arc<dyn Backend>, Plot) {
    let plot = Plot::new(Seed::new(seed));
    (plant_backend(Planted { mutant, every }, Arc::new(Memory::new(DEVICE)), &plot), plot)
}

#[test]
fn the_honest_backend_passes() {
    for seed in 0..5 {
        let verified = torture(&Memory::new(DEVICE), seed, 500).expect("it is right");
        assert!(verified > 1 << 20);
    }
}

/// How often each class is named over many seeds.
fn names(mutant: Mutant) -> std::collections::BTreeMap<String, u32> {
    let mut names = std::collections::BTreeMap::new();
    for seed in 0..20 {
        let (backend, plot) = planted(mutant, 15, seed);
        let name = match torture(&backend, seed, 400) {
            Ok(_) => "not found".to_owned(),
            Err(mismatch) => mismatch.class.name().to_owned(),
        };
        assert!(plot.hits.count() > 0 || name == "not found");
        *names.entry(name).or_default() += 1;
    }
    names
}

#[test]
fn lost_writes_are_named() {
    let names = names(Mutant::LostWrite);
    // Lost twice over is stale.
    assert!(names.keys().all(|name| name == "lost" || name == "stale"), "{names:?}");
    assert!(names["lost"] >= 18, "{names:?}");
}

#[test]
fn misdirected_writes_are_named() {
    let names = names(Mutant::MisdirectedWrite);
    assert!(names.keys().all(|name| name == "misdirected" || name == "lost"), "{names:?}");
    assert!(names["misdirected"] >= 14, "{names:?}");
}

#[test]
fn flipped_bits_are_named() {
    let names = names(Mutant::BitflipRead);
    assert_eq!(names.keys().collect::<Vec<_>>(), ["bit_flip"]);
}

/// Whether one worker that expects no error can find it in a backend's answers.
fn shows_in_data(spec: &Spec) -> bool {
    let data = [Oracle::Tag, Oracle::Linear, Oracle::Zero, Oracle::CrossDevice];
    spec.layer == Layer::Backend
        && spec.mutant.shows_at().is_none()
        && spec.oracles.iter().any(|oracle| data.contains(oracle))
}

#[test]
fn what_shows_in_data_is_found_at_its_own_rate() {
    for mutant in Mutant::ALL.into_iter().filter(|mutant| shows_in_data(mutant.spec())) {
        for seed in 0..3 {
            let (backend, plot) = planted(mutant, Planted::from(mutant).every, seed);
            let found = torture(&backend, seed, 4000);
            assert!(found.is_err() && plot.hits.count() > 0, "{mutant}: {:?}", plot.hits);
        }
    }
}

#[test]
fn mutants_replay_from_their_seed() {
    for mutant in Mutant::ALL.into_iter().filter(|mutant| shows_in_data(mutant.spec())) {
        let run = |seed| {
            let (backend, plot) = planted(mutant, Planted::from(mutant).every, seed);
            (torture(&backend, 1, 4000).expect_err("found"), plot.hits.count(), plot.hits.chances())
        };
        assert_eq!(run(4), run(4), "{mutant}");
    }
    let run = |seed| torture(&planted(Mutant::LostWrite, 20, seed).0, 1, 300).expect_err("found");
    assert_ne!(run(4), run(5));
}

#[test]
fn a_mutant_whose_turn_never_comes_is_right() {
    // These are wrong whenever they can be, or count what others have to make wrong.
    let always = [Mutant::NoVolatileCache, Mutant::RoNotEnforced, Mutant::UnflushedLost];
    for mutant in Mutant::ALL {
        let plot = Plot::new(Seed::new(1));
        let backend = plant_backend(dormant(mutant), Arc::new(Memory::new(DEVICE)), &plot);
        assert!(torture(&backend, 1, 300).is_ok(), "{mutant}");
        assert!(plot.hits.count() == 0 || always.contains(&mutant), "{mutant}");
    }
}

#[test]
fn controls_pass() {
    for mutant in Mutant::ALL.into_iter().filter(|mutant| mutant.is_control()) {
        let promise = match mutant {
            Mutant::DiscardGarbage => DiscardPromise::Nothing,
            _ => DiscardPromise::Zeroes,
        };
        for seed in 0..3 {
            let (backend, _) = planted(mutant, 3, seed);
            if let Err(mismatch) = torture_with(&backend, seed, 1000, promise) {
                panic!("{mutant}: {mismatch}");
            }
        }
    }
}

#[test]
fn names_are_read_and_printed() {
    for mutant in Mutant::ALL {
        assert_eq!(mutant.to_string().parse(), Ok(mutant));
        let planted = Planted { mutant, every: 7 };
        assert_eq!(planted.to_string().parse(), Ok(planted));
        assert_eq!(mutant.name().parse(), Ok(Planted::from(mutant)));
    }
    assert!("lost-write:0".parse::<Planted>().is_err_and(|error| error.contains("from 1")));
    let error = "lost".parse::<Mutant>().expect_err("not one");
    assert!(error.to_string().contains("lost-write, lost-overwrite, misdirected-write"), "{error}");
}

#[test]
fn the_table_is_in_order() {
    let mut names = std::collections::BTreeSet::new();
    for mutant in Mutant::ALL {
        let spec = mutant.spec();
        assert_eq!(spec.mutant, mutant);
        assert!(names.insert(spec.name), "{mutant} twice");
        assert!(spec.name.split('-').all(|word| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase())));
        assert!(spec.every > 0 && !spec.stands_for.is_empty() && !spec.stands_for.contains('\n'));
        assert_eq!(spec.oracles.is_empty(), mutant.is_control(), "{mutant}");
    }
    let numbers: std::collections::BTreeSet<_> = Mutant::ALL.iter().map(|mutant| mutant.spec().number).collect();
    let kernel = [49, 51, 52, 53];
    let listed = (1..=57).filter(|number| !kernel.contains(number)).map(|number: u32| number.to_string());
    for number in listed.chain(('a'..='i').map(String::from)) {
        assert!(numbers.contains(number.as_str()), "{number} is missing");
    }
}

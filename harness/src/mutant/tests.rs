//! Each mutant is caught and named by plan and shadow; the honest backend never is.

use std::sync::{Mutex, PoisonError};

use super::*;
use crate::mismatch::Mismatch;
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
fn torture(backend: &impl Backend, seed: u64, ops: usize) -> Result<u64, Box<Mismatch>> {
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
                assert!(backend.read_at(&mut buf, offset).is_ok());
                verified += shadow.finish_read(ticket, &buf)?.bytes;
                continue;
            }
            OpKind::Flush => {
                assert!(backend.flush().is_ok());
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
                let ticket = shadow.begin_discard(op.index, range, DiscardPromise::Zeroes);
                (ticket, backend.discard(offset, len))
            }
            OpKind::WriteZeroes => {
                let ticket = shadow.begin_write_zeroes(op.index, range);
                (ticket, backend.write_zeroes(offset, len, ZeroFlags::NONE))
            }
        };
        assert!(done.is_ok());
        shadow.finish(ticket, Outcome::Done);
    }
    buf.resize(region.len_bytes() as usize, 0);
    assert!(backend.read_at(&mut buf, 0).is_ok());
    Ok(verified + shadow.verify(region, &buf)?.bytes)
}

const DEVICE: usize = 1 << 20;

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
        let plot = Plot::new(Seed::new(seed));
        let backend = plant_backend(Planted { mutant, every: 15 }, Arc::new(Memory::new(DEVICE)), &plot);
        let hits = plot.hits.clone();
        let name = match torture(&backend, seed, 400) {
            Ok(_) => "not found".to_owned(),
            Err(mismatch) => mismatch.class.name().to_owned(),
        };
        assert!(hits.count() > 0 || name == "not found");
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

#[test]
fn mutants_replay_from_their_seed() {
    for mutant in Mutant::ALL {
        let run = |seed| {
            let backend = MutantBackend::new(Memory::new(DEVICE), mutant, 20, Seed::new(seed));
            torture(&backend, 1, 300).expect_err("found")
        };
        assert_eq!(run(4), run(4));
        assert_ne!(run(4), run(5));
    }
}

#[test]
fn a_write_of_the_whole_device_cannot_go_elsewhere() {
    let backend = MutantBackend::new(Memory::new(4096), Mutant::MisdirectedWrite, 1, Seed::new(1));
    assert!(backend.write_at(&[7; 4096], 0, WriteFlags::NONE).is_ok());
    let mut buf = [0; 4096];
    assert!(backend.read_at(&mut buf, 0).is_ok());
    assert_eq!((buf, backend.hits().count()), ([7; 4096], 0));
}

#[test]
fn names_are_read_and_printed() {
    for mutant in Mutant::ALL {
        assert_eq!(mutant.to_string().parse(), Ok(mutant));
        assert!(!mutant.doc().is_empty() && !mutant.doc().contains('\n'));
    }
    let error = "lost".parse::<Mutant>().expect_err("not one");
    assert!(error.to_string().contains("lost-write, misdirected-write, bitflip-read"), "{error}");
}

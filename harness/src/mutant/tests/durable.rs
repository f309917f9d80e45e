//! What power cuts and deaths bring to light, by hand.

use super::*;
use crate::plan::OpKind;
use crate::script::{Act, Recovery, Setup};
use crate::sim::medium::{MediumDisk, MediumOptions};

const BYTES: u64 = 1 << 20;
const BLOCK: usize = 512;

fn medium(atomic_bytes: u32) -> Medium {
    Medium::new(MediumOptions { bytes: BYTES, volatile_cache: true, atomic_bytes })
}

fn open(planted: Planted, medium: &Medium, plot: &Plot, why: Open, block: u32) -> Arc<dyn Backend> {
    let geometry = Geometry::bytes(BYTES).logical_block(block).fua().discard(block).write_zeroes();
    let disk = MediumDisk::new(medium.clone(), geometry);
    plant_backend(planted, Arc::new(disk), &plot.again(why, Some(medium.clone())))
}

fn write(backend: &dyn Backend, block: u64, byte: u8) {
    assert!(backend.write_at(&[byte; BLOCK], block * BLOCK as u64, WriteFlags::NONE).is_ok());
}

fn read(backend: &dyn Backend, block: u64) -> u8 {
    let mut buf = [0; BLOCK];
    assert!(backend.read_at(&mut buf, block * BLOCK as u64).is_ok());
    buf[0]
}

/// Runs `work` and cuts the power, for some seeds; whether what `check` looks for was ever there, and how often the mutant
/// was wrong.
fn cut(mutant: Mutant, every: u64, work: impl Fn(&dyn Backend), check: impl Fn(&dyn Backend) -> bool) -> (bool, u64) {
    let mut shown = false;
    let mut hits = 0;
    for seed in 0..40 {
        let planted = Planted { mutant, every };
        let plot = Plot::new(Seed::new(seed));
        let medium = medium(BLOCK as u32);
        let backend = open(planted, &medium, &plot, Open::First, BLOCK as u32);
        work(&*backend);
        drop(backend);
        let _cut = medium.power_cut(&mut Seed::new(seed).rng());
        hits += plot.hits.count();
        shown |= check(&*open(planted, &medium, &plot, Open::AfterPowerCut, BLOCK as u32));
    }
    (shown, hits)
}

#[test]
fn flushes_that_do_not_persist() {
    let work = |backend: &dyn Backend| {
        // For those who skip the first ones.
        (0..8).for_each(|_| assert!(backend.flush().is_ok()));
        for _ in 0..60 {
            read(backend, 0);
        }
        write(backend, 1, 7);
        write(backend, 2, 8);
        assert!(backend.flush().is_ok());
    };
    let lost = |backend: &dyn Backend| read(backend, 1) != 7;
    for mutant in [Mutant::FlushNoop, Mutant::FlushRange, Mutant::FlushEarly] {
        let (shown, hits) = cut(mutant, 1, work, lost);
        assert!(shown && hits > 0, "{mutant}");
        assert_eq!(cut(mutant, u64::MAX, work, lost), (false, 0), "{mutant}");
    }
    assert!(!cut(Mutant::FlushRange, 1, work, |backend| read(backend, 2) != 8).0, "the last write's range");
    assert!(!cut(Mutant::ColdFlush, 1, work, lost).0);
    let work = |backend: &dyn Backend| {
        write(backend, 1, 7);
        assert!(backend.flush().is_ok());
    };
    assert!(cut(Mutant::ColdFlush, 1, work, lost).0);
}

#[test]
fn an_early_flush_is_done_later() {
    let work = |backend: &dyn Backend| {
        write(backend, 1, 7);
        assert!(backend.flush().is_ok());
        for _ in 0..60 {
            read(backend, 0);
        }
    };
    let (shown, hits) = cut(Mutant::FlushEarly, 1, work, |backend| read(backend, 1) != 7);
    assert!(!shown && hits > 0);
}

#[test]
fn a_flush_that_was_submitted_is_done_with_the_next_call() {
    let lost = |backend: &dyn Backend| read(backend, 1) != 7;
    let work = |backend: &dyn Backend| {
        write(backend, 1, 7);
        assert!(backend.flush().is_ok());
    };
    assert!(cut(Mutant::FlushSubmitted, 1, work, lost).0);
    let work = |backend: &dyn Backend| {
        work(backend);
        read(backend, 0);
    };
    assert_eq!(cut(Mutant::FlushSubmitted, 1, work, lost), (false, 40));
}

#[test]
fn a_map_rolls_back_behind_a_flush() {
    let work = |backend: &dyn Backend| {
        write(backend, 1, 6);
        write(backend, 1, 7);
        assert!(backend.flush().is_ok());
        assert_eq!(read(backend, 1), 7);
    };
    assert_eq!(cut(Mutant::FtlRollback, 1, work, |backend| read(backend, 1) == 6), (true, 40));
    assert!(!cut(Mutant::FtlRollback, 1, work, |backend| ![6, 7].contains(&read(backend, 1))).0);
    assert_eq!(cut(Mutant::FtlRollback, u64::MAX, work, |backend| read(backend, 1) != 7), (false, 0));
    let zeroed = |backend: &dyn Backend| {
        write(backend, 1, 7);
        assert!(backend.write_zeroes(BLOCK as u64, BLOCK as u64, ZeroFlags::NONE).is_ok());
        assert!(backend.flush().is_ok());
    };
    assert_eq!(cut(Mutant::FtlRollback, 1, zeroed, |backend| read(backend, 1) != 0), (false, 0));
}

#[test]
fn fua_is_ignored() {
    let work = |backend: &dyn Backend| {
        assert!(backend.write_at(&[7; BLOCK], 0, WriteFlags::FUA).is_ok());
    };
    let lost = |backend: &dyn Backend| read(backend, 0) != 7;
    assert!(cut(Mutant::FuaIgnored, 1, work, lost).0);
    assert_eq!(cut(Mutant::FuaIgnored, u64::MAX, work, lost), (false, 0));
}

#[test]
fn kept_blocks_are_lost_flush_or_not() {
    let new_block = |backend: &dyn Backend| {
        write(backend, 1, 7);
        assert!(backend.flush().is_ok());
        assert_eq!(read(backend, 1), 7);
    };
    assert_eq!(cut(Mutant::MetadataNotFlushed, 1, new_block, |backend| read(backend, 1) == 0), (true, 40));

    let before_and_after = |backend: &dyn Backend| {
        write(backend, 1, 7);
        assert!(backend.flush().is_ok());
        // Too long to be kept.
        assert!(backend.write_at(&[8; 32 * BLOCK], 4096, WriteFlags::NONE).is_ok());
    };
    let unserializable = |backend: &dyn Backend| read(backend, 1) == 0 && read(backend, 8) == 8;
    assert_eq!(cut(Mutant::ReorderAcrossFlush, 1, before_and_after, unserializable), (true, 40));

    let twice = |backend: &dyn Backend| {
        write(backend, 1, 7);
        write(backend, 1, 8);
        write(backend, 2, 9);
        assert!(backend.flush().is_ok());
        assert_eq!(read(backend, 1), 8);
    };
    assert_eq!(cut(Mutant::SameLbaLogRace, 1, twice, |backend| read(backend, 1) == 7), (true, 40));
    assert!(!cut(Mutant::SameLbaLogRace, 1, twice, |backend| read(backend, 2) != 9).0);

    let discarded = |backend: &dyn Backend| {
        write(backend, 1, 7);
        assert!(backend.discard(BLOCK as u64, BLOCK as u64).is_ok());
        assert!(backend.flush().is_ok());
        assert_eq!(read(backend, 1), 0);
    };
    assert_eq!(cut(Mutant::DiscardResurrects, 1, discarded, |backend| read(backend, 1) == 7), (true, 40));
}

#[test]
fn kept_blocks_follow_what_comes_after() {
    for mutant in [Mutant::MetadataNotFlushed, Mutant::ReorderAcrossFlush, Mutant::SameLbaLogRace] {
        let planted = Planted { mutant, every: 1 };
        let backend = open(planted, &medium(512), &Plot::new(Seed::new(1)), Open::First, 512);
        for block in 0..300 {
            write(&*backend, block, 1);
            write(&*backend, block, 2);
        }
        assert!(backend.write_zeroes(0, 512, ZeroFlags::NONE).is_ok());
        assert!(backend.discard(512, 512).is_ok());
        let seen: Vec<_> = (0..300).map(|block| read(&*backend, block)).collect();
        assert_eq!(seen, [&[0, 0][..], &[2; 298]].concat(), "{mutant}");
    }
}

#[test]
fn blocks_tear_below_their_size() {
    let torn = |mutant| {
        (0..40).any(|seed| {
            let planted = Planted { mutant, every: 1 };
            let medium = medium(4096);
            let plot = Plot::new(Seed::new(seed));
            let backend = open(planted, &medium, &plot, Open::First, 4096);
            assert!(backend.write_at(&[7; 8192], 0, WriteFlags::NONE).is_ok());
            assert_eq!(plot.hits.count(), u64::from(mutant == Mutant::TornBelowAtomic));
            let _cut = medium.power_cut(&mut Seed::new(seed).rng());
            let mut buf = [0; 4096];
            assert!(backend.read_at(&mut buf, 4096).is_ok());
            buf.contains(&0) && buf.contains(&7)
        })
    };
    assert!(torn(Mutant::TornBelowAtomic));
    assert!(!torn(Mutant::LostOverwrite));
}

#[test]
fn the_next_server_serves_an_old_disk() {
    let planted = Planted { mutant: Mutant::RecoveryStaleState, every: 1 };
    let (medium, plot) = (medium(512), Plot::new(Seed::new(1)));
    let first = open(planted, &medium, &plot, Open::First, 512);
    write(&*first, 1, 7);
    write(&*first, 2, 7);
    assert_eq!((read(&*first, 1), plot.hits.count()), (7, 0));
    let next = open(planted, &medium, &plot, Open::AfterKill, 512);
    write(&*next, 1, 8);
    assert_eq!((read(&*next, 1), read(&*next, 2), plot.hits.count()), (8, 0, 1));
    assert_eq!(read(&*open(planted, &medium, &plot, Open::Reopen, 512), 2), 7);
}

#[test]
fn recovery_writes_old_over_new() {
    let planted = Planted { mutant: Mutant::ReissueOldOverNew, every: 1 };
    for (why, seen, hits) in [(Open::AfterKill, 7, 1), (Open::Reopen, 8, 0), (Open::AfterPowerCut, 8, 0)] {
        let (medium, plot) = (medium(512), Plot::new(Seed::new(1)));
        let first = open(planted, &medium, &plot, Open::First, 512);
        write(&*first, 3, 1);
        write(&*first, 1, 7);
        write(&*first, 1, 8);
        let next = open(planted, &medium, &plot, why, 512);
        assert_eq!((read(&*next, 1), read(&*next, 3), plot.hits.count()), (seen, 1, hits));
    }
}

#[test]
fn a_cache_that_is_not_declared() {
    let planted = Planted { mutant: Mutant::NoVolatileCache, every: 1 };
    let declared = declared_geometry(planted, Geometry::bytes(BYTES).fua());
    assert_eq!((declared.volatile_cache, declared.fua), (false, false));
    let plot = Plot::new(Seed::new(1));
    let backend = open(planted, &medium(512), &plot, Open::First, 512);
    write(&*backend, 0, 7);
    assert_eq!((backend.geometry().volatile_cache, plot.hits.count()), (false, 2), "the lie is one");
}

#[test]
fn caches_write_back_what_they_like() {
    let work = |backend: &dyn Backend| {
        for block in 0..500 {
            write(backend, block, 7);
        }
    };
    let (_, hits) = cut(Mutant::AnySubset, 2, work, |_| false);
    assert_eq!(hits, 40 * 250);
    let (lost, hits) = cut(Mutant::UnflushedLost, 1, work, |backend| read(backend, 0) == 0);
    assert!(lost && hits == 40 * 500);
}

/// How often a write was lost and kept, that a failed flush covers and then a good one.
fn fail_a_flush(mutant: Mutant) -> (u32, u32) {
    let planted = Planted { mutant, every: 2 };
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..60 {
        let mut plot = Plot::new(Seed::new(seed));
        let told = super::backend::admitted(&mut plot);
        let medium = medium(512);
        let backend = open(planted, &medium, &plot, Open::First, 512);
        write(&*backend, 1, 7);
        let failed = backend.flush().is_err();
        write(&*backend, 2, 8);
        if failed {
            assert!(backend.flush().is_ok());
        }
        let admitted = told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert_eq!(admitted, vec![(OpKind::Flush, SectorRange::new(0, 0), 5); usize::from(failed)]);
        let _cut = medium.power_cut(&mut Seed::new(seed).rng());
        if failed {
            assert_eq!(read(&*backend, 2), 8, "written since it failed");
            *if read(&*backend, 1) == 7 { &mut kept } else { &mut lost } += 1;
        } else {
            assert_eq!(read(&*backend, 1), 7);
        }
    }
    (lost, kept)
}

#[test]
fn a_flush_that_fails_gives_up_what_was_dirty() {
    let (lost, kept) = fail_a_flush(Mutant::FlushGivesUp);
    assert!(lost > 0, "{lost} lost, {kept} kept");
    let (lost, kept) = fail_a_flush(Mutant::FlushFails);
    assert!(lost == 0 && kept > 0, "{lost} lost, {kept} kept");
}

#[test]
fn setups_are_made_to_fit() {
    for mutant in Mutant::ALL {
        let mut setup = Setup {
            bytes: 1 << 20,
            logical_block: 512,
            max_io_bytes: 16 << 10,
            queues: 1,
            queue_depth: 1,
            workers: 1,
            io_depth: 1,
            volatile_cache: false,
            fua: false,
            discard: false,
            discard_zeroes: false,
            write_zeroes: false,
            read_only: false,
            recovery: Recovery::None,
            merges: false,
            reorder: 0,
            memory_pressure: false,
            compressible: 0,
        };
        mutant.needs(&mut setup);
        assert_eq!(setup.read_only, mutant == Mutant::RoNotEnforced);
        assert!(setup.volatile_cache || mutant.shows_at() != Some(Act::PowerCut), "{mutant}");
        assert!(setup.bytes.is_multiple_of(u64::from(setup.logical_block)));
        assert!(setup.max_io_bytes.is_multiple_of(setup.logical_block));
    }
}

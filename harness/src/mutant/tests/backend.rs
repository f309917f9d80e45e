//! Backends by hand: each is wrong in its own way and no other.

use super::super::*;
use super::*;

const BLOCK: usize = 512;

/// A mutant that errs whenever it can, on a small device.
pub(super) struct Rig {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) plot: Plot,
}

impl Rig {
    pub(super) fn new(mutant: Mutant) -> Self {
        Self::every(mutant, 1)
    }

    pub(super) fn every(mutant: Mutant, every: u64) -> Self {
        let (backend, plot) = planted(mutant, every, 1);
        Self { backend, plot }
    }

    /// Writes blocks that are full of `byte`.
    pub(super) fn write(&self, block: u64, blocks: usize, byte: u8) {
        let buf = vec![byte; blocks * BLOCK];
        assert!(self.backend.write_at(&buf, block * BLOCK as u64, WriteFlags::NONE).is_ok());
    }

    /// Reads blocks; each is full of one byte.
    pub(super) fn read(&self, block: u64, blocks: usize) -> Vec<u8> {
        let mut buf = vec![0xee; blocks * BLOCK];
        assert!(self.backend.read_at(&mut buf, block * BLOCK as u64).is_ok());
        assert!(buf.chunks(BLOCK).all(|block| block.iter().all(|byte| *byte == block[0])));
        buf.chunks(BLOCK).map(|block| block[0]).collect()
    }

    pub(super) fn discard(&self, block: u64, blocks: usize) {
        assert!(self.backend.discard(block * BLOCK as u64, (blocks * BLOCK) as u64).is_ok());
    }

    fn zero(&self, block: u64, blocks: usize) {
        let (offset, len) = (block * BLOCK as u64, (blocks * BLOCK) as u64);
        assert!(self.backend.write_zeroes(offset, len, ZeroFlags::NONE).is_ok());
    }

    pub(super) fn hits(&self) -> u64 {
        self.plot.hits.count()
    }
}

#[test]
fn lost_write() {
    let rig = Rig::new(Mutant::LostWrite);
    rig.write(3, 2, 7);
    assert_eq!((rig.read(3, 2), rig.hits()), (vec![0, 0], 1));
}

#[test]
fn lost_overwrite_loses_the_second() {
    let rig = Rig::new(Mutant::LostOverwrite);
    rig.write(0, 2, 1);
    rig.write(1, 2, 2);
    assert_eq!((rig.read(0, 3), rig.hits()), (vec![1, 2, 2], 0), "one of its blocks is new");
    rig.write(0, 2, 3);
    assert_eq!((rig.read(0, 2), rig.hits()), (vec![1, 2], 1));
    assert!(rig.backend.flush().is_ok());
    rig.write(0, 2, 4);
    assert_eq!(rig.read(0, 2), [4, 4]);
}

#[test]
fn misdirected_write_has_two_victims() {
    let rig = Rig::new(Mutant::MisdirectedWrite);
    rig.write(100, 1, 7);
    assert_eq!(rig.read(100, 1), [0]);
    let mut around = rig.read(92, 8);
    around.sort_unstable();
    assert_eq!(around, [0, 0, 0, 0, 0, 0, 0, 7]);
    let plot = Plot::new(Seed::new(1));
    let whole =
        plant_backend(Planted { mutant: Mutant::MisdirectedWrite, every: 1 }, Arc::new(Memory::new(4096)), &plot);
    assert!(whole.write_at(&[7; 4096], 0, WriteFlags::NONE).is_ok());
    let mut buf = [0; 4096];
    assert!(whole.read_at(&mut buf, 0).is_ok());
    assert_eq!((buf, plot.hits.count()), ([7; 4096], 0), "there is no other place");
}

#[test]
fn misdirected_read_leaves_the_media_alone() {
    let rig = Rig::every(Mutant::MisdirectedRead, 2);
    for block in 0..32 {
        rig.write(block, 1, block as u8 + 1);
    }
    let mut seen = [rig.read(16, 1)[0], rig.read(16, 1)[0]];
    seen.sort_unstable();
    assert!(seen[0] < 17 && seen[1] == 17 && rig.hits() == 1, "{seen:?}");
}

#[test]
fn address_alias_folds_the_device() {
    let rig = Rig::new(Mutant::AddressAlias);
    let half = (DEVICE / BLOCK / 2) as u64;
    rig.write(half + 5, 1, 7);
    rig.write(6, 1, 8);
    assert_eq!((rig.read(5, 2), rig.hits()), (vec![7, 8], 1));
    assert_eq!(rig.read(half + 6, 1), [8]);
}

#[test]
fn shorn_write_keeps_the_front() {
    let rig = Rig::new(Mutant::ShornWrite);
    rig.write(0, 1, 7);
    assert_eq!((rig.read(0, 1), rig.hits()), (vec![7], 0), "one sector has no front");
    rig.write(0, 8, 9);
    let seen = rig.read(0, 8);
    let front = seen.iter().take_while(|byte| **byte == 9).count();
    assert!((1..8).contains(&front) && seen[front..].iter().all(|byte| *byte == 0), "{seen:?}");
}

#[test]
fn flipped_and_stuck_bits() {
    let rig = Rig::new(Mutant::BitflipRead);
    let mut buf = [0; BLOCK];
    assert!(rig.backend.read_at(&mut buf, 0).is_ok());
    assert_eq!(buf.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);

    for (mutant, same_place) in [(Mutant::StuckBit, false), (Mutant::StuckWire, true)] {
        let rig = Rig::new(mutant);
        assert!(rig.backend.write_at(&[0, 1].repeat(8192), 0, WriteFlags::NONE).is_ok());
        let bits = |offset: usize| {
            let mut buf = vec![0; 4096];
            assert!(rig.backend.read_at(&mut buf, offset as u64).is_ok());
            let wrong = buf.iter().zip([0, 1].repeat(2048)).enumerate().filter(|(_, (is, was))| *is != was);
            wrong.map(|(at, _)| at).collect::<Vec<_>>()
        };
        assert_eq!(bits(0), bits(0), "{mutant}: for ever");
        assert_eq!(bits(0) == bits(4096), same_place, "{mutant}");
    }
}

#[test]
fn stale_cache_serves_what_was_overwritten() {
    let rig = Rig::new(Mutant::StaleCache);
    rig.write(0, 2, 1);
    assert_eq!((rig.read(0, 2), rig.hits()), (vec![0, 1], 1), "the first block was cached before");
    rig.write(0, 1, 2);
    assert_eq!(rig.read(0, 1), [1]);
}

#[test]
fn lagging_mirror_has_what_was_there_before() {
    let rig = Rig::new(Mutant::LaggingMirror);
    rig.write(0, 2, 1);
    assert_eq!((rig.read(0, 2), rig.hits()), (vec![1, 1], 0), "zeroes were there before");
    rig.write(0, 2, 2);
    assert_eq!((rig.read(0, 2), rig.read(1, 1), rig.hits()), (vec![1, 2], vec![2], 1));
    rig.discard(0, 1);
    assert_eq!((rig.read(0, 2), rig.hits()), (vec![0, 2], 1));
}

#[test]
fn unwritten_extent_reads_as_zeroes() {
    let rig = Rig::new(Mutant::UnwrittenExtent);
    rig.write(0, 2, 1);
    assert_eq!((rig.read(0, 2), rig.read(1, 1), rig.hits()), (vec![0, 1], vec![1], 1));
    rig.write(4, 1, 2);
    assert_eq!((rig.read(0, 2), rig.hits()), (vec![1, 1], 1), "another was written since");
}

#[test]
fn zeroed_buffer_stores_a_page_of_zeroes() {
    let rig = Rig::new(Mutant::ZeroedBuffer);
    rig.write(0, 32, 7);
    assert_eq!(rig.read(0, 32).chunks(8).filter(|page| *page == [0; 8]).count(), 1);
    assert_eq!(rig.hits(), 1);
}

#[test]
fn short_io_is_reported_as_full() {
    let rig = Rig::every(Mutant::ShortIoAsFull, 2);
    rig.write(0, 8, 7);
    let stored = rig.read(0, 8);
    // Either the write or the read was cut short.
    assert!(stored[7] == 0 || stored[7] == 0xee, "{stored:?}");
    assert_eq!(rig.hits(), 1);
}

#[test]
fn cross_device_bleed_is_decoded() {
    let mut plot = Plot::new(Seed::new(1));
    let foreign = Arc::new(Pattern::new(Seed::new(9), 3));
    plot.foreign = Some(Arc::clone(&foreign));
    let planted = Planted { mutant: Mutant::CrossDeviceBleed, every: 1 };
    let backend = plant_backend(planted, Arc::new(Memory::new(DEVICE)), &plot);
    assert!(backend.write_at(&[7; BLOCK], 1024, WriteFlags::NONE).is_ok());
    let mut sector = [0; BLOCK];
    assert!(backend.read_at(&mut sector, 1024).is_ok());
    assert!(foreign.sector_matches(&sector, 2, 1));
}

#[test]
fn end_of_device_is_cut_short() {
    let rig = Rig::new(Mutant::EndOfDevice);
    let last = (DEVICE / BLOCK - 1) as u64;
    rig.write(last - 1, 2, 7);
    assert_eq!((rig.read(last - 1, 1), rig.hits()), (vec![7], 1));
    assert_eq!(rig.read(last, 1), [0xee], "not read");
}

#[test]
fn shifted_and_swapped() {
    let rig = Rig::new(Mutant::ShiftedWrite);
    let mut data = [0; BLOCK];
    data[0] = 1;
    assert!(rig.backend.write_at(&data, 0, WriteFlags::NONE).is_ok());
    let mut seen = [0; BLOCK];
    assert!(rig.backend.read_at(&mut seen, 0).is_ok());
    assert!((1..=64).any(|shift| seen[shift] == 1));

    let rig = Rig::new(Mutant::SwappedBlocks);
    assert!(rig.backend.write_at(&[[1; BLOCK], [2; BLOCK]].concat(), 0, WriteFlags::NONE).is_ok());
    assert_eq!((rig.read(0, 2), rig.hits()), (vec![2, 1], 1));
}

#[test]
fn base_images_come_back() {
    let rig = Rig::new(Mutant::RefetchOverwrites);
    rig.write(0, 1, 7);
    assert_eq!((rig.read(1, 1), rig.hits()), (vec![0], 0));
    assert_eq!((rig.read(0, 2), rig.hits()), (vec![0, 0], 1));

    let rig = Rig::new(Mutant::MixedFetchRead);
    rig.write(0, 1, 7);
    assert_eq!((rig.read(0, 1), rig.hits()), (vec![7], 0), "all of it was fetched");
    assert_eq!((rig.read(0, 2), rig.hits()), (vec![0, 0], 1));
    assert_eq!(rig.read(0, 1), [7], "the media are fine");
}

#[test]
fn rmw_neighbour_is_rewritten() {
    let rig = Rig::new(Mutant::RmwNeighbour);
    rig.write(1, 1, 1);
    rig.write(2, 1, 2);
    rig.write(1, 1, 3);
    // As it was before its last write.
    assert_eq!((rig.read(1, 2), rig.hits()), (vec![3, 0], 1));
    rig.write(8, 8, 4);
    assert_eq!((rig.read(7, 10)[1..9].to_vec(), rig.hits()), (vec![4; 8], 1), "a whole unit has no neighbour");
}

#[test]
fn rebuild_loses_what_is_written_meanwhile() {
    let rig = Rig::new(Mutant::RebuildLosesWrite);
    for block in 0..8 {
        assert_eq!(rig.hits(), 0);
        rig.write(block, 1, 7);
    }
    assert_eq!((rig.read(0, 8), rig.hits()), (vec![0; 8], 1));
}

#[test]
fn early_commit_is_late_and_right() {
    let rig = Rig::new(Mutant::EarlyCommit);
    rig.write(5, 1, 7);
    assert_eq!((rig.read(5, 1), rig.hits()), (vec![0], 1));
    for _ in 0..64 {
        rig.read(0, 1);
    }
    assert_eq!(rig.read(5, 1), [7]);
    rig.write(5, 1, 8);
    rig.write(5, 1, 9);
    assert_eq!(rig.read(5, 1), [8], "in order");
}

#[test]
fn late_retry_covers_a_newer_write() {
    let rig = Rig::new(Mutant::LateRetry);
    rig.write(5, 1, 7);
    rig.write(6, 1, 1);
    assert_eq!((rig.read(5, 1), rig.hits()), (vec![7], 0));
    rig.write(5, 1, 8);
    assert_eq!((rig.read(5, 1), rig.hits()), (vec![7], 1));
}

#[test]
fn hole_leak_returns_old_memory() {
    let rig = Rig::new(Mutant::HoleLeak);
    assert_eq!(rig.read(9, 1), [0]);
    rig.write(0, 1, 7);
    assert_eq!((rig.read(0, 1), rig.read(9, 1), rig.hits()), (vec![7], vec![7], 1));
}

#[test]
fn discards_take_too_much() {
    let rig = Rig::new(Mutant::DiscardOffByOne);
    rig.write(0, 32, 7);
    rig.discard(8, 8);
    assert_eq!((rig.read(7, 11), rig.hits()), ([&[7][..], &[0; 9], &[7]].concat(), 1));

    let rig = Rig::new(Mutant::DiscardRoundsOut);
    rig.write(0, 32, 7);
    rig.discard(8, 8);
    assert_eq!((rig.read(7, 10)[0], rig.hits()), (7, 0), "whole units");
    rig.discard(18, 2);
    assert_eq!((rig.read(16, 9), rig.hits()), ([&[0; 8][..], &[7]].concat(), 1));
}

#[test]
fn late_punch_hits_what_was_written_since() {
    let rig = Rig::new(Mutant::LatePunch);
    rig.write(0, 4, 7);
    rig.discard(0, 4);
    rig.write(1, 1, 8);
    for block in 10..13 {
        assert_eq!((rig.read(0, 4), rig.hits()), (vec![0, 8, 0, 0], 0));
        rig.write(block, 1, 1);
    }
    assert_eq!((rig.read(0, 4), rig.hits()), (vec![0; 4], 1));
}

#[test]
fn zeroes_that_are_not_written() {
    let rig = Rig::new(Mutant::WriteZeroesIgnored);
    rig.write(0, 2, 7);
    rig.zero(0, 1);
    assert_eq!((rig.read(0, 2), rig.hits()), (vec![7, 7], 1));

    let rig = Rig::new(Mutant::ZeroesEdgesKept);
    rig.write(0, 32, 7);
    rig.zero(7, 10);
    assert_eq!((rig.read(7, 10), rig.hits()), ([&[7][..], &[0; 8], &[7]].concat(), 1));
}

/// Tells what a mutant admits to.
pub(super) fn admitted(plot: &mut Plot) -> Arc<Mutex<Vec<(OpKind, SectorRange, i32)>>> {
    let told: Arc<Mutex<Vec<_>>> = Arc::default();
    let sink = Arc::clone(&told);
    plot.injected = Some(Arc::new(move |kind, range, errno| {
        sink.lock().unwrap_or_else(PoisonError::into_inner).push((kind, range, errno));
    }));
    told
}

#[test]
fn errors_are_swallowed_or_stick() {
    let run = |mutant| {
        let mut plot = Plot::new(Seed::new(1));
        let told = admitted(&mut plot);
        let backend = plant_backend(Planted { mutant, every: 100 }, Arc::new(Memory::new(DEVICE)), &plot);
        let errors = (0..200).filter(|_| backend.write_at(&[7; BLOCK], 1024, WriteFlags::NONE).is_err()).count();
        let told = told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert!(told.iter().all(|one| *one == (OpKind::Write, SectorRange::new(2, 1), 5)));
        (errors, told.len(), plot.hits.count())
    };
    assert_eq!(run(Mutant::ErrorSwallowed), (0, 2, 2));
    let (errors, told, hits) = run(Mutant::ErrorSticky);
    assert!(told >= 1 && hits >= 20 && errors as u64 == told as u64 + hits, "{errors} {told} {hits}");
}

#[test]
fn controls_admit_their_errors() {
    for mutant in [Mutant::ErroredWrite, Mutant::PartialThenError] {
        let mut plot = Plot::new(Seed::new(1));
        let told = admitted(&mut plot);
        let backend = plant_backend(Planted { mutant, every: 1 }, Arc::new(Memory::new(DEVICE)), &plot);
        let mut whole = [0_u32; 3];
        for _ in 0..60 {
            assert!(backend.discard(0, 4096).is_ok() || mutant == Mutant::PartialThenError);
            assert!(backend.write_at(&[7; 4 * BLOCK], 0, WriteFlags::FUA).is_err());
            let mut buf = [0; 4 * BLOCK];
            let _what_was_read = backend.read_at(&mut buf, 0);
            let done = buf.chunks(BLOCK).filter(|block| block[0] == 7).count();
            whole[usize::from(done > 0) + usize::from(done == 4)] += 1;
        }
        assert_eq!(plot.hits.count(), told.lock().unwrap_or_else(PoisonError::into_inner).len() as u64);
        assert!(mutant == Mutant::PartialThenError || whole.iter().all(|count| *count > 0), "{whole:?}");
    }
}

#[test]
fn limits_that_are_declared_are_not_kept() {
    let planted = Planted { mutant: Mutant::WrongLimits, every: 1 };
    let honest = Geometry::bytes(DEVICE as u64).discard(4096).write_zeroes_max(64 << 10);
    let declared = declared_geometry(planted, honest);
    assert!(declared.write_zeroes > honest.write_zeroes);
    let rig = Rig::new(Mutant::WrongLimits);
    rig.write(0, 256, 7);
    rig.discard(0, 128);
    assert_eq!((rig.read(0, 129)[127..].to_vec(), rig.hits()), (vec![0, 7], 0));
    rig.discard(0, 256);
    assert_eq!((rig.read(200, 1), rig.hits()), (vec![7], 1));
    assert!(rig.backend.write_zeroes(0, 128 << 10, ZeroFlags::NONE).is_err());
}

#[test]
fn read_only_is_not_declared() {
    let planted = Planted { mutant: Mutant::RoNotEnforced, every: 1 };
    assert!(!declared_geometry(planted, Geometry::bytes(4096).read_only()).read_only);
    let rig = Rig::new(Mutant::RoNotEnforced);
    rig.write(0, 1, 7);
    assert_eq!((rig.read(0, 1), rig.hits()), (vec![7], 1));
}

#[test]
fn ids_leak() {
    let plot = Plot::new(Seed::new(1));
    assert!(!gives_id_back(Planted { mutant: Mutant::MinorLeak, every: 1 }, &plot));
    assert!(gives_id_back(Planted::from(Mutant::LostWrite), &plot));
    assert_eq!(plot.hits.count(), 1);
}

#[test]
fn garbage_is_left_by_discards() {
    let rig = Rig::new(Mutant::DiscardGarbage);
    rig.write(0, 64, 7);
    rig.discard(0, 64);
    let mut buf = vec![0; 64 * BLOCK];
    assert!(rig.backend.read_at(&mut buf, 0).is_ok());
    let of = |byte: u8| buf.chunks(BLOCK).filter(|block| block.iter().all(|b| *b == byte)).count();
    assert!(of(7) > 0 && of(0) > 0 && of(0xff) > 0 && of(7) + of(0) + of(0xff) < 64);
}

#[test]
fn written_twice_is_written() {
    let rig = Rig::new(Mutant::WrittenTwice);
    rig.write(0, 4, 7);
    assert_eq!((rig.read(0, 5), rig.hits()), (vec![7, 7, 7, 7, 0], 1));
}

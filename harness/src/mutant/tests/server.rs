//! Servers by hand.

use ublkit::Operation;

use super::*;
use crate::sim::server::{Buffers, Commit, PlainServer, TagId, Work};

const LEN: usize = 128 << 10;

struct Rig {
    server: Box<dyn Server>,
    disk: Arc<Memory>,
    buffers: Buffers,
    rng: crate::seed::SeededRng,
    plot: Plot,
}

fn tag(queue: u16, tag: u16) -> TagId {
    TagId { queue, tag }
}

fn work(operation: Operation, tag: TagId, offset: u64, len: usize) -> Work {
    Work { tag, operation, offset, len: len as u64, fua: false, no_unmap: false }
}

impl Rig {
    fn new(mutant: Mutant) -> Self {
        Self::with(mutant, 1, Plot::new(Seed::new(1)))
    }

    fn with(mutant: Mutant, every: u64, plot: Plot) -> Self {
        let disk = Arc::new(Memory::new(DEVICE));
        let server: Box<dyn Server> = Box::new(PlainServer::new(Arc::clone(&disk) as Arc<dyn Backend>, 0));
        let server = plant_server(Planted { mutant, every }, server, &plot);
        Self { server, disk, buffers: Buffers::new(2, 4, LEN), rng: Seed::new(1).rng(), plot }
    }

    fn read(&mut self, tag: TagId, offset: u64, len: usize) {
        self.server.take(work(Operation::Read, tag, offset, len), &mut self.buffers);
    }

    fn write(&mut self, tag: TagId, offset: u64, len: usize, byte: u8) {
        self.buffers.get_mut(tag)[..len].fill(byte);
        self.server.take(work(Operation::Write, tag, offset, len), &mut self.buffers);
    }

    fn step(&mut self) -> Vec<Commit> {
        let mut commits = Vec::new();
        self.server.step(&mut self.buffers, &mut self.rng, &mut commits);
        commits
    }

    /// Works until there is nothing in hand.
    fn drain(&mut self) -> Vec<Commit> {
        let mut commits = Vec::new();
        while self.server.pending() > 0 {
            commits.append(&mut self.step());
        }
        commits
    }

    fn stored(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0; len];
        assert!(self.disk.read_at(&mut buf, offset).is_ok());
        buf
    }

    fn hits(&self) -> u64 {
        self.plot.hits.count()
    }
}

#[test]
fn a_mutant_whose_turn_never_comes_is_right() {
    let always = [Mutant::FetchMissing, Mutant::NoIoFlusher];
    for mutant in Mutant::ALL.into_iter().filter(|mutant| !always.contains(mutant)) {
        let mut rig = Rig::with(mutant, u64::MAX, Plot::new(Seed::new(1)));
        for round in 0..4_u64 {
            for slot in 0..4 {
                rig.write(tag(1, slot), u64::from(slot) * 8192, 8192, slot as u8 + round as u8);
            }
            assert_eq!(rig.server.pending(), 4);
            assert_eq!(rig.drain(), [0, 1, 2, 3].map(|slot| Commit { tag: tag(1, slot), result: 8192 }), "{mutant}");
            for slot in 0..4 {
                rig.read(tag(0, slot), u64::from(slot) * 8192, 4096);
            }
            rig.drain();
            for slot in 0..4 {
                assert_eq!(rig.buffers.get_mut(tag(0, slot))[..4096], [slot as u8 + round as u8; 4096], "{mutant}");
            }
        }
        assert!(rig.server.fetches(tag(0, 0)) && rig.server.io_flusher() && !rig.server.allocates());
        assert_eq!(rig.hits(), 0, "{mutant}");
    }
}

#[test]
fn tags_are_swapped() {
    let mut rig = Rig::new(Mutant::TagSwap);
    rig.write(tag(0, 0), 0, 512, 1);
    rig.write(tag(0, 1), 512, 512, 2);
    assert_eq!(rig.drain().len(), 2);
    rig.read(tag(0, 0), 0, 512);
    assert_eq!((rig.drain().len(), rig.buffers.get_mut(tag(0, 0))[0]), (1, 1), "there is no other read");
    rig.read(tag(0, 0), 0, 512);
    rig.read(tag(0, 1), 512, 512);
    assert_eq!(rig.drain(), [0, 1].map(|slot| Commit { tag: tag(0, slot), result: 512 }));
    let seen = [0, 1].map(|slot| rig.buffers.get_mut(tag(0, slot))[0]);
    assert_eq!((seen, rig.hits()), ([2, 1], 1));
}

#[test]
fn a_committed_buffer_is_still_used() {
    let mut rig = Rig::new(Mutant::BufferReuse);
    rig.write(tag(0, 0), 0, 1024, 1);
    assert_eq!(rig.step(), [Commit { tag: tag(0, 0), result: 1024 }]);
    rig.write(tag(0, 0), 4096, 512, 2);
    assert_eq!((rig.stored(0, 1024)[..512].to_vec(), rig.hits()), (vec![2; 512], 1));
    assert_eq!(rig.drain(), [Commit { tag: tag(0, 0), result: 512 }]);
    assert_eq!((rig.stored(512, 512), rig.stored(4096, 512)), (vec![1; 512], vec![2; 512]));
    // Nobody uses it: late, and right.
    rig.write(tag(0, 1), 8192, 512, 3);
    assert_eq!(rig.drain(), [Commit { tag: tag(0, 1), result: 512 }]);
    assert_eq!((rig.stored(8192, 512), rig.hits()), (vec![3; 512], 1));
}

#[test]
fn a_result_comes_twice() {
    let mut rig = Rig::new(Mutant::DoubleCommit);
    rig.write(tag(0, 0), 0, 512, 1);
    assert_eq!(rig.drain(), [Commit { tag: tag(0, 0), result: 512 }]);
    rig.write(tag(0, 0), 512, 512, 2);
    let mut commits = Vec::new();
    rig.server.step(&mut rig.buffers, &mut rig.rng, &mut commits);
    // It is done after it was committed, and nobody hears of that.
    assert_eq!((commits, rig.hits()), (vec![Commit { tag: tag(0, 0), result: 512 }], 1));
    assert_eq!((rig.drain(), rig.stored(512, 512)), (vec![], vec![2; 512]));
}

#[test]
fn results_are_wrong() {
    let mut rig = Rig::new(Mutant::WrongResultLen);
    let mut results = std::collections::BTreeSet::new();
    for _ in 0..20 {
        rig.read(tag(0, 0), 0, 4096);
        results.extend(rig.drain().iter().map(|commit| commit.result));
    }
    assert_eq!((results.into_iter().collect::<Vec<_>>(), rig.hits()), (vec![0, 8], 20));
}

#[test]
fn errors_lose_their_sign() {
    let mut plot = Plot::new(Seed::new(1));
    let told = super::backend::admitted(&mut plot);
    let mut rig = Rig::with(Mutant::ErrnoSign, 1, plot.clone());
    rig.write(tag(0, 0), 512, 512, 7);
    assert_eq!(rig.drain(), [Commit { tag: tag(0, 0), result: 5 }]);
    assert_eq!(rig.stored(512, 512), [0; 512]);
    let told = told.lock().unwrap_or_else(PoisonError::into_inner).clone();
    assert_eq!(told, [(OpKind::Write, SectorRange::new(1, 1), 5)]);
    let mut rig = Rig::with(Mutant::ErrnoSign, u64::MAX, Plot::new(Seed::new(1)));
    rig.read(tag(0, 0), DEVICE as u64, 512);
    assert_eq!((rig.drain()[0].result, rig.hits()), (22, 1));
}

#[test]
fn flags_are_masked_away() {
    #[derive(Debug, Default)]
    struct Flags(Vec<bool>);
    impl Server for Flags {
        fn take(&mut self, work: Work, _buffers: &mut Buffers) {
            self.0.push(work.fua);
            assert_eq!(work.operation == Operation::Flush, work.len == 0);
        }
        fn step(&mut self, _: &mut Buffers, _: &mut crate::seed::SeededRng, _: &mut Vec<Commit>) {}
        fn pending(&self) -> usize {
            // Tells what it saw.
            self.0.iter().filter(|fua| **fua).count()
        }
    }
    let plot = Plot::new(Seed::new(1));
    let planted = Planted { mutant: Mutant::OpFlagMask, every: 1 };
    let mut server = plant_server(planted, Box::new(Flags::default()), &plot);
    let mut buffers = Buffers::new(1, 2, 512);
    server.take(Work { fua: true, ..work(Operation::Write, tag(0, 0), 0, 512) }, &mut buffers);
    server.take(work(Operation::Write, tag(0, 1), 0, 512), &mut buffers);
    assert_eq!((server.pending(), plot.hits.count()), (0, 1));
}

#[test]
fn data_come_from_the_wrong_memory() {
    // Where data of a request of this queue and length go wrong, and with what they are replaced.
    for (mutant, queue, len) in [
        (Mutant::UserCopyOffset, 1, 4096),
        (Mutant::SglContiguity, 0, LEN),
        (Mutant::ZcEarlyUnregister, 0, 4096),
        (Mutant::AutobufFallback, 0, 4096),
    ] {
        let mut rig = Rig::new(mutant);
        rig.buffers.get_mut(tag(0, 2)).fill(9);
        let mut data = vec![7; len];
        data[0] = 6;
        rig.buffers.get_mut(tag(queue, 2))[..len].copy_from_slice(&data);
        rig.server.take(work(Operation::Write, tag(queue, 2), 0, len), &mut rig.buffers);
        assert_eq!(rig.drain().len(), 1);
        let stored = rig.stored(0, len);
        assert!(stored != data && rig.hits() == 1, "{mutant}");
        match mutant {
            Mutant::UserCopyOffset => assert_eq!(stored, vec![9; len]),
            Mutant::SglContiguity => assert_eq!(stored[..65537], [&data[..65536], &[6]].concat()),
            _ => assert!(stored.ends_with(&[0; 512])),
        }
        // What is read does not reach its buffer.
        rig.buffers.get_mut(tag(queue, 1)).fill(3);
        assert!(rig.disk.write_at(&vec![5; len], 0, WriteFlags::NONE).is_ok());
        rig.read(tag(queue, 1), 0, len);
        rig.drain();
        let seen = rig.buffers.get_mut(tag(queue, 1))[len - 1];
        assert_eq!(seen, if mutant == Mutant::AutobufFallback { 0 } else { 3 }, "{mutant}");
        if mutant == Mutant::UserCopyOffset {
            assert_eq!(rig.buffers.get_mut(tag(0, 1))[0], 5, "it reaches another one");
        }
    }
}

#[test]
fn small_requests_and_the_first_queue_are_right() {
    for (mutant, queue, len) in [(Mutant::UserCopyOffset, 0, 4096), (Mutant::SglContiguity, 1, 65536)] {
        let mut rig = Rig::new(mutant);
        rig.write(tag(queue, 0), 0, len, 7);
        rig.drain();
        assert_eq!((rig.stored(0, len), rig.hits()), (vec![7; len], 0), "{mutant}");
    }
}

#[test]
fn a_completion_never_comes() {
    let mut rig = Rig::new(Mutant::CqeDropped);
    rig.write(tag(0, 0), 0, 512, 7);
    assert_eq!((rig.drain(), rig.stored(0, 1), rig.hits()), (vec![], vec![7], 1));
}

#[test]
fn a_slot_is_not_fetched() {
    let rig = Rig::new(Mutant::FetchMissing);
    assert!(!rig.server.fetches(tag(0, 0)) && rig.server.fetches(tag(0, 1)) && rig.server.fetches(tag(1, 0)));
    assert_eq!(rig.hits(), 1);
}

#[test]
fn a_server_that_stops_drops_what_it_has() {
    let mut rig = Rig::new(Mutant::StopWithInflight);
    rig.write(tag(0, 0), 0, 512, 7);
    assert_eq!(rig.step().len(), 1);
    rig.plot.stopping.store(true, Ordering::Relaxed);
    assert_eq!((rig.server.pending(), rig.hits()), (0, 0), "it had nothing");
    rig.write(tag(0, 0), 512, 512, 7);
    assert_eq!((rig.server.pending(), rig.step(), rig.hits()), (0, vec![], 1));
    assert!(!rig.plot.again(Open::Reopen, None).stopping.load(Ordering::Relaxed));
}

#[test]
fn a_server_outside_writeback_allocates() {
    let rig = Rig::with(Mutant::NoIoFlusher, 4, Plot::new(Seed::new(1)));
    assert!(!rig.server.io_flusher());
    assert_eq!((0..40).filter(|_| rig.server.allocates()).count(), 10);
    assert_eq!(rig.hits(), 10);
}

#[test]
fn requests_in_pieces_interleave_and_are_right() {
    for mutant in [Mutant::ReadInPieces, Mutant::WriteInPieces] {
        let mut mixed = false;
        for seed in 0..20 {
            let mut rig = Rig::with(mutant, 1, Plot::new(Seed::new(seed)));
            rig.write(tag(0, 0), 0, 65536, 1);
            rig.drain();
            rig.write(tag(0, 0), 0, 65536, 2);
            if mutant == Mutant::WriteInPieces {
                rig.write(tag(0, 1), 0, 65536, 3);
            }
            rig.buffers.get_mut(tag(0, 2)).fill(9);
            rig.read(tag(0, 2), 0, 65536);
            let mut commits = rig.drain();
            commits.sort_unstable_by_key(|commit| commit.tag);
            assert!(commits.iter().all(|commit| commit.result == 65536));
            assert_eq!(commits.len(), if mutant == Mutant::WriteInPieces { 3 } else { 2 });
            let seen = if mutant == Mutant::ReadInPieces {
                rig.buffers.get_mut(tag(0, 2))[..65536].to_vec()
            } else {
                rig.stored(0, 65536)
            };
            let blocks: Vec<_> = seen.chunks(4096).map(|block| block[0]).collect();
            assert!(seen.chunks(4096).all(|block| block.iter().all(|byte| *byte == block[0])));
            assert!(blocks.iter().all(|byte| (1..=3).contains(byte)), "{blocks:?}");
            mixed |= blocks.iter().any(|byte| *byte != blocks[0]);
            assert!(rig.hits() > 0);
        }
        assert!(mixed || mutant == Mutant::ReadInPieces);
    }
}

//! What only threads show.

use std::sync::{Mutex, PoisonError};
use std::thread;

use super::*;

const PAGE: u64 = 4096;

/// Pages that are read, changed and written back, with a lock on reading and on writing, but none on both.
struct Pages(Mutex<Vec<u8>>);

impl Pages {
    fn get(&self, at: u64) -> Vec<u8> {
        let pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pages[(at / PAGE * PAGE) as usize..][..PAGE as usize].to_vec()
    }

    fn put(&self, at: u64, page: &[u8]) {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pages[(at / PAGE * PAGE) as usize..][..PAGE as usize].copy_from_slice(page);
    }
}

impl Backend for Pages {
    fn geometry(&self) -> Geometry {
        Geometry::bytes(1 << 20)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        for (sector, at) in buf.chunks_mut(512).zip((offset..).step_by(512)) {
            sector.copy_from_slice(&self.get(at)[(at % PAGE) as usize..][..512]);
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, _flags: WriteFlags) -> io::Result<()> {
        for (sector, at) in buf.chunks(512).zip((offset..).step_by(512)) {
            let mut page = self.get(at);
            page[(at % PAGE) as usize..][..512].copy_from_slice(sector);
            thread::yield_now();
            self.put(at, &page);
        }
        Ok(())
    }
}

#[test]
fn a_change_without_a_lock_is_found_by_threads_alone() {
    let pages = || Pages(Mutex::new(vec![0; 1 << 20]));
    check(pages).seeds(10).ops(500).run();
    let found = check(pages).seeds(3).ops(200).threads(4).try_run().expect_err("two changes cross");
    assert!(found.script().is_none() && found.operations() > 0, "{found}");
    assert!(found.to_string().contains("2 threads on the first 2 blocks"), "{found}");
}

/// Writes byte by byte, so to say.
struct Tears(Mutex<Vec<u8>>);

impl Backend for Tears {
    fn geometry(&self) -> Geometry {
        Geometry::bytes(1 << 18)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        buf.copy_from_slice(&bytes[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, _flags: WriteFlags) -> io::Result<()> {
        for (part, at) in buf.chunks(256).zip((offset as usize..).step_by(256)) {
            let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            bytes[at..at + 256].copy_from_slice(part);
            drop(bytes);
            thread::yield_now();
        }
        Ok(())
    }
}

#[test]
fn torn_blocks_are_wrong_unless_that_is_said_to_be_right() {
    let tears = || Tears(Mutex::new(vec![0; 1 << 18]));
    check(tears).seeds(3).ops(200).threads(4).torn_by_races().run();
    let found = check(tears).seeds(3).ops(200).threads(4).try_run().expect_err("blocks are torn");
    assert!(found.to_string().contains(".torn_by_races()"), "{found}");
}

//! What the server keeps, and what of it outlives the server.
//!
//! The storage is a file that the loading process made and holds: whatever was written to it is there for the next
//! server. In front of it there may be a cache in the server's own memory, which dies with the server. Whether there may be
//! one depends on the mode. A device that dies with its server is a disk that was pulled: what was not flushed may be lost,
//! and the applications see it die. A device that is taken over goes on as if nothing had been, so that everything that was
//! ever acknowledged has to be there, flushed or not.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use super::Plant;
use super::mode::Mode;
use super::protocol::Order;

/// The logical block of the device, in bytes.
pub(super) const BLOCK: usize = 4096;
/// Every so many writes, a block of the cache is written out early, as real caches do.
const EVICT_EVERY: u64 = 8;

/// The storage of a device, as its server sees it.
#[derive(Debug)]
pub(super) struct Store {
    file: File,
    /// A file's read may meet half of a write, within a block too; a disk's may not.
    turn: RwLock<()>,
    /// Blocks that are not in the file yet.
    cache: Option<Mutex<Cache>>,
    plant: Option<Plant>,
    /// Writes that are yet to be swallowed.
    swallow: AtomicU32,
}

#[derive(Debug, Default)]
struct Cache {
    dirty: HashMap<u64, Box<[u8]>>,
    writes: u64,
}

impl Store {
    /// Opens the storage of an order.
    pub(super) fn open(order: &Order) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(&order.storage)?;
        if let Some(older) = &order.older {
            Self::mix_up(&file, older, order)?;
        }
        let cached = order.mode == Mode::None || order.plant == Some(Plant::CommitBeforeWrite);
        let forgets = order.plant == Some(Plant::ForgetReissued) && order.recover;
        let in_hand = u32::from(order.queues) * u32::from(order.depth);
        Ok(Self {
            file,
            turn: RwLock::new(()),
            cache: cached.then(Mutex::default),
            plant: order.plant,
            swallow: AtomicU32::new(if forgets { in_hand } else { 0 }),
        })
    }

    /// The planted bug of a server that keeps a copy of its storage when it begins, and its successor serves that.
    fn mix_up(file: &File, copy: &std::path::Path, order: &Order) -> io::Result<()> {
        let copy = File::options().read(true).write(true).open(copy)?;
        let (from, to) = if order.lives == 0 { (file, &copy) } else { (&copy, file) };
        let mut bytes = vec![0; order.bytes as usize];
        from.read_exact_at(&mut bytes, 0)?;
        to.write_all_at(&bytes, 0)
    }

    fn cache(&self) -> Option<MutexGuard<'_, Cache>> {
        self.cache.as_ref().map(|cache| cache.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let Some(cache) = self.cache() else {
            let _turn = self.turn.read().unwrap_or_else(PoisonError::into_inner);
            return self.file.read_exact_at(buf, offset);
        };
        self.file.read_exact_at(buf, offset)?;
        for (block, bytes) in (offset / BLOCK as u64..).zip(buf.chunks_exact_mut(BLOCK)) {
            if let Some(dirty) = cache.dirty.get(&block) {
                bytes.copy_from_slice(dirty);
            }
        }
        Ok(())
    }

    pub(super) fn write(&self, data: &[u8], offset: u64, fua: bool) -> io::Result<()> {
        let swallow = |left: u32| left.checked_sub(1);
        if self.swallow.fetch_update(Ordering::Relaxed, Ordering::Relaxed, swallow).is_ok() {
            return Ok(());
        }
        let Some(mut cache) = self.cache() else {
            let _turn = self.turn.write().unwrap_or_else(PoisonError::into_inner);
            return self.file.write_all_at(data, offset);
        };
        let blocks = (offset / BLOCK as u64..).zip(data.chunks_exact(BLOCK));
        if fua {
            self.file.write_all_at(data, offset)?;
            for (block, _) in blocks {
                cache.dirty.remove(&block);
            }
            return Ok(());
        }
        cache.dirty.extend(blocks.map(|(block, bytes)| (block, bytes.into())));
        cache.writes += 1;
        if cache.writes.is_multiple_of(EVICT_EVERY)
            && let Some(block) = cache.dirty.keys().next().copied()
            && let Some(bytes) = cache.dirty.remove(&block)
        {
            self.file.write_all_at(&bytes, block * BLOCK as u64)?;
        }
        Ok(())
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        if self.plant == Some(Plant::FlushNotPersisted) {
            return Ok(());
        }
        self.close()
    }

    /// Writes everything out, as a server does that ends well.
    pub(super) fn close(&self) -> io::Result<()> {
        let Some(mut cache) = self.cache() else { return Ok(()) };
        for (block, bytes) in cache.dirty.drain() {
            self.file.write_all_at(&bytes, block * BLOCK as u64)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(file: &tempfile::NamedTempFile, mode: Mode, plant: Option<Plant>, recover: bool) -> Order {
        file.as_file().set_len(8 * BLOCK as u64).expect("grow");
        Order {
            id: 0,
            recover,
            mode,
            storage: file.path().to_owned(),
            older: None,
            lives: u32::from(recover),
            bytes: 8 * BLOCK as u64,
            queues: 1,
            depth: 1,
            hold: None,
            plant,
        }
    }

    /// What a store says is there, and what the next one finds.
    fn survives(mode: Mode, plant: Option<Plant>, recover: bool, then: impl Fn(&Store)) -> (u8, u8) {
        let file = tempfile::NamedTempFile::new().expect("temp file");
        let order = order(&file, mode, plant, recover);
        let store = Store::open(&order).expect("open");
        then(&store);
        let mut buf = vec![0; BLOCK];
        store.read(&mut buf, BLOCK as u64).expect("read");
        let seen = buf[0];
        drop(store);
        file.as_file().read_exact_at(&mut buf, BLOCK as u64).expect("read the file");
        (seen, buf[0])
    }

    #[test]
    fn a_device_that_is_taken_over_has_everything_and_one_that_dies_what_was_flushed() {
        let write = |store: &Store| store.write(&[7; BLOCK], BLOCK as u64, false).expect("write");
        let through = |store: &Store| store.write(&[7; BLOCK], BLOCK as u64, true).expect("write");
        let flushed = |store: &Store| {
            store.write(&[7; BLOCK], BLOCK as u64, false).expect("write");
            store.flush().expect("flush");
        };
        assert_eq!(survives(Mode::Wait, None, false, write), (7, 7));
        assert_eq!(survives(Mode::None, None, false, write), (7, 0));
        assert_eq!(survives(Mode::None, None, false, through), (7, 7));
        assert_eq!(survives(Mode::None, None, false, flushed), (7, 7));
    }

    #[test]
    fn what_is_planted_loses_what_was_promised() {
        let write = |store: &Store| store.write(&[7; BLOCK], BLOCK as u64, false).expect("write");
        assert_eq!(survives(Mode::Wait, Some(Plant::CommitBeforeWrite), false, write), (7, 0));
        assert_eq!(survives(Mode::Reissue, Some(Plant::ForgetReissued), true, write), (0, 0));
        let flushed = |store: &Store| {
            store.write(&[7; BLOCK], BLOCK as u64, false).expect("write");
            store.flush().expect("flush");
        };
        assert_eq!(survives(Mode::None, Some(Plant::FlushNotPersisted), false, flushed), (7, 0));
    }
}

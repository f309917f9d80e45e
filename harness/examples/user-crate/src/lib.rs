//! A thin disk: chunks of another disk are handed out as they are first written to, and taken back when they are
//! discarded.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ublkit::{Backend, Geometry, WriteFlags};

/// Bytes in a chunk.
const CHUNK: u64 = 4096;

/// A thin disk on another one.
#[derive(Debug)]
pub struct Thin<B> {
    below: B,
    map: Mutex<Map>,
    /// Whether a chunk that had another place before is zeroed when it is handed out again. A disk that does not do so shows
    /// what was discarded.
    clears: bool,
}

/// Which chunk of the disk below holds which chunk of this one.
#[derive(Debug, Default)]
struct Map {
    chunks: BTreeMap<u64, u64>,
    free: Vec<u64>,
    next: u64,
}

impl<B: Backend> Thin<B> {
    /// An empty thin disk, as large as the one below.
    pub fn new(below: B) -> Self {
        Self { below, map: Mutex::default(), clears: true }
    }

    /// One that forgets to clear what it hands out a second time: the bug that the tests are to find.
    pub fn forgetful(below: B) -> Self {
        Self { clears: false, ..Self::new(below) }
    }

    fn map(&self) -> MutexGuard<'_, Map> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a chunk is, and where it is to be if it has no place yet.
    fn place(&self, map: &mut Map, chunk: u64) -> io::Result<u64> {
        if let Some(&place) = map.chunks.get(&chunk) {
            return Ok(place);
        }
        let place = match map.free.pop() {
            Some(used) if self.clears => {
                self.below.write_at(&[0; CHUNK as usize], used * CHUNK, WriteFlags::NONE)?;
                used
            }
            Some(used) => used,
            None => {
                map.next += 1;
                map.next - 1
            }
        };
        map.chunks.insert(chunk, place);
        Ok(place)
    }
}

/// The parts of a range that lie within one chunk each: chunk, offset in it, length.
fn parts(mut offset: u64, mut len: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    std::iter::from_fn(move || {
        let within = offset % CHUNK;
        let part = len.min(CHUNK - within);
        let found = (offset / CHUNK, within, part);
        offset += part;
        len -= part;
        (part > 0).then_some(found)
    })
}

impl<B: Backend> Backend for Thin<B> {
    fn geometry(&self) -> Geometry {
        Geometry::bytes(self.below.geometry().size).discard(CHUNK as u32)
    }

    fn read_at(&self, mut buf: &mut [u8], offset: u64) -> io::Result<()> {
        let map = self.map();
        for (chunk, within, len) in parts(offset, buf.len() as u64) {
            let (part, rest) = buf.split_at_mut(len as usize);
            match map.chunks.get(&chunk) {
                Some(place) => self.below.read_at(part, place * CHUNK + within)?,
                None => part.fill(0),
            }
            buf = rest;
        }
        Ok(())
    }

    fn write_at(&self, mut buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let mut map = self.map();
        for (chunk, within, len) in parts(offset, buf.len() as u64) {
            let (part, rest) = buf.split_at(len as usize);
            let place = self.place(&mut map, chunk)?;
            self.below.write_at(part, place * CHUNK + within, flags)?;
            buf = rest;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut map = self.map();
        for (chunk, _, len) in parts(offset, len) {
            // What is less than a chunk stays: a discard is no promise.
            if len == CHUNK
                && let Some(place) = map.chunks.remove(&chunk)
            {
                map.free.push(place);
            }
        }
        Ok(())
    }
}

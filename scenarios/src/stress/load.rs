//! Loading devices from this process, each byte verified: one thread for each load, one write under way at a time.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::libc;
use ublkit_harness::shadow::{Shadow, ShadowOptions};
use ublkit_harness::{Outcome, Pattern, SECTOR, SectorRange, Seed, SeededRng};

use crate::aligned::AlignedBuf;
use crate::clock::nanoseconds;
use crate::scenario::Failure;

/// Bytes of one write.
pub(super) const BLOCK: usize = 4096;
const BLOCK_SECTORS: u64 = (BLOCK / SECTOR) as u64;

/// Opens a device past the page cache.
pub(super) fn open_direct(path: &Path) -> Result<File, Failure> {
    open_with(path, libc::O_DIRECT)
}

/// Opens a device through the page cache.
pub(super) fn open_buffered(path: &Path) -> Result<File, Failure> {
    open_with(path, 0)
}

fn open_with(path: &Path, flags: i32) -> Result<File, Failure> {
    let open = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
    open.map_err(|error| Failure::io(format_args!("open {}", path.display()), &error))
}

/// A part of a device, what it holds, and who writes there.
pub(super) struct Load {
    pub(super) shadow: Shadow,
    rng: SeededRng,
    buf: AlignedBuf,
    op: u64,
}

/// The end of a load: the write that failed, if one did.
#[derive(Debug)]
pub(super) struct Broken {
    pub(super) error: io::Error,
    /// When it was known; see [`nanoseconds`].
    pub(super) at: u64,
}

impl Load {
    /// On the sectors of `region`, which are zeroes, of a device of `device_bytes`.
    pub(super) fn new(
        seed: Seed,
        worker: u32,
        region: SectorRange,
        device_bytes: u64,
        pattern: &Arc<Pattern>,
        foreign: &Arc<[Pattern]>,
    ) -> Self {
        let shadow = Shadow::new(ShadowOptions {
            region,
            worker,
            pattern: Arc::clone(pattern),
            foreign: Arc::clone(foreign),
            device_sectors: device_bytes / SECTOR as u64,
            initially_zero: true,
        });
        Self { shadow, rng: seed.derive("load", u64::from(worker)).rng(), buf: AlignedBuf::zeroed(BLOCK), op: 0 }
    }

    fn region(&self) -> SectorRange {
        self.shadow.options().region
    }

    /// Writes one block somewhere.
    pub(super) fn write(&mut self, file: &File) -> Result<(), Broken> {
        let blocks = self.region().sectors / BLOCK_SECTORS;
        let block = self.rng.below(blocks.max(1));
        self.write_block(file, block)
    }

    /// Writes block number `block` of the region.
    pub(super) fn write_block(&mut self, file: &File, block: u64) -> Result<(), Broken> {
        let range = SectorRange::new(self.region().first + block * BLOCK_SECTORS, BLOCK_SECTORS);
        self.op += 1;
        let ticket = self.shadow.begin_write(self.op, range, &mut self.buf);
        let written = file.write_all_at(&self.buf, range.offset_bytes());
        let at = nanoseconds();
        let outcome = if written.is_ok() { Outcome::Done } else { Outcome::Failed };
        self.shadow.finish(ticket, outcome);
        written.map_err(|error| Broken { error, at })
    }

    /// Compares the whole region with what `read` says. Returns how many bytes were compared.
    pub(super) fn verify(
        &mut self,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), Failure>,
    ) -> Result<u64, Failure> {
        const CHUNK_SECTORS: u64 = 256;
        let region = self.region();
        let mut buf = AlignedBuf::zeroed((CHUNK_SECTORS as usize * SECTOR).min(region.len_bytes() as usize));
        let mut compared = 0;
        let mut first = region.first;
        while first < region.end() {
            let range = SectorRange::new(first, CHUNK_SECTORS.min(region.end() - first));
            let part = &mut buf[..range.len_bytes() as usize];
            read(range.offset_bytes(), part)?;
            compared += self.shadow.verify(range, part)?.bytes;
            first = range.end();
        }
        Ok(compared)
    }

    /// The same, of the device itself.
    pub(super) fn verify_device(&mut self, file: &File) -> Result<u64, Failure> {
        self.verify(|offset, buf| {
            file.read_exact_at(buf, offset).map_err(|error| Failure::io(format_args!("read at {offset}"), &error))
        })
    }
}

/// Counts writes that were acknowledged, for whoever waits for some.
#[derive(Debug, Default)]
pub(super) struct Acknowledged(AtomicU64);

impl Acknowledged {
    pub(super) fn one(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

//! Reads outside the workers, of a device in which something may be planted that makes errors of its own and admits to them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use ublkit_harness::{OpKind, SECTOR, SectorRange};

use super::device::Subject;
use crate::scenario::Failure;
use crate::target::Target;

/// How often a read is done again, at most, each time for an error that was made.
const TRIES: u32 = 1000;
/// What is not read in halves, in bytes.
const PIECE: usize = 4096;

/// Whoever reads a device and takes no error for the device's that was made.
pub(super) struct Excuses<'a>(Option<&'a Target>);

impl<'a> Excuses<'a> {
    /// With `errors`, something may make them. What was made until now excuses nothing.
    pub(super) fn new(subject: &'a Subject, errors: bool) -> Result<Self, Failure> {
        let target = if errors && let Subject::Ours(target) = subject { Some(target) } else { None };
        target.map_or(Ok(()), |target| target.testimony().map(drop))?;
        Ok(Self(target))
    }

    /// Reads `buf` from `offset`, in bytes: in halves, if somebody made it fail, and the smallest pieces again.
    pub(super) fn read(&self, file: &File, buf: &mut [u8], offset: u64) -> Result<(), Failure> {
        let range = SectorRange::new(offset / SECTOR as u64, (buf.len() / SECTOR) as u64);
        let mut tries = 0;
        loop {
            tries += 1;
            match file.read_exact_at(buf, offset) {
                Ok(()) => return Ok(()),
                Err(error) if tries < TRIES && self.excuses(range, &error)? => {}
                Err(error) => return Err(Failure::io(format_args!("read the device at {offset}"), &error)),
            }
            // A request of one page is one piece to every device.
            let half = (buf.len() / 2).next_multiple_of(PIECE);
            if let Some((first, second)) = buf.split_at_mut_checked(half)
                && !second.is_empty()
            {
                self.read(file, first, offset)?;
                return self.read(file, second, offset + half as u64);
            }
        }
    }

    fn excuses(&self, range: SectorRange, error: &io::Error) -> Result<bool, Failure> {
        let (Some(target), Some(_)) = (self.0, error.raw_os_error()) else { return Ok(false) };
        let made = target.testimony()?.injections;
        Ok(made.iter().any(|made| made.errno.is_some() && made.kind == OpKind::Read && made.range.overlaps(range)))
    }
}

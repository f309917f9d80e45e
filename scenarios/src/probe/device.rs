//! The device part: sizes, limits, and bytes at the same offset on both sides.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use ublkit::blkdev;
use ublkit_harness::{DiscardPromise, Outcome, Pattern, SectorRange, SeededRng, Shadow, ShadowOptions};

use crate::aligned::AlignedBuf;
use crate::context::Context;
use crate::refusals;
use crate::scenario::Failure;
use crate::sysfs::BlockDir;
use crate::target::{BackendKind, Target, TargetArgs};
use crate::units::format_bytes;

/// Devices up to this size are looked at as a whole.
const WHOLE_MAX: u64 = 1 << 30;
/// Of larger ones, this much at each of several places.
const WINDOW: u64 = 4 << 20;
/// Bytes and sectors of an offset stop fitting 32 bits here.
const BOUNDARIES: [u64; 2] = [1 << 32, 1 << 41];
/// The size of the device for offsets beyond all of them: memory is used only where it is written.
const FAR_SIZE: u64 = 3 << 40;
/// How much is read at a time.
const READ_BYTES: u64 = 1 << 20;
/// Seeded writes in each window.
const WRITES: u64 = 40;

/// Every check of the device part, on a device that nobody has written to.
pub(super) fn check(context: &mut Context, target: &Target) -> Result<(), Failure> {
    let s = Duration::from_secs;
    context.step("node", s(10), |context| node(context, target))?;
    context.step("size", s(10), |context| size(context, target))?;
    context.step("threads-marked", s(10), |context| {
        let threads = target.check_reclaim()?;
        context.detail(format!("{threads} threads are part of the I/O path"));
        Ok(())
    })?;
    context.step("queue-limits", s(10), |context| queue_limits(context, target))?;
    let mut checker = Checker::new(context, target, 0)?;
    context.step("zero-read", s(120), |context| checker.zero_read(context))?;
    context.step("offset-map", s(120), |context| checker.offset_map(context))?;
    context.step("end-of-device", s(10), |context| checker.end_of_device(context))?;
    context.step("flush", s(30), |context| checker.flush(context))?;
    context.step("fua", s(30), |context| checker.fua(context))?;
    context.step("discard", s(30), |context| checker.discard(context))?;
    context.step("write-zeroes", s(30), |context| checker.write_zeroes(context))?;
    context.step("storage-agrees", s(120), |context| checker.storage_agrees(context))
}

/// Offsets beyond 32 bits of bytes and of sectors, on a second device whose memory is used only where it is written.
pub(super) fn check_far_offsets(
    context: &mut Context,
    args: &TargetArgs,
    made: &mut Vec<u32>,
) -> Result<(), Failure> {
    let args = TargetArgs { size: FAR_SIZE, backend: BackendKind::Memory, mutant: None, ..args.clone() };
    context.step("far-offsets", Duration::from_secs(240), |context| {
        let target = args.start(context)?;
        made.push(target.id());
        let checked = Checker::new(context, &target, 1).and_then(|mut checker| {
            checker.zero_read(context)?;
            checker.offset_map(context)?;
            checker.storage_agrees(context)
        });
        let closed = target.close(context);
        checked.and(closed)?;
        context.detail(format!("a device of {} agrees around {BOUNDARIES:?}", format_bytes(FAR_SIZE)));
        Ok(())
    })
}

/// A device that is to be read-only says so, takes no write, and asks its backend for none.
pub(super) fn check_read_only(context: &mut Context, args: &TargetArgs, made: &mut Vec<u32>) -> Result<(), Failure> {
    let args = TargetArgs { read_only: true, backend: BackendKind::Memory, ..args.clone() };
    context.evidence().require("refusals", refusals::ATTEMPTS);
    context.step("read-only", Duration::from_secs(60), |context| {
        let target = args.start(context)?;
        made.push(target.id());
        let checked = refusals::check(context, &target);
        let closed = target.close(context);
        let attempts = checked.and_then(|attempts| closed.map(|()| attempts))?;
        context.detail(format!("it says so, and takes nothing in {attempts} attempts"));
        Ok(())
    })
}

fn node(context: &mut Context, target: &Target) -> Result<(), Failure> {
    let path = target.path();
    let kind = std::fs::symlink_metadata(&path)
        .map_err(|error| Failure::io(format_args!("look at {}", path.display()), &error))?
        .file_type();
    if !kind.is_block_device() {
        return Err(Failure::broke("node", format!("{} is no block device: {kind:?}", path.display())));
    }
    let device = BlockDir::of(&path).text("dev")?;
    context.detail(format!("{} is block device {device}", path.display()));
    Ok(())
}

fn size(context: &mut Context, target: &Target) -> Result<(), Failure> {
    let declared = target.geometry().size;
    let file = target.open_direct()?;
    let by_ioctl = blkdev::size(&file).map_err(|error| Failure::io("ask for the size (BLKGETSIZE64)", &error))?;
    let by_sysfs = BlockDir::of(&target.path()).number("size")? * 512;
    equal("size by BLKGETSIZE64", &by_ioctl, &declared)?;
    equal("size by sysfs", &by_sysfs, &declared)?;
    context.detail(format!("{declared} bytes by ioctl and by sysfs"));
    Ok(())
}

/// What was declared is what the block layer works with.
fn queue_limits(context: &mut Context, target: &Target) -> Result<(), Failure> {
    let geometry = target.geometry();
    let sysfs = BlockDir::of(&target.path());
    let file = target.open_direct()?;
    let asked = |what: &str, answer: io::Result<u32>| {
        answer.map_err(|error| Failure::io(format_args!("ask for the {what} block"), &error))
    };
    equal("logical block by BLKSSZGET", &asked("logical", blkdev::logical_block(&file))?, &geometry.logical_block)?;
    equal(
        "physical block by BLKPBSZGET",
        &asked("physical", blkdev::physical_block(&file))?,
        &geometry.physical_block,
    )?;
    let discard = geometry.discard;
    let mut limits = vec![
        ("queue/logical_block_size", u64::from(geometry.logical_block)),
        ("queue/physical_block_size", u64::from(geometry.physical_block)),
        ("queue/max_hw_sectors_kb", u64::from(target.max_io_bytes()) / 1024),
        ("queue/discard_max_hw_bytes", discard.map_or(0, |limits| limits.max_bytes)),
        ("queue/write_zeroes_max_bytes", geometry.write_zeroes.unwrap_or(0)),
        ("queue/fua", u64::from(geometry.fua)),
        ("queue/rotational", u64::from(geometry.rotational)),
        ("ro", u64::from(geometry.read_only)),
    ];
    if let Some(discard) = discard {
        limits.push(("queue/discard_granularity", u64::from(discard.granularity)));
    }
    for (attribute, declared) in &limits {
        equal(attribute, &sysfs.number(attribute)?, declared)?;
    }
    let cache = if geometry.volatile_cache { "write back" } else { "write through" };
    equal("queue/write_cache", &sysfs.text("queue/write_cache")?.as_str(), &cache)?;
    equal("hardware queues", &sysfs.hardware_queues()?, &usize::from(target.queues()))?;
    context.detail(format!("{} limits as declared", limits.len() + 4));
    Ok(())
}

fn equal<T: PartialEq + std::fmt::Display>(what: &str, found: &T, declared: &T) -> Result<(), Failure> {
    if found == declared {
        return Ok(());
    }
    Err(Failure::broke("limits", format!("{what} is {found}, and {declared} was declared")))
}

/// The parts of a device of `size` bytes that are looked at, in order and apart: all of it, or both ends, around the
/// places where offsets outgrow 32 bits, and the middle.
fn windows(size: u64) -> Vec<SectorRange> {
    if size <= WHOLE_MAX {
        return vec![SectorRange::device(size)];
    }
    let mut starts = vec![0, (size - WINDOW) / 512 * 512, size / 2 / WINDOW * WINDOW];
    starts.extend(BOUNDARIES.into_iter().filter(|at| at + WINDOW < size).map(|at| at - WINDOW / 2));
    starts.sort_unstable();
    let mut windows: Vec<SectorRange> = Vec::new();
    for start in starts {
        let end = (start + WINDOW) / 512;
        let first = windows.last().map_or(0, |last| last.end()).max(start / 512);
        if first < end {
            windows.push(SectorRange::new(first, end - first));
        }
    }
    windows
}

/// How much of a device of `size` bytes is looked at.
pub(super) fn window_bytes(size: u64) -> u64 {
    windows(size).iter().map(|window| window.len_bytes()).sum()
}

/// A device, its storage, and what both should hold.
struct Checker<'a> {
    target: &'a Target,
    file: File,
    /// One for each window.
    shadows: Vec<Shadow>,
    rng: SeededRng,
    block_sectors: u64,
    ops: u64,
}

impl<'a> Checker<'a> {
    fn new(context: &Context, target: &'a Target, number: u32) -> Result<Self, Failure> {
        let pattern = Arc::new(Pattern::new(context.seed(), number));
        let size = target.geometry().size;
        let shadow = |region| {
            Shadow::new(ShadowOptions {
                region,
                worker: 0,
                pattern: Arc::clone(&pattern),
                foreign: Arc::new([]),
                device_sectors: size / 512,
                initially_zero: true,
            })
        };
        Ok(Self {
            target,
            file: target.open_direct()?,
            shadows: windows(size).into_iter().map(shadow).collect(),
            rng: context.seed().derive("probe", u64::from(number)).rng(),
            block_sectors: u64::from(target.geometry().logical_block) / 512,
            ops: 0,
        })
    }

    /// Every byte of a new device reads as zero.
    fn zero_read(&mut self, context: &mut Context) -> Result<(), Failure> {
        let bytes = self.read_windows(context, "zero_read_bytes")?;
        context.detail(format!("{} read as zeroes", format_bytes(bytes)));
        Ok(())
    }

    /// The whole of every window, through the device.
    fn read_windows(&mut self, context: &Context, count_as: &str) -> Result<u64, Failure> {
        let mut total = 0;
        let mut buf = AlignedBuf::zeroed(READ_BYTES as usize);
        for shadow in &mut self.shadows {
            for range in shadow.options().region.chunks(READ_BYTES / 512) {
                if context.interruption().came() {
                    return Err(Failure::Interrupted);
                }
                let buf = &mut buf[..range.len_bytes() as usize];
                read(&self.file, buf, range)?;
                shadow.verify(range, buf)?;
                context.evidence().add(count_as, range.len_bytes());
                total += range.len_bytes();
            }
        }
        Ok(total)
    }

    /// Each write lands in the storage at the same offset, and nowhere else.
    fn offset_map(&mut self, context: &mut Context) -> Result<(), Failure> {
        let mut writes = 0;
        for index in 0..self.shadows.len() {
            for range in self.interesting_ranges(index) {
                if context.interruption().came() {
                    return Err(Failure::Interrupted);
                }
                self.write(
                    index,
                    range,
                    &self.file.try_clone().map_err(|error| Failure::io("copy a descriptor", &error))?,
                )?;
                self.look_around(index, range)?;
                context.evidence().add("mapped_writes", 1);
                writes += 1;
            }
        }
        context.detail(format!("{writes} writes found at their offset in the storage, neighbours untouched"));
        Ok(())
    }

    /// First block, last block, an odd block, a range over every power of two in the window, and seeded ones.
    fn interesting_ranges(&mut self, index: usize) -> Vec<SectorRange> {
        let region = self.shadows[index].options().region;
        let block = self.block_sectors;
        let mut ranges = vec![
            SectorRange::new(region.first, block),
            SectorRange::new(region.end() - block, block),
            SectorRange::new(region.first + 7 * block, block),
        ];
        for power in (0..63).map(|shift| 1_u64 << shift).filter(|at| *at >= 2 * block) {
            if region.contains(power - block) && power + block <= region.end() {
                ranges.push(SectorRange::new(power - block, 2 * block));
            }
        }
        let longest = 2 * u64::from(self.target.max_io_bytes()) / 512 / block;
        for _ in 0..WRITES {
            let blocks = self.rng.within(1..=longest.min(region.sectors / block));
            let first = self.rng.within(0..=region.sectors / block - blocks) * block;
            ranges.push(SectorRange::new(region.first + first, blocks * block));
        }
        ranges
    }

    fn write(&mut self, index: usize, range: SectorRange, file: &File) -> Result<(), Failure> {
        let mut buf = AlignedBuf::zeroed(range.len_bytes() as usize);
        self.ops += 1;
        let ticket = self.shadows[index].begin_write(self.ops, range, &mut buf);
        let written = file.write_all_at(&buf, range.offset_bytes());
        self.shadows[index].finish(ticket, if written.is_ok() { Outcome::Done } else { Outcome::Failed });
        written.map_err(|error| Failure::io(format_args!("write sectors {range}"), &error))
    }

    /// Compares a range and a block at each side of it, through the device and in the storage.
    fn look_around(&mut self, index: usize, range: SectorRange) -> Result<(), Failure> {
        let shadow = &mut self.shadows[index];
        let region = shadow.options().region;
        let first = range.first.saturating_sub(self.block_sectors).max(region.first);
        let end = (range.end() + self.block_sectors).min(region.end());
        let wide = SectorRange::new(first, end - first);
        let mut buf = AlignedBuf::zeroed(wide.len_bytes() as usize);
        // The storage first: what is wrong there is more telling than what the device makes of it.
        read_storage(self.target, &mut buf, wide)?;
        shadow.verify(wide, &buf)?;
        read(&self.file, &mut buf, wide)?;
        shadow.verify(wide, &buf)?;
        Ok(())
    }

    /// Reads and writes that reach past the end do what they can and no more.
    fn end_of_device(&mut self, context: &mut Context) -> Result<(), Failure> {
        let size = self.target.geometry().size;
        let block = self.block_sectors * 512;
        let last = SectorRange::new((size - block) / 512, self.block_sectors);
        let index = self.shadows.len() - 1;
        let mut two = AlignedBuf::zeroed(2 * block as usize);
        let past = self.file.read_at(&mut two, size).map_err(|error| Failure::io("read at the end", &error))?;
        count("bytes that a read at the end returned", past, 0)?;
        let across = self.file.read_at(&mut two, size - block);
        count(
            "bytes that a read across the end returned",
            across.map_err(|error| Failure::io("read across the end", &error))?,
            block as usize,
        )?;
        self.shadows[index].verify(last, &two[..block as usize])?;
        match self.file.write_at(&two, size) {
            Err(error) if error.raw_os_error() == Some(Errno::ENOSPC as i32) => {}
            Err(error) => {
                return Err(Failure::broke(
                    "end",
                    format!("a write at the end failed with {error} and not with ENOSPC"),
                ));
            }
            Ok(bytes) => return Err(Failure::broke("end", format!("a write at the end wrote {bytes} bytes"))),
        }
        self.ops += 1;
        let ticket = self.shadows[index].begin_write(self.ops, last, &mut two[..block as usize]);
        let across = self.file.write_at(&two, size - block);
        self.shadows[index].finish(ticket, if across.is_ok() { Outcome::Done } else { Outcome::Failed });
        count(
            "bytes that a write across the end wrote",
            across.map_err(|error| Failure::io("write across the end", &error))?,
            block as usize,
        )?;
        self.look_around(index, last)?;
        context.detail("reads end there, writes get ENOSPC, the last block is whole");
        Ok(())
    }

    /// `fsync` has the backend flush if it declared a cache, after what was written; and does not bother it if not.
    fn flush(&mut self, context: &mut Context) -> Result<(), Failure> {
        let buffered = self.target.open_buffered()?;
        let region = self.shadows[0].options().region;
        let range = SectorRange::new(region.first, region.sectors.min(READ_BYTES / 512));
        let before = self.target.counts()?;
        self.write(0, range, &buffered)?;
        buffered.sync_all().map_err(|error| Failure::io("fsync the device", &error))?;
        let after = self.target.counts()?;
        let (bytes, flushes) = (after.write_bytes - before.write_bytes, after.flushes - before.flushes);
        if bytes < range.len_bytes() {
            let what =
                format!("fsync returned when {bytes} of {} written bytes had reached the backend", range.len_bytes());
            return Err(Failure::broke("flush", what));
        }
        let cached = self.target.geometry().volatile_cache;
        if cached != (flushes > 0) {
            let declared = if cached { "declared" } else { "not declared" };
            return Err(Failure::broke(
                "flush",
                format!("fsync sent {flushes} flushes, and a volatile cache was {declared}"),
            ));
        }
        self.look_around(0, range)?;
        context.detail(format!("fsync: {} written, then {flushes} flushes", format_bytes(bytes)));
        Ok(())
    }

    /// A synchronous write arrives as FUA where that was declared, and is followed by a flush where only a cache was.
    fn fua(&mut self, context: &mut Context) -> Result<(), Failure> {
        let path = self.target.path();
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT | libc::O_DSYNC)
            .open(&path)
            .map_err(|error| Failure::io(format_args!("open {} with O_DSYNC", path.display()), &error))?;
        let range =
            SectorRange::new(self.shadows[0].options().region.first + 3 * self.block_sectors, self.block_sectors);
        let before = self.target.counts()?;
        self.write(0, range, &file)?;
        let after = self.target.counts()?;
        let (fua, flushes) = (after.fua_writes - before.fua_writes, after.flushes - before.flushes);
        let geometry = self.target.geometry();
        let right = match (geometry.fua, geometry.volatile_cache) {
            (true, _) => fua > 0,
            (false, true) => fua == 0 && flushes > 0,
            (false, false) => fua == 0 && flushes == 0,
        };
        if !right {
            let what = format!(
                "a synchronous write arrived as {fua} FUA writes and {flushes} flushes (declared: FUA {}, cache {})",
                geometry.fua, geometry.volatile_cache
            );
            return Err(Failure::broke("fua", what));
        }
        self.look_around(0, range)?;
        context.detail(format!("O_DSYNC: {fua} FUA writes, {flushes} flushes"));
        Ok(())
    }

    /// Fills a range and a bit around it, and returns the range. Its ends are multiples of `align` bytes.
    fn prepare(&mut self, align: u64, len: u64) -> Result<SectorRange, Failure> {
        let region = self.shadows[0].options().region;
        // In the middle of the first window.
        let at = (region.first * 512 + region.len_bytes() / 2) / align * align;
        let range = SectorRange::new(at / 512, len / 512);
        let margin = 2 * self.block_sectors;
        let file = self.file.try_clone().map_err(|error| Failure::io("copy a descriptor", &error))?;
        self.write(0, SectorRange::new(range.first - margin, range.sectors + 2 * margin), &file)?;
        Ok(range)
    }

    fn discard(&mut self, context: &mut Context) -> Result<(), Failure> {
        let Some(limits) = self.target.geometry().discard else {
            return match blkdev::discard(&self.file, 0, 1 << 20) {
                Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {
                    context.detail("refused with EOPNOTSUPP, as it was not declared");
                    Ok(())
                }
                other => Err(Failure::broke("discard", format!("was not declared, and ended in {other:?}"))),
            };
        };
        let granularity = u64::from(limits.granularity);
        let range = self.prepare(granularity, 8 * granularity)?;
        let before = self.target.counts()?;
        self.ops += 1;
        let ticket = self.shadows[0].begin_discard(self.ops, range, DiscardPromise::Zeroes);
        let discarded = blkdev::discard(&self.file, range.offset_bytes(), range.len_bytes());
        self.shadows[0].finish(ticket, if discarded.is_ok() { Outcome::Done } else { Outcome::Failed });
        discarded.map_err(|error| Failure::io(format_args!("discard sectors {range}"), &error))?;
        let bytes = self.target.counts()?.discard_bytes - before.discard_bytes;
        count("bytes that the backend was asked to discard", bytes as usize, range.len_bytes() as usize)?;
        self.look_around(0, range)?;
        context.detail(format!("{} arrived, read as zeroes, neighbours untouched", format_bytes(bytes)));
        Ok(())
    }

    fn write_zeroes(&mut self, context: &mut Context) -> Result<(), Failure> {
        // An odd number of blocks.
        let block = self.block_sectors * 512;
        let range = self.prepare(block, 1001 * block)?;
        let before = self.target.counts()?;
        self.ops += 1;
        let ticket = self.shadows[0].begin_write_zeroes(self.ops, range);
        let zeroed = blkdev::zero_out(&self.file, range.offset_bytes(), range.len_bytes());
        self.shadows[0].finish(ticket, if zeroed.is_ok() { Outcome::Done } else { Outcome::Failed });
        zeroed.map_err(|error| Failure::io(format_args!("zero sectors {range}"), &error))?;
        let after = self.target.counts()?;
        let (zeroed, written) = (after.zero_bytes - before.zero_bytes, after.write_bytes - before.write_bytes);
        let declared = self.target.geometry().write_zeroes.is_some();
        let (expected_zeroed, expected_written) =
            if declared { (range.len_bytes(), 0) } else { (0, range.len_bytes()) };
        count("bytes that the backend was asked to zero", zeroed as usize, expected_zeroed as usize)?;
        count("bytes of zeroes that the kernel wrote", written as usize, expected_written as usize)?;
        self.look_around(0, range)?;
        let how = if declared { "as write-zeroes" } else { "as writes" };
        context.detail(format!(
            "{} arrived {how}, read as zeroes, neighbours untouched",
            format_bytes(zeroed + written)
        ));
        Ok(())
    }

    /// Every byte of the storage is what was written to the device, or zero.
    fn storage_agrees(&mut self, context: &mut Context) -> Result<(), Failure> {
        let mut total = 0;
        let mut buf = AlignedBuf::zeroed(READ_BYTES as usize);
        for shadow in &mut self.shadows {
            for range in shadow.options().region.chunks(READ_BYTES / 512) {
                let buf = &mut buf[..range.len_bytes() as usize];
                read_storage(self.target, buf, range)?;
                shadow.verify(range, buf)?;
                total += range.len_bytes();
            }
        }
        let read = self.read_windows(context, "device_verified_bytes")?;
        context.evidence().add("storage_verified_bytes", total);
        context.detail(format!("{} of storage and {} of device as written", format_bytes(total), format_bytes(read)));
        Ok(())
    }
}

fn read(file: &File, buf: &mut [u8], range: SectorRange) -> Result<(), Failure> {
    file.read_exact_at(buf, range.offset_bytes())
        .map_err(|error| Failure::io(format_args!("read sectors {range}"), &error))
}

fn read_storage(target: &Target, buf: &mut [u8], range: SectorRange) -> Result<(), Failure> {
    target.storage().read_at(buf, range.offset_bytes())
}

fn count(what: &str, found: usize, expected: usize) -> Result<(), Failure> {
    if found == expected {
        return Ok(());
    }
    Err(Failure::broke("count", format!("{what}: {found}, and should be {expected}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_device_is_one_window() {
        assert_eq!(windows(1 << 20), [SectorRange::device(1 << 20)]);
    }

    #[test]
    fn the_windows_of_a_large_device_are_apart_and_cover_what_goes_wrong() {
        for size in [WHOLE_MAX + 512, (4 << 30) + 512, (4 << 30) + WINDOW + (1 << 20), 5 << 30, 3 << 40] {
            let windows = windows(size);
            assert!(windows.windows(2).all(|pair| pair[0].end() <= pair[1].first), "{size}: {windows:?}");
            assert_eq!(windows[0].first, 0);
            assert_eq!(windows.last().expect("some").end(), size / 512, "{size}");
            for boundary in BOUNDARIES.into_iter().filter(|at| at + WINDOW < size) {
                assert!(
                    windows
                        .iter()
                        .any(|window| window.contains(boundary / 512 - 1) && window.contains(boundary / 512))
                );
            }
        }
    }
}

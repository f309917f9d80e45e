//! What can be checked of a device without a look into its storage: that it gives back what was written to it, raw and through a
//! file system, and again through new openings and mounts.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use ublkit::blkdev;
use ublkit_harness::{Outcome, Pattern, SectorRange, Shadow, ShadowOptions};

use super::filesystem::{Mounted, compare, drop_cached, fsck, mkfs, sync, write};
use crate::aligned::AlignedBuf;
use crate::context::Context;
use crate::external::External;
use crate::scenario::Failure;
use crate::sysfs::BlockDir;
use crate::units::format_bytes;

/// The smallest device that is taken.
const SIZE_MIN: u64 = 16 << 20;
/// How much is looked at, at each end of the device and in the middle.
const WINDOW: u64 = 2 << 20;
/// Seeded writes in each window.
const WRITES: u64 = 30;
const FILES: usize = 32;
const FILE_LEN: usize = 64 << 10;

/// The least work that proves something.
pub(super) const MINIMUMS: [(&str, u64); 4] = [
    ("device_writes", 2 * WRITES),
    ("device_verified_bytes", 4 * WINDOW),
    ("files_verified", 2 * FILES as u64),
    ("file_systems_checked", 1),
];

/// Every check, on a device whose content is of no more use.
pub(super) fn check(context: &mut Context, external: &mut External) -> Result<(), Failure> {
    let s = Duration::from_secs;
    let path = external.path().to_owned();
    let mut device = context.step("size", s(20), |context| Device::open(context, &path))?;
    context.step("write", s(180), |context| device.write(context))?;
    context.step("end-of-device", s(20), |_| device.end())?;
    context.step("flush", s(60), |_| device.file.sync_all().map_err(|error| Failure::io("flush", &error)))?;
    context.step("read-back", s(120), |context| device.read_back(context, &path))?;
    drop(device);
    // The mount is a claim of its own.
    external.unclaim();
    context.step("mkfs", s(180), |_| mkfs(&path))?;
    files(context, &path)
}

/// The device, and what it should hold.
struct Device {
    file: File,
    bytes: u64,
    block: u64,
    /// One for each window.
    shadows: Vec<Shadow>,
    ops: u64,
}

fn open(path: &Path) -> Result<File, Failure> {
    let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
    open.map_err(|error| Failure::io(format_args!("open {}", path.display()), &error))
}

impl Device {
    /// Opens it past the page cache: it has the size that sysfs says, in whole blocks.
    fn open(context: &mut Context, path: &Path) -> Result<Self, Failure> {
        let file = open(path)?;
        let asked = |what: &str, error: &std::io::Error| Failure::io(format_args!("ask for the {what}"), error);
        let bytes = blkdev::size(&file).map_err(|error| asked("size", &error))?;
        let block = u64::from(blkdev::logical_block(&file).map_err(|error| asked("logical block", &error))?);
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let listed = BlockDir::of(&real).number("size")? * 512;
        if bytes != listed || block < 512 || !block.is_power_of_two() || bytes % block != 0 {
            let what = format!("{bytes} bytes by ioctl, {listed} by sysfs, in blocks of {block}");
            return Err(Failure::broke("limits", what));
        }
        if bytes < SIZE_MIN {
            return Err(Failure::Usage(format!(
                "{} has {}: probe needs {} for its file system",
                path.display(),
                format_bytes(bytes),
                format_bytes(SIZE_MIN)
            )));
        }
        context.detail(format!("{} in blocks of {block}", format_bytes(bytes)));
        let pattern = Arc::new(Pattern::new(context.seed(), 0));
        let middle = bytes / 2 / WINDOW * WINDOW;
        let end = (bytes - WINDOW) / block * block;
        let shadow = |start: u64| {
            Shadow::new(ShadowOptions {
                region: SectorRange::new(start / 512, WINDOW / 512),
                worker: 0,
                pattern: Arc::clone(&pattern),
                foreign: Arc::new([]),
                device_sectors: bytes / 512,
                initially_zero: false,
            })
        };
        let shadows = [0, middle, end].into_iter().map(shadow).collect();
        Ok(Self { file, bytes, block, shadows, ops: 0 })
    }

    /// Writes every window as a whole, then blocks and ranges of any length within them, and looks at each with its
    /// neighbours.
    fn write(&mut self, context: &mut Context) -> Result<(), Failure> {
        let mut rng = context.seed().derive("probe", 0).rng();
        let block = self.block / 512;
        let mut count = 0;
        for shadow in &mut self.shadows {
            let region = shadow.options().region;
            let mut ranges: Vec<_> = region.chunks(1 << 11).collect();
            for _ in 0..WRITES {
                let blocks = rng.within(1..=(256 << 10) / self.block);
                let first = rng.within(0..=region.sectors / block - blocks) * block;
                ranges.push(SectorRange::new(region.first + first, blocks * block));
            }
            for range in ranges {
                if context.interruption().came() {
                    return Err(Failure::Interrupted);
                }
                self.ops += 1;
                count += 1;
                let mut buf = AlignedBuf::zeroed(range.len_bytes() as usize);
                let ticket = shadow.begin_write(self.ops, range, &mut buf);
                let written = self.file.write_all_at(&buf, range.offset_bytes());
                shadow.finish(ticket, if written.is_ok() { Outcome::Done } else { Outcome::Failed });
                written.map_err(|error| Failure::io(format_args!("write sectors {range}"), &error))?;
                let first = range.first.saturating_sub(block).max(region.first);
                let end = (range.end() + block).min(region.end());
                verify(context, shadow, &self.file, SectorRange::new(first, end - first))?;
            }
        }
        context.evidence().add("device_writes", count);
        context.detail(format!("{count} writes, each read back with its neighbours"));
        Ok(())
    }

    /// Nothing is read and nothing written past the end.
    fn end(&mut self) -> Result<(), Failure> {
        let mut buf = AlignedBuf::zeroed(2 * self.block as usize);
        let read = |result: std::io::Result<usize>| result.map_err(|error| Failure::io("read at the end", &error));
        let past = read(self.file.read_at(&mut buf, self.bytes))?;
        let across = read(self.file.read_at(&mut buf, self.bytes - self.block))?;
        if (past, across as u64) != (0, self.block) {
            let what = format!("{past} bytes read past the end, {across} across it");
            return Err(Failure::broke("end", what));
        }
        match self.file.write_at(&buf, self.bytes) {
            Err(error) if error.raw_os_error() == Some(Errno::ENOSPC as i32) => Ok(()),
            other => Err(Failure::broke("end", format!("a write past the end: {other:?}, and not ENOSPC"))),
        }
    }

    /// Everything is there through another opening.
    fn read_back(&mut self, context: &mut Context, path: &Path) -> Result<(), Failure> {
        let file = open(path)?;
        for shadow in &mut self.shadows {
            for range in shadow.options().region.chunks(1 << 11) {
                verify(context, shadow, &file, range)?;
            }
        }
        Ok(())
    }
}

fn verify(context: &Context, shadow: &mut Shadow, file: &File, range: SectorRange) -> Result<(), Failure> {
    let mut buf = AlignedBuf::zeroed(range.len_bytes() as usize);
    file.read_exact_at(&mut buf, range.offset_bytes())
        .map_err(|error| Failure::io(format_args!("read sectors {range}"), &error))?;
    shadow.verify(range, &buf)?;
    context.evidence().add("device_verified_bytes", range.len_bytes());
    Ok(())
}

/// Files that are synced are there when they are read from the device, and after another mount.
fn files(context: &mut Context, path: &Path) -> Result<(), Failure> {
    let s = Duration::from_secs;
    let names: Vec<String> = (0..FILES).map(|number| format!("file-{number}")).collect();
    context.step("files", s(180), |context| {
        let mounted = Mounted::mount(context, path)?;
        names.iter().try_for_each(|name| write(context.seed(), mounted.path(), name, FILE_LEN))?;
        sync(&mounted)?;
        names.iter().try_for_each(|name| drop_cached(&mounted.path().join(name)))?;
        look(context, &mounted, &names)?;
        mounted.unmount()
    })?;
    context.step("fsck", s(120), |context| {
        fsck(path)?;
        context.evidence().add("file_systems_checked", 1);
        Ok(())
    })?;
    context.step("remount", s(120), |context| {
        let mounted = Mounted::mount(context, path)?;
        look(context, &mounted, &names)?;
        mounted.unmount()
    })
}

fn look(context: &Context, mounted: &Mounted, names: &[String]) -> Result<(), Failure> {
    for name in names {
        compare(context.seed(), mounted.path(), name, FILE_LEN)?;
        context.evidence().add("files_verified", 1);
    }
    Ok(())
}

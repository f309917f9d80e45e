//! The file-system part: ext4, the page cache and the journal on top, and the same bytes below.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::syncfs;
use ublkit_harness::Seed;

use super::power;
use crate::context::Context;
use crate::environment::find_tool;
use crate::runs::{Change, Undo};
use crate::scenario::Failure;
use crate::target::{Target, TargetArgs};
use crate::units::format_bytes;

/// What begins every block of the file that is looked for in the storage.
const MAGIC: &[u8; 16] = b"ublk-torture mag";
/// The unit in which a file is looked for: what ext4 allocates at least, here.
const BLOCK: usize = 4096;
const MAGIC_LEN: usize = 256 << 10;
const WRITERS: usize = 8;
const FILES_PER_WRITER: usize = 16;
const FILE_LEN: usize = 64 << 10;

/// A file that was written, by name and length; its bytes follow from those and the seed.
type Written = (String, usize);

/// Every check of the file-system part.
pub(super) fn check(
    context: &mut Context,
    args: &TargetArgs,
    target: &Target,
    made: &mut Vec<u32>,
) -> Result<(), Failure> {
    let s = Duration::from_secs;
    context.step("mkfs", s(120), |context| make(context, target))?;
    let mounted = context.step("mount", s(60), |context| {
        let mounted = Mounted::mount(context, &target.path())?;
        context.detail(mounted.path().display().to_string());
        Ok(mounted)
    })?;
    let mut files = Vec::new();
    if let Err(failure) = use_mounted(context, args, target, &mounted, &mut files, made) {
        // On a device that fails, this may take its time.
        context.always("unmount-after-failure", s(120), |_| {
            drop(mounted);
            Ok(())
        })?;
        return Err(failure);
    }
    context.step("unmount", s(60), |context| {
        let before = target.counts()?;
        mounted.unmount()?;
        context.detail(format!("{} writes reached the backend", target.counts()?.writes - before.writes));
        Ok(())
    })?;
    context.step("fsck", s(120), |context| {
        fsck(&target.path())?;
        context.detail("e2fsck -fn finds nothing");
        Ok(())
    })?;
    context.step("remount", s(120), |context| remount(context, target, &files))
}

/// Everything that takes place while it is mounted for the first time.
fn use_mounted(
    context: &mut Context,
    args: &TargetArgs,
    target: &Target,
    mounted: &Mounted,
    files: &mut Vec<Written>,
    made: &mut Vec<u32>,
) -> Result<(), Failure> {
    let s = Duration::from_secs;
    context.step("write-and-syncfs", s(60), |context| write_and_syncfs(context, target, mounted, files))?;
    context.step("fsync-alone", s(60), |context| fsync_alone(context, target, mounted, files))?;
    context.step("read-back-cold", s(60), |context| read_back_cold(context, target, mounted, files))?;
    context.step("magic-in-storage", s(120), |context| magic_in_storage(context, target, mounted))?;
    files.push((String::from("magic"), MAGIC_LEN));
    context.step("concurrent-writers", s(120), |context| concurrent_writers(context, target, mounted, files))?;
    for round in 1..=power::CUTS {
        let name = format!("power-cut-{round}");
        // The whole storage is copied.
        let limit = s(180 + (target.geometry().size >> 24));
        context.step(&name, limit, |context| power::cut(context, args, mounted, target, round, made))?;
    }
    Ok(())
}

/// Makes an ext4 that leaves nothing for later.
pub(crate) fn make(context: &mut Context, target: &Target) -> Result<(), Failure> {
    let before = target.counts()?;
    mkfs(&target.path())?;
    let after = target.counts()?;
    let bytes = after.write_bytes - before.write_bytes;
    if bytes == 0 {
        return Err(Failure::broke("write-back", "mkfs.ext4 succeeded, and nothing was written to the backend"));
    }
    context.detail(format!(
        "ext4 in {} of writes, {} discards",
        format_bytes(bytes),
        after.discards - before.discards
    ));
    Ok(())
}

/// Makes an ext4 on a device.
pub(crate) fn mkfs(path: &Path) -> Result<(), Failure> {
    // Nothing may be left for the kernel to do in the background, or its writes would pass for ours.
    let lazy = "lazy_itable_init=0,lazy_journal_init=0";
    run("mkfs.ext4", &["-q", "-F", "-b", "4096", "-E", lazy, &path.display().to_string()])
}

/// Runs a program that has to succeed.
pub(crate) fn run(tool: &str, args: &[&str]) -> Result<(), Failure> {
    let program = find_tool(tool, std::env::var_os("PATH").as_deref()).unwrap_or_else(|| tool.into());
    let output = Command::new(&program)
        .args(args)
        .stdin(Stdio::null())
        // In a process group of its own: what is typed at the terminal is for this program to deal with.
        .process_group(0)
        .output()
        .map_err(|error| Failure::Environment(format!("failed to run {}: {error}", program.display())))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let lines = String::from_utf8_lossy(&said).lines().map(str::to_owned).take(50).collect();
    Err(Failure::broke_with(tool, format!("{tool} {} ended with {}", args.join(" "), output.status), lines))
}

/// Checks a file system that is not mounted, changing nothing.
pub(crate) fn fsck(device: &Path) -> Result<(), Failure> {
    run("e2fsck", &["-fn", &device.display().to_string()])
}

fn write_and_syncfs(
    context: &mut Context,
    target: &Target,
    mounted: &Mounted,
    files: &mut Vec<Written>,
) -> Result<(), Failure> {
    let before = target.counts()?;
    let (name, len) = (String::from("synced-with-the-file-system"), 1 << 20);
    write(context.seed(), mounted.path(), &name, len)?;
    sync(mounted)?;
    files.push((name, len));
    let bytes = target.counts()?.write_bytes - before.write_bytes;
    if bytes < len as u64 {
        let what = format!("`sync -f` returned when {bytes} of {len} written bytes had reached the backend");
        return Err(Failure::broke("write-back", what));
    }
    context.detail(format!("{} written, {} reached the backend", format_bytes(len as u64), format_bytes(bytes)));
    Ok(())
}

/// What `sync -f` does: only this file system, since syncing all of them waits for the whole host.
pub(crate) fn sync(mounted: &Mounted) -> Result<(), Failure> {
    let dir = File::open(mounted.path()).map_err(|error| Failure::io("open the mounted directory", &error))?;
    syncfs(&dir).map_err(|errno| Failure::io("sync the file system", &errno.into()))
}

fn fsync_alone(
    context: &mut Context,
    target: &Target,
    mounted: &Mounted,
    files: &mut Vec<Written>,
) -> Result<(), Failure> {
    let (name, len) = (String::from("fsynced-alone"), 256 << 10);
    let Asked { bytes, flushes, fua } = write_and_fsync(context.seed(), mounted, &name, len, target)?;
    files.push((name, len));
    context.detail(format!("{} reached the backend, {flushes} flushes, {fua} FUA writes", format_bytes(bytes)));
    Ok(())
}

/// What an fsync asked of a backend.
pub(crate) struct Asked {
    bytes: u64,
    flushes: u64,
    fua: u64,
}

/// Writes a file and fsyncs it: the bytes have to be with `behind` then, and be flushed if that has a cache.
pub(crate) fn write_and_fsync(
    seed: Seed,
    mounted: &Mounted,
    name: &str,
    len: usize,
    behind: &Target,
) -> Result<Asked, Failure> {
    let mut file = create(mounted.path(), name)?;
    file.write_all(&content(seed, name, len)).map_err(|error| Failure::io("write a file", &error))?;
    let before = behind.counts()?;
    file.sync_all().map_err(|error| Failure::io("fsync a file", &error))?;
    let after = behind.counts()?;
    let (bytes, flushes) = (after.write_bytes - before.write_bytes, after.flushes - before.flushes);
    let fua = after.fua_writes - before.fua_writes;
    if bytes < len as u64 {
        let what = format!("fsync returned when {bytes} of {len} written bytes had reached the backend");
        return Err(Failure::broke("write-back", what));
    }
    if behind.geometry().volatile_cache && flushes + fua == 0 {
        return Err(Failure::broke(
            "flush",
            "fsync of a file led to neither a flush nor a FUA write at a backend with a cache",
        ));
    }
    Ok(Asked { bytes, flushes, fua })
}

fn read_back_cold(
    context: &mut Context,
    target: &Target,
    mounted: &Mounted,
    files: &[Written],
) -> Result<(), Failure> {
    let bytes = compare_cold(context, target, mounted, files)?;
    context.detail(format!(
        "{} files as written, {} of them read from the backend",
        files.len(),
        format_bytes(bytes)
    ));
    Ok(())
}

/// Compares files with what was written, read from the device and not from the page cache. Returns how much the backend
/// was asked for.
fn compare_cold(context: &Context, target: &Target, mounted: &Mounted, files: &[Written]) -> Result<u64, Failure> {
    sync(mounted)?;
    for (name, _) in files {
        drop_cached(&mounted.path().join(name))?;
    }
    let before = target.counts()?;
    for (name, len) in files {
        if context.interruption().came() {
            return Err(Failure::Interrupted);
        }
        compare(context.seed(), mounted.path(), name, *len)?;
    }
    let bytes = target.counts()?.read_bytes - before.read_bytes;
    let total: u64 = files.iter().map(|(_, len)| *len as u64).sum();
    context.evidence().add("cold_read_bytes", bytes.min(total));
    Ok(bytes)
}

/// Has the kernel forget a file's pages. They must be clean: only the file's own are dropped, where
/// `/proc/sys/vm/drop_caches` would take those of the whole host, and neither drops dirty ones.
pub(crate) fn drop_cached(path: &Path) -> Result<(), Failure> {
    let cannot =
        |error: std::io::Error| Failure::io(format_args!("drop {} from the page cache", path.display()), &error);
    let file = File::open(path).map_err(cannot)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(|errno| cannot(errno.into()))
}

/// Finds every block of a file among the bytes below, by a mark in each, and compares it there.
fn magic_in_storage(context: &mut Context, target: &Target, mounted: &Mounted) -> Result<(), Failure> {
    let mut bytes = content(context.seed(), "magic", MAGIC_LEN);
    for (index, block) in bytes.chunks_mut(BLOCK).enumerate() {
        block[..16].copy_from_slice(MAGIC);
        block[16..24].copy_from_slice(&context.seed().get().to_le_bytes());
        block[24..32].copy_from_slice(&(index as u64).to_le_bytes());
    }
    let mut file = create(mounted.path(), "magic")?;
    file.write_all(&bytes).map_err(|error| Failure::io("write a file", &error))?;
    file.sync_all().map_err(|error| Failure::io("fsync a file", &error))?;
    let blocks = MAGIC_LEN / BLOCK;
    let mut found = vec![false; blocks];
    let mut part = vec![0; 1 << 20];
    let size = target.geometry().size;
    let mut offset = 0;
    while offset < size && found.contains(&false) {
        let part = &mut part[..(size - offset).min(1 << 20) as usize];
        target.storage().read_at(part, offset)?;
        for block in part.chunks_exact(BLOCK).filter(|block| block.starts_with(&bytes[..24])) {
            let index = block[24..32].iter().rev().fold(0_usize, |index, byte| index << 8 | usize::from(*byte));
            if index < blocks && block == &bytes[index * BLOCK..][..BLOCK] {
                found[index] = true;
            }
        }
        offset += 1 << 20;
    }
    let there = found.iter().filter(|found| **found).count();
    context.evidence().add("file_bytes_found_in_storage", (there * BLOCK) as u64);
    if there < blocks {
        let what = format!("only {there} of {blocks} blocks of a file that was fsynced are in the storage");
        return Err(Failure::broke("magic", what));
    }
    // From now on it is a file like the others.
    drop(file);
    fs::remove_file(mounted.path().join("magic")).map_err(|error| Failure::io("remove a file", &error))?;
    write(context.seed(), mounted.path(), "magic", MAGIC_LEN)?;
    context.detail(format!("all {blocks} blocks of a file found in the storage"));
    Ok(())
}

fn concurrent_writers(
    context: &mut Context,
    target: &Target,
    mounted: &Mounted,
    files: &mut Vec<Written>,
) -> Result<(), Failure> {
    let before = target.counts()?;
    let seed = context.seed();
    let name = |writer: usize, number: usize| format!("writer-{writer}-{number}");
    let results: Vec<Result<(), Failure>> = thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let name = &name;
                scope.spawn(move || {
                    (0..FILES_PER_WRITER)
                        .try_for_each(|number| write(seed, mounted.path(), &name(writer, number), FILE_LEN))
                })
            })
            .collect();
        let panicked = |_| Err(Failure::Internal("a writer panicked".to_owned()));
        writers.into_iter().map(|writer| writer.join().unwrap_or_else(panicked)).collect()
    });
    results.into_iter().collect::<Result<(), _>>()?;
    let theirs: Vec<Written> = (0..WRITERS)
        .flat_map(|writer| (0..FILES_PER_WRITER).map(move |number| (writer, number)))
        .map(|(writer, number)| (name(writer, number), FILE_LEN))
        .collect();
    let bytes = compare_cold(context, target, mounted, &theirs)?;
    let written = target.counts()?.write_bytes - before.write_bytes;
    let total = (theirs.len() * FILE_LEN) as u64;
    if written < total {
        return Err(Failure::broke(
            "write-back",
            format!("{written} of {total} synced bytes had reached the backend"),
        ));
    }
    context.evidence().add("concurrent_files_verified", theirs.len() as u64);
    context.detail(format!(
        "{} files by {WRITERS} threads as written, {} read from the backend",
        theirs.len(),
        format_bytes(bytes)
    ));
    files.extend(theirs);
    Ok(())
}

fn remount(context: &mut Context, target: &Target, files: &[Written]) -> Result<(), Failure> {
    let mounted = Mounted::mount(context, &target.path())?;
    let bytes = compare_cold(context, target, &mounted, files)?;
    mounted.unmount()?;
    context.evidence().add("files_verified_after_remount", files.len() as u64);
    context.detail(format!("{} files as written, {} read from the backend", files.len(), format_bytes(bytes)));
    Ok(())
}

/// What a file of this name holds.
pub(crate) fn content(seed: Seed, name: &str, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    seed.derive(name, len as u64).rng().fill(&mut bytes);
    bytes
}

fn create(dir: &Path, name: &str) -> Result<File, Failure> {
    File::create_new(dir.join(name)).map_err(|error| Failure::io(format_args!("create the file {name}"), &error))
}

pub(crate) fn write(seed: Seed, dir: &Path, name: &str, len: usize) -> Result<(), Failure> {
    create(dir, name)?
        .write_all(&content(seed, name, len))
        .map_err(|error| Failure::io(format_args!("write the file {name}"), &error))
}

pub(crate) fn compare(seed: Seed, dir: &Path, name: &str, len: usize) -> Result<(), Failure> {
    let mut found = Vec::new();
    File::open(dir.join(name))
        .and_then(|mut file| file.read_to_end(&mut found))
        .map_err(|error| Failure::io(format_args!("read the file {name}"), &error))?;
    match difference(&found, &content(seed, name, len)) {
        None => Ok(()),
        Some(difference) => Err(Failure::broke("file-content", format!("{name}: {difference}"))),
    }
}

/// Where what was found differs from what was written, in words.
pub(crate) fn difference(found: &[u8], written: &[u8]) -> Option<String> {
    if let Some(at) = found.iter().zip(written).position(|(found, written)| found != written) {
        let end = |bytes: &[u8]| (at + 16).min(bytes.len());
        let zero =
            if found[at / BLOCK * BLOCK..].iter().take(BLOCK).all(|byte| *byte == 0) { " (all zeroes)" } else { "" };
        return Some(format!(
            "byte {at}{zero} is {:02x?} and {:02x?} was written",
            &found[at..end(found)],
            &written[at..end(written)]
        ));
    }
    (found.len() != written.len()).then(|| format!("it has {} bytes and {} were written", found.len(), written.len()))
}

/// A mounted file system. Dropping it unmounts in any way that works.
#[derive(Debug)]
pub(crate) struct Mounted {
    dir: PathBuf,
    attached: bool,
    /// Dropped last: it removes the directory, and unmounts it if that still has to be.
    _change: Change,
}

impl Mounted {
    /// Mounts the ext4 on `device` on a new directory of its own.
    pub(crate) fn mount(context: &Context, device: &Path) -> Result<Self, Failure> {
        // A long commit interval keeps the journal's own timer out of what is counted.
        Self::mount_as(context, device, "ext4", "commit=300,errors=remount-ro")
    }

    /// Mounts the file system on `device` on a new directory of its own.
    pub(crate) fn mount_as(context: &Context, device: &Path, kind: &str, options: &str) -> Result<Self, Failure> {
        // Kept by hand: whatever is removed by itself must not be removed while something is mounted there.
        let dir = tempfile::Builder::new()
            .prefix("ublk-torture-mount-")
            .tempdir()
            .map_err(|error| Failure::Environment(format!("failed to make a directory to mount on: {error}")))?
            .keep();
        let change = context.record.changing(Undo::Unmount(dir.clone()));
        let mut this = Self { dir, attached: false, _change: change };
        let flags = MsFlags::MS_NOATIME | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        match mount(Some(device), &this.dir, Some(kind), flags, Some(options)) {
            Ok(()) => {
                this.attached = true;
                Ok(this)
            }
            Err(Errno::ENODEV) => Err(Failure::Environment(format!(
                "this kernel has no {kind}: load it with `modprobe {kind}`, or use a kernel that has it"
            ))),
            Err(errno) => Err(Failure::io(format_args!("mount the {kind} on {}", device.display()), &errno.into())),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }

    /// Unmounts as a user would, and fails if that fails.
    pub(crate) fn unmount(mut self) -> Result<(), Failure> {
        let patience = Instant::now() + Duration::from_secs(10);
        loop {
            match umount2(&self.dir, MntFlags::empty()) {
                Ok(()) => break,
                // Somebody looks at each new mount, on many systems.
                Err(Errno::EBUSY) if Instant::now() < patience => thread::sleep(Duration::from_millis(20)),
                Err(errno) => {
                    return Err(Failure::io(format_args!("unmount {}", self.dir.display()), &errno.into()));
                }
            }
        }
        self.attached = false;
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.attached && umount2(&self.dir, MntFlags::empty()).is_err() {
            let _best_effort = umount2(&self.dir, MntFlags::MNT_DETACH);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_placed() {
        assert_eq!(difference(b"same", b"same"), None);
        assert!(difference(b"sane", b"same").expect("differs").starts_with("byte 2 "));
        assert!(difference(&[0; 8192], &[1; 8192]).expect("differs").contains("all zeroes"));
        assert_eq!(difference(b"sam", b"same").expect("differs"), "it has 3 bytes and 4 were written");
    }

    #[test]
    fn content_follows_from_seed_name_and_length() {
        let seed = Seed::new(1);
        assert_eq!(content(seed, "a", 100), content(seed, "a", 100));
        assert_ne!(content(seed, "a", 100), content(seed, "b", 100));
        assert_ne!(content(seed, "a", 100), content(Seed::new(2), "a", 100));
    }
}

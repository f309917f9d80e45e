//! The workloads: a file system that is written to, and made to write back in one way after another.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::syncfs;
use serde::Serialize;

use super::attribution::Span;
use super::story::Wait;
use crate::clock::nanoseconds;
use crate::context::Context;
use crate::probe::filesystem::{content, difference};
use crate::runs::{Change, Undo};
use crate::scenario::Failure;
use crate::target::Target;
use crate::units::format_rounded;

/// How long the device must have been quiet for a phase to be over.
const QUIET: Duration = Duration::from_millis(50);
/// How much is overwritten after a file was dropped from the page cache.
const OVERWRITE: usize = 64 << 10;
/// How often the device is looked at while nothing is asked of it.
const LOOK: Duration = Duration::from_millis(10);

/// What a phase does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    Fsync,
    Writeback,
    SyncFs,
    ReadBack,
    SyncDrop,
}

impl Kind {
    pub(super) const ALL: [Self; 5] = [Self::Fsync, Self::Writeback, Self::SyncFs, Self::ReadBack, Self::SyncDrop];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Fsync => "fsync",
            Self::Writeback => "writeback",
            Self::SyncFs => "syncfs",
            Self::ReadBack => "read-back",
            Self::SyncDrop => "sync-drop",
        }
    }

    /// How much the application writes at first.
    const fn bytes(self) -> usize {
        match self {
            Self::Fsync => 512 << 10,
            Self::Writeback | Self::SyncFs => 2 << 20,
            Self::ReadBack | Self::SyncDrop => 1 << 20,
        }
    }

    pub(super) const fn about(self) -> &'static str {
        match self {
            Self::Fsync => "write 512 KiB, fsync",
            Self::Writeback => "write 2 MiB, do nothing until the kernel writes back",
            Self::SyncFs => "write 2 MiB, sync the file system",
            Self::ReadBack => "write 1 MiB, fsync, drop it from the page cache, read it back",
            Self::SyncDrop => {
                "write 1 MiB, sync the file system, drop it from the page cache, overwrite 64 KiB of it, fsync"
            }
        }
    }
}

/// A phase that took place.
#[derive(Clone, Debug)]
pub(super) struct Played {
    pub(super) kind: Kind,
    pub(super) round: u32,
    pub(super) span: Span,
    pub(super) waits: Vec<Wait>,
    pub(super) written: u64,
}

/// Where phases take place.
pub(super) struct Stage<'a> {
    pub(super) target: &'a Target,
    pub(super) dir: &'a Path,
    /// How long the kernel may take to write back by itself.
    pub(super) patience: Duration,
}

/// The application of a phase.
struct Actor {
    /// What files hold: made before the time of the phase begins.
    content: Vec<u8>,
    waits: Vec<Wait>,
    written: u64,
}

impl Actor {
    /// Does something that takes the kernel time.
    fn act<T>(
        &mut self,
        name: impl Into<String>,
        durable: bool,
        work: impl FnOnce() -> std::io::Result<T>,
    ) -> Result<T, Failure> {
        let name = name.into();
        let from = nanoseconds();
        let result = work();
        let span = Span::new(from, nanoseconds());
        let result = result.map_err(|error| Failure::io(&name, &error));
        self.waits.push(Wait { name, span, durable });
        result
    }

    /// Writes everything that there is to write.
    fn write(&mut self, path: &Path) -> Result<File, Failure> {
        let content = std::mem::take(&mut self.content);
        let file = self.act(format!("write {}", format_rounded(content.len() as u64)), false, || {
            let mut file = File::create(path)?;
            file.write_all(&content)?;
            Ok(file)
        })?;
        self.written += content.len() as u64;
        self.content = content;
        Ok(file)
    }

    fn fsync(&mut self, file: &File) -> Result<(), Failure> {
        self.act("fsync", true, || file.sync_all())
    }

    fn syncfs(&mut self, file: &File) -> Result<(), Failure> {
        self.act("sync -f", true, || syncfs(file).map_err(Into::into))
    }

    /// Has the kernel forget the file's pages, which must be clean.
    fn drop_cached(&mut self, file: &File) -> Result<(), Failure> {
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        self.act("drop from cache", false, || posix_fadvise(file, 0, 0, advice).map_err(Into::into))
    }

    /// Reads as much as was written. It is compared when the phase is over.
    fn read_back(&mut self, path: &Path) -> Result<Vec<u8>, Failure> {
        let mut found = vec![0; self.content.len()];
        self.act(format!("read {}", format_rounded(found.len() as u64)), false, || {
            File::open(path)?.read_exact(&mut found)?;
            Ok(found)
        })
    }
}

impl Stage<'_> {
    /// Plays one phase, up to the moment when the device is quiet again.
    pub(super) fn play(&self, context: &Context, kind: Kind, round: u32) -> Result<Played, Failure> {
        let name = format!("{}-{round}", kind.name());
        let path = self.dir.join(&name);
        let bytes_of_it = content(context.seed(), &name, kind.bytes());
        let overwrite = vec![round as u8; OVERWRITE];
        let mut actor = Actor { content: bytes_of_it, waits: Vec::new(), written: 0 };
        let before = self.target.counts()?;
        let mut quiet_since = None;
        let mut read = None;
        let from = nanoseconds();
        let file = actor.write(&path)?;
        match kind {
            Kind::Fsync => actor.fsync(&file)?,
            Kind::Writeback => {
                drop(file);
                quiet_since = Some(self.written_back(context, before.write_bytes + actor.written)?);
            }
            Kind::SyncFs => actor.syncfs(&file)?,
            Kind::ReadBack => {
                actor.fsync(&file)?;
                actor.drop_cached(&file)?;
                read = Some(actor.read_back(&path)?);
            }
            Kind::SyncDrop => {
                actor.syncfs(&file)?;
                actor.drop_cached(&file)?;
                actor.act("overwrite 64 KiB", false, || file.write_all_at(&overwrite, 0))?;
                actor.written += OVERWRITE as u64;
                actor.fsync(&file)?;
            }
        }
        let to = quiet_since.unwrap_or_else(nanoseconds);
        if let Some(found) = read {
            if let Some(difference) = difference(&found, &actor.content) {
                return Err(Failure::broke("file-content", format!("{name}: {difference}")));
            }
            let read = self.target.counts()?.read_bytes - before.read_bytes;
            if read < found.len() as u64 {
                let what = format!(
                    "a file of {} was dropped from the page cache and read, and {} were read from the backend",
                    format_rounded(found.len() as u64),
                    format_rounded(read)
                );
                return Err(Failure::broke("read-back", what));
            }
        }
        Ok(Played { kind, round, span: Span::new(from, to), waits: actor.waits, written: actor.written })
    }

    /// Waits until the kernel has written so much by itself, and then some: until nothing more comes for a moment. Returns
    /// when that moment began.
    fn written_back(&self, context: &Context, bytes: u64) -> Result<u64, Failure> {
        let deadline = Instant::now() + self.patience;
        let mut last = (self.target.counts()?, nanoseconds());
        loop {
            std::thread::sleep(LOOK);
            if context.interruption().came() {
                return Err(Failure::Interrupted);
            }
            let counts = self.target.counts()?;
            if counts != last.0 {
                last = (counts, nanoseconds());
            } else if counts.write_bytes >= bytes && nanoseconds() - last.1 > QUIET.as_nanos() as u64 {
                return Ok(last.1);
            }
            if Instant::now() > deadline {
                let what = format!(
                    "the kernel had not written back {} of dirty pages after {:?}",
                    format_rounded(bytes.saturating_sub(counts.write_bytes)),
                    self.patience
                );
                return Err(Failure::Hang(what));
            }
        }
    }
}

/// How soon the kernel writes back dirty pages by itself; these are settings of the whole machine.
#[derive(Debug)]
pub(super) struct WritebackAge {
    _until_the_end: [Change; 2],
}

const EXPIRE: &str = "/proc/sys/vm/dirty_expire_centisecs";
const INTERVAL: &str = "/proc/sys/vm/dirty_writeback_centisecs";

impl WritebackAge {
    /// How long a page may stay dirty, as things are: its age, and twice the time from one look to the next. `None` where the
    /// kernel does not look by itself.
    pub(super) fn of_this_machine() -> Result<Option<Duration>, Failure> {
        let centiseconds = |file: &str| {
            let read = fs::read_to_string(file).ok().and_then(|text| text.trim().parse::<u64>().ok());
            read.ok_or_else(|| Failure::Environment(format!("{file} cannot be read")))
        };
        let (age, interval) = (centiseconds(EXPIRE)?, centiseconds(INTERVAL)?);
        Ok((interval > 0).then(|| Duration::from_millis((age + 2 * interval) * 10)))
    }

    /// Has dirty pages written back when they are as old as this, until it is dropped.
    pub(super) fn set(context: &Context, age: Duration) -> Result<Self, Failure> {
        let set = |file: &str, value: u128| -> Result<Change, Failure> {
            let cannot = |error: std::io::Error| Failure::Environment(format!("failed to set {file}: {error}"));
            let text = fs::read_to_string(file).map_err(cannot)?.trim().to_owned();
            let unless_not = Some(value.to_string());
            let change = context.record.changing(Undo::Write { file: file.into(), text, unless_not });
            fs::write(file, value.to_string()).map_err(cannot)?;
            Ok(change)
        };
        let centiseconds = (age.as_millis() / 10).max(1);
        Ok(Self { _until_the_end: [set(EXPIRE, centiseconds)?, set(INTERVAL, (centiseconds / 4).max(1))?] })
    }
}

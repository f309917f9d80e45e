//! The part with a file system: what is left of it by power cuts is mounted, compared with what was promised, and checked.
//!
//! The file system stays mounted and is worked on. At a cut its disk is copied, with its cache, between two requests; what
//! cuts at that moment could leave is drawn from the copy, several times. Each is served as a device of its own.

mod content;
mod look;
mod model;
mod worker;

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::unistd::syncfs;
use ublkit_harness::sim::medium::CutReport;
use ublkit_harness::{Seed, SeededRng};

use self::content::Content;
use self::model::Directory;
use self::worker::Place;
use super::Plan;
use super::cut::{self, PATIENCE};
use crate::context::Context;
use crate::probe::filesystem::{Mounted, run};
use crate::scenario::Failure;
use crate::server::Moment;
use crate::target::{BackendKind, Storage, Target, TargetArgs};

/// Workers, each with a directory to itself.
const WORKERS: u32 = 3;
/// At how many requests from now the power goes, at most.
const REQUESTS_MAX: u64 = 120;
/// How often a cut is drawn anew that took nothing away.
const DRAWS: u64 = 6;
/// And how often another moment is.
const ATTEMPTS: u64 = 30;
/// How long it takes until everybody has heard that what they waited for is done.
const TO_BE_HEARD: Duration = Duration::from_millis(30);
/// A block of these file systems, which journals take to be written as a whole.
const BLOCK: u32 = 4096;

/// A file system, and how it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    /// What it is called here.
    pub(super) name: &'static str,
    /// What it is called by the kernel.
    kernel_name: &'static str,
    mount_options: &'static str,
    mkfs: &'static [&'static str],
    fsck: &'static [&'static str],
    /// The smallest device that it can be made on.
    bytes: u64,
}

// Nothing is left for the kernel to do in the background. A small journal is used up, and begins again at its start.
const MKFS_EXT4: &[&str] =
    &["mkfs.ext4", "-q", "-F", "-b", "4096", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0"];

pub(super) const EXT4: Kind = Kind {
    name: "ext4",
    kernel_name: "ext4",
    mount_options: "errors=remount-ro",
    mkfs: MKFS_EXT4,
    fsck: &["e2fsck", "-fn"],
    bytes: 64 << 20,
};

pub(super) const EXT4_JOURNAL: Kind =
    Kind { name: "ext4-journal", mount_options: "errors=remount-ro,data=journal", ..EXT4 };

pub(super) const XFS: Kind = Kind {
    name: "xfs",
    kernel_name: "xfs",
    // Two of the same file system are mounted at once.
    mount_options: "nouuid",
    mkfs: &["mkfs.xfs", "-q", "-f", "-d", "agcount=2"],
    fsck: &["xfs_repair", "-n"],
    // The least that is supported is 300 MB.
    bytes: 320 << 20,
};

/// A moment: what had been promised, and the disk with its cache.
struct Snapshot {
    promised: Vec<Directory>,
    disk: Storage,
}

/// Makes the file system, and cuts the power so many times.
pub(super) fn check(context: &mut Context, args: &TargetArgs, kind: &Kind, plan: &Plan) -> Result<(), Failure> {
    let s = Duration::from_secs;
    let args =
        TargetArgs { size: args.size.max(kind.bytes), logical_block: args.logical_block.max(BLOCK), ..args.clone() };
    let step = |what: &str| format!("{}: {what}", kind.name);
    let target = context.step(&step("start"), s(60), |context| args.start(context))?;
    let checked = on_device(context, &args, kind, plan, &target, &step);
    let closed = context.always(&step("close"), s(120), |context| target.close(context));
    checked.and(closed)
}

fn on_device(
    context: &mut Context,
    args: &TargetArgs,
    kind: &Kind,
    plan: &Plan,
    target: &Target,
    step: &dyn Fn(&str) -> String,
) -> Result<(), Failure> {
    let s = Duration::from_secs;
    let seed = plan.seed.derive(kind.name, 0);
    let marks = Content::new(seed.derive("content", 0).get());
    let mounted = context.step(&step("mkfs and mount"), s(240), |context| {
        tool(kind.mkfs, &target.path())?;
        Mounted::mount_as(context, &target.path(), kind.kernel_name, kind.mount_options)
    })?;
    let used = context.step(&step("directories"), s(60), |_| directories(mounted.path(), marks)).and_then(|places| {
        (0..plan.cuts).try_for_each(|number| {
            let limit = s(180 * (1 + plan.images));
            context.step(&step(&format!("cut {}", number + 1)), limit, |context| {
                one_cut(context, args, kind, plan, target, &places, marks, (number, seed.derive("cut", number)))
            })
        })
    });
    // On a device that fails, this may take its time.
    let unmounted = context.always(&step("unmount"), s(120), |_| mounted.unmount());
    used.and(unmounted)
}

fn tool(command: &[&str], device: &Path) -> Result<(), Failure> {
    let device = device.display().to_string();
    let (name, arguments) = command.split_first().unwrap_or((&"", &[]));
    run(name, &[arguments, &[device.as_str()]].concat())
}

/// Makes the workers' directories, durably.
fn directories(root: &Path, marks: Content) -> Result<Vec<Place>, Failure> {
    let broken = |error: &std::io::Error| Failure::io("make and sync the directories", error);
    let places: Result<Vec<_>, _> = (0..WORKERS).map(|worker| Place::make(root, worker, marks)).collect();
    let places = places.map_err(|error| broken(&error))?;
    let root = File::open(root).map_err(|error| broken(&error))?;
    syncfs(&root).map_err(|errno| broken(&errno.into()))?;
    Ok(places)
}

#[expect(clippy::too_many_arguments, reason = "a cut is of everything")]
fn one_cut(
    context: &mut Context,
    args: &TargetArgs,
    kind: &Kind,
    plan: &Plan,
    target: &Target,
    places: &[Place],
    marks: Content,
    (number, seed): (u64, Seed),
) -> Result<(), Failure> {
    let mut rng = seed.rng();
    // The first one always has to, and a run of one cut says something.
    let may_take_nothing = number > 0 && rng.chance(1, 4);
    let (snapshot, mut first) = snapshot(context, target, places, seed, may_take_nothing, &mut rng)?;
    let mut told = Vec::new();
    for image in 0..plan.images {
        if context.interruption().came() {
            return Err(Failure::Interrupted);
        }
        let (disk, report) = match first.take() {
            Some(first) => first,
            None => snapshot.disk.crash(seed.derive("image", image))?,
        };
        cut::count(context, kind.name, &report);
        look_at(context, args, kind, &snapshot.promised, marks, &disk, &report)?;
        disk.forget()?;
        told.push(format!("{}/{}", report.cut.lost + report.cut.torn, report.unflushed));
    }
    snapshot.disk.forget()?;
    context.detail(format!("{} crash states, lost of unflushed changes: {}", plan.images, told.join(" ")));
    Ok(())
}

/// Works until the moment of the cut. Most cuts have to take something away, or they prove nothing: those that do not are drawn
/// again, at another moment too.
fn snapshot(
    context: &Context,
    target: &Target,
    places: &[Place],
    seed: Seed,
    may_take_nothing: bool,
    rng: &mut SeededRng,
) -> Result<(Snapshot, Option<(Storage, CutReport)>), Failure> {
    for attempt in 0.. {
        let moment = match attempt {
            0 if may_take_nothing => Moment::Durable(rng.within(1..=8)),
            0 => cut::moment(rng, REQUESTS_MAX),
            // Behind what makes durable there is little to lose.
            _ => Moment::Requests(rng.within(1..=REQUESTS_MAX)),
        };
        let snapshot = under_load(context, target, places, seed.derive("work", attempt), moment)?;
        for draw in 0..DRAWS {
            let (disk, report) = snapshot.disk.crash(seed.derive("first image", draw))?;
            if report.lost_sectors > 0 || may_take_nothing || attempt == ATTEMPTS {
                return Ok((snapshot, Some((disk, report))));
            }
            disk.forget()?;
            if report.unflushed == 0 {
                break;
            }
        }
        snapshot.disk.forget()?;
    }
    Err(Failure::Internal("no cut was drawn".to_owned()))
}

/// The disk at a moment when every worker is at work, and what had been promised by then.
fn under_load(
    context: &Context,
    target: &Target,
    places: &[Place],
    seed: Seed,
    moment: Moment,
) -> Result<Snapshot, Failure> {
    let stop = AtomicBool::new(false);
    let failed = Mutex::new(None);
    let forked = thread::scope(|scope| {
        for place in places {
            let (stop, failed) = (&stop, &failed);
            scope.spawn(move || {
                let worker = place.model().worker;
                let mut rng = seed.derive("worker", worker.into()).rng();
                match place.work(&mut rng, stop) {
                    Ok(steps) => context.evidence().add("file_operations", steps),
                    Err(error) => {
                        let what = Failure::io(format_args!("work in directory w{worker}"), &error);
                        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
                    }
                }
            });
        }
        // What has begun by then is known to the models; what has ended by then was promised. Whoever waits for what was
        // just done has to hear of it first: a promise that was not given cannot be broken.
        let promised = || {
            thread::sleep(TO_BE_HEARD);
            places.iter().map(|place| place.model().clone()).collect()
        };
        let forked = target.storage().fork(moment, PATIENCE, promised);
        stop.store(true, Ordering::Relaxed);
        forked
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(failure) => Err(failure),
        None => forked.map(|(promised, disk)| Snapshot { promised, disk }),
    }
}

/// Serves what a cut left, mounts it, and compares.
fn look_at(
    context: &Context,
    args: &TargetArgs,
    kind: &Kind,
    promised: &[Directory],
    marks: Content,
    disk: &Storage,
    report: &CutReport,
) -> Result<(), Failure> {
    // What took part in the crash is gone; what looks at its traces is sound.
    let args = TargetArgs { backend: BackendKind::Medium, mutant: None, ..args.clone() };
    let target = args.serve(context, disk)?;
    let looked = look::at(context, kind, promised, marks, &target);
    let closed = target.close(context);
    looked.map_err(|failure| with_cut(failure, kind, report)).and(closed)
}

/// A broken promise, and what the cut took.
fn with_cut(failure: Failure, kind: &Kind, report: &CutReport) -> Failure {
    use ublkit_harness::event::Event;
    match failure {
        Failure::DeviceBroke(broken) => match *broken.event {
            Event::Finding(mut finding) => {
                finding.what = format!("{} after a power cut: {}", kind.name, finding.what);
                finding.detail.extend(cut::in_lines(report));
                Event::Finding(finding).into()
            }
            other => other.into(),
        },
        other => other,
    }
}

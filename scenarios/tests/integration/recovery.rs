//! Devices whose servers died: what applications see meanwhile, and how the next server takes over.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use ublkit::ctrl::character_path;
use ublkit::orphan::{self, Class, Outcome};
use ublkit::sys::ublk::Features;
use ublkit::{Backend, Device, ErrorKind, Event, Geometry, Phase, QueueInfo, Recovery, Request, backends};

use super::client::{self, assert_same, bounded, builder, eventually};
use super::disk::Disk;
use super::keeper::Keeper;
use super::recoverable::{
    Guard, HELD, LONG, Pending, Place, SIZE, assert_live, assert_reads, await_state, controller, detached, ended,
    modes, open, recovered,
};
use super::runner::{cases, ids};

cases!("recovery":
    wait_fails_what_the_server_had_and_keeps_the_rest,
    reissue_keeps_everything,
    fail_io_fails_everything_at_once,
    a_server_killed_idle_is_followed_by_the_next,
    a_user_copy_device_is_recovered_as_one,
    a_second_recovery_is_told_of_the_first,
    a_recovery_killed_on_its_way_is_followed_by_the_next,
    a_recovery_that_fails_leaves_the_device_recoverable,
    what_cannot_be_recovered_is_refused_with_a_reason,
    a_recoverable_device_is_listed_and_deleted_only_by_id,
);

/// A keeper that has three writes in its hands, out of more than it has workers for, and the pending writes.
fn caught_with_requests(place: &Place, mode: Recovery) -> (Keeper, u32, Vec<Pending>, Guard) {
    let (keeper, id) = Keeper::serving(&place.file(), &format!("mode={mode} held_from={HELD}"));
    assert_live(id, keeper.pid());
    client::write(&open(id), 1, 0, 4096).expect("write");
    let pending: Vec<_> = (0..3).map(|n| Pending::write(id, 2, HELD + n * 4096)).collect();
    eventually("three writes are in the server's hands", || keeper.held() == 3);
    (keeper, id, pending, Guard(id))
}

fn wait_fails_what_the_server_had_and_keeps_the_rest() {
    let place = Place::new();
    let (keeper, id, pending, _guard) = caught_with_requests(&place, Recovery::Wait);
    keeper.kill();
    for pending in &pending {
        assert_eq!(pending.result(), Err(libc::EIO), "what the server had fails");
    }
    await_state(id, Recovery::Wait, keeper.pid());
    let waiting = Pending::write(id, 3, 8192);
    std::thread::sleep(Duration::from_millis(300));
    assert!(waiting.is_waiting(), "what came later waits");
    let next = recovered(&place, id);
    assert_eq!(waiting.result(), Ok(()));
    assert_reads(id, 3, 8192);
    ended(&next, id);
    assert_same(&place.stored(8192, 4096), &client::pattern(3, 8192, 4096), "stored");
}

fn reissue_keeps_everything() {
    let place = Place::new();
    let (keeper, id, pending, _guard) = caught_with_requests(&place, Recovery::Reissue);
    // What is written twice is written by the second server even if the first had it already.
    let file = File::options().write(true).open(place.file()).expect("open");
    file.write_all_at(&[0; 3 * 4096], HELD).expect("undo");
    keeper.kill();
    await_state(id, Recovery::Reissue, keeper.pid());
    let later = Pending::write(id, 3, 8192);
    std::thread::sleep(Duration::from_millis(300));
    assert!(later.is_waiting() && pending.iter().all(Pending::is_waiting), "everything waits");
    let next = recovered(&place, id);
    for (n, pending) in (0..).zip(&pending) {
        assert_eq!(pending.result(), Ok(()));
        assert_reads(id, 2, HELD + n * 4096);
    }
    assert_eq!(later.result(), Ok(()));
    ended(&next, id);
}

fn fail_io_fails_everything_at_once() {
    let place = Place::new();
    if !modes().contains(&Recovery::FailIo) {
        let before = ids();
        let error = Device::builder(backends::File::open(place.file()).expect("open"))
            .recovery(Recovery::FailIo)
            .start()
            .expect_err("this kernel has no such mode");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("Linux 6.16") && error.to_string().contains("reissue"), "{error}");
        assert_eq!(ids(), before);
        return;
    }
    let (keeper, id, pending, _guard) = caught_with_requests(&place, Recovery::FailIo);
    keeper.kill();
    for pending in &pending {
        assert_eq!(pending.result(), Err(libc::EIO), "what the server had fails");
    }
    await_state(id, Recovery::FailIo, keeper.pid());
    let errno = bounded("an error", Duration::from_secs(5), || Pending::write(id, 3, 8192).result());
    assert_eq!(errno, Err(libc::EREMOTEIO), "what comes later fails at once");
    let next = recovered(&place, id);
    ended(&next, id);
}

fn a_server_killed_idle_is_followed_by_the_next() {
    for mode in modes() {
        let place = Place::new();
        let (keeper, id) = Keeper::serving(&place.file(), &format!("mode={mode}"));
        client::write(&open(id), 1, 0, 4096).expect("write");
        keeper.kill();
        // At once: the library waits for the kernel to notice.
        let next = recovered(&place, id);
        next.kill();
        let third = recovered(&place, id);
        ended(&third, id);
    }
}

fn a_user_copy_device_is_recovered_as_one() {
    let place = Place::new();
    let (keeper, id) = Keeper::serving(&place.file(), "mode=reissue user_copy=1");
    client::write(&open(id), 1, 0, 4096).expect("write");
    keeper.kill();
    let waiting = Pending::write(id, 3, 8192);
    let next = recovered(&place, id);
    assert_eq!(waiting.result(), Ok(()));
    assert_reads(id, 3, 8192);
    let info = controller().get_dev_info(id).expect("info");
    assert!(info.features().contains(Features::USER_COPY), "{info:?}");
    ended(&next, id);
}

fn a_second_recovery_is_told_of_the_first() {
    let place = Place::new();
    let (keeper, id) = Keeper::serving(&place.file(), "mode=reissue");
    let _guard = Guard(id);
    client::write(&open(id), 1, 0, 4096).expect("write");
    keeper.kill();
    let first = Keeper::ordered(&place.file(), &format!("recover={id} hold_at={}", Phase::Configured));
    assert_eq!(first.line(), format!("held {}", Phase::Configured));
    let second = Keeper::ordered(&place.file(), &format!("recover={id}"));
    let answer = bounded("a refusal", LONG, || second.line());
    assert!(answer.starts_with("failed to") && answer.contains(&format!("held by pid {}", first.pid())), "{answer}");
    first.kill();
    let next = recovered(&place, id);
    ended(&next, id);
}

fn a_recovery_killed_on_its_way_is_followed_by_the_next() {
    let place = Place::new();
    let (keeper, id) = Keeper::serving(&place.file(), "mode=reissue");
    let _guard = Guard(id);
    client::write(&open(id), 1, 0, 4096).expect("write");
    keeper.kill();
    let waiting = Pending::write(id, 3, 8192);
    for phase in [Phase::Added, Phase::Configured, Phase::Fetched] {
        let next = Keeper::ordered(&place.file(), &format!("recover={id} hold_at={phase}"));
        assert_eq!(next.line(), format!("held {phase}"));
        next.kill();
        // The last one that served it is the first one still.
        await_state(id, Recovery::Reissue, keeper.pid());
    }
    let next = recovered(&place, id);
    assert_eq!(waiting.result(), Ok(()));
    assert_reads(id, 3, 8192);
    ended(&next, id);
}

fn a_recovery_that_fails_leaves_the_device_recoverable() {
    for mode in modes() {
        let (disk, id, held_open) = detached(mode);
        let failing = |fail: fn() -> io::Result<()>| {
            let geometry = disk.geometry();
            let open = move |info: &QueueInfo| {
                if info.queue == 1 {
                    fail()?;
                }
                Ok(|request: Request<'_>| request.complete())
            };
            // Within the default deadline: a panic's backtrace takes seconds in an emulated guest on a busy host.
            let error = Device::builder_with_handlers(geometry, open).recover(id).expect_err("it fails");
            assert!(error.to_string().contains("still there to be recovered"), "{error}");
            await_state(id, mode, std::process::id() as i32);
            error
        };
        let error = failing(|| Err(Errno::ENOSPC.into()));
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Queue, Some(libc::ENOSPC)), "{error}");
        let error = failing(|| panic!("planted: the handler panics when opened"));
        assert_eq!(error.kind(), ErrorKind::Queue, "{error}");
        let told = Arc::new(Mutex::new(Vec::new()));
        let device = builder(&disk)
            .on_event({
                let told = Arc::clone(&told);
                move |event| match event {
                    Event::Phase(phase) => told.lock().expect("lock").push(*phase),
                    other => panic!("{other}"),
                }
            })
            .recover(id)
            .expect("recover");
        assert_reads(id, 1, 0);
        device.detach().expect("detach");
        let device = builder(&disk).recover(id).expect("recover");
        drop(held_open);
        client::close(&device);
        let begun = [Phase::Added, Phase::Configured, Phase::Fetched, Phase::Started, Phase::Visible];
        let told = told.lock().expect("lock");
        assert_eq!(told[..begun.len()], begun);
        assert_eq!(told[begun.len()..], [Phase::Stopping, Phase::Joined, Phase::Detached]);
    }
}

fn what_cannot_be_recovered_is_refused_with_a_reason() {
    let refused = |disk: &Arc<Disk>, id: u32, kind: ErrorKind, words: &[&str]| {
        let error = bounded("a refusal", LONG, || builder(disk).recover(id)).expect_err("refused");
        assert_eq!(error.kind(), kind, "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
    };
    let disk = Disk::new(Geometry::bytes(SIZE));
    refused(&disk, 4711, ErrorKind::NotFound, &["there is no such device"]);
    let plain = client::start(&disk);
    refused(&disk, plain.id(), ErrorKind::State, &["built without recovery", "LIVE"]);
    client::close(&plain);

    let live = builder(&disk).recovery(Recovery::Wait).start().expect("start");
    let me = format!("pid {}", std::process::id());
    refused(&disk, live.id(), ErrorKind::Busy, &["LIVE", &me]);
    client::write(&client::direct(&live), 1, 0, 4096).expect("it is served as before");
    controller().stop(live.id(), LONG).expect("stop");
    refused(&disk, live.id(), ErrorKind::State, &["DEAD"]);
    client::close(&live);

    let (disk, id, held_open) = detached(Recovery::Wait);
    let larger = Disk::new(Geometry::bytes(2 * SIZE));
    refused(&larger, id, ErrorKind::InvalidInput, &["size in bytes 4194304 and not 8388608"]);
    let flushing = Disk::new(Geometry::bytes(SIZE).volatile_cache());
    refused(&flushing, id, ErrorKind::InvalidInput, &["a volatile cache, which it has not and the backend has"]);
    // Somebody else is about to recover it. Before 6.16 the last server's rings may still be on their way out.
    let mut claim = None;
    eventually("the last server has let go", || {
        claim = File::options().read(true).write(true).open(character_path(id)).ok();
        claim.is_some()
    });
    refused(&disk, id, ErrorKind::Busy, &[&me]);
    drop(claim);
    let device = builder(&disk).recover(id).expect("recover");
    assert_reads(id, 1, 0);
    drop(held_open);
    client::close(&device);
}

fn a_recoverable_device_is_listed_and_deleted_only_by_id() {
    const GRACE: Duration = Duration::from_millis(300);
    for mode in modes() {
        let (disk, id, file) = detached(mode);
        let _guard = Guard(id);
        // Whoever is to find it deleted at once has let go of it.
        let waiting = if mode == Recovery::FailIo {
            drop(file);
            None
        } else {
            Some(Pending::write_to(file, 1, 4096))
        };
        let controller = controller();
        let found = orphan::list(&controller, GRACE).expect("list");
        let one = found.iter().find(|device| device.id == id).expect("listed");
        assert_eq!(one.class, Class::Recoverable, "{one}");
        let cleaned = orphan::clean(&controller, &found);
        let outcome = |cleaned: &[orphan::Cleaned]| {
            cleaned.iter().find(|cleaned| cleaned.id == id).map(|cleaned| cleaned.outcome.clone())
        };
        assert!(matches!(outcome(&cleaned), Some(Outcome::Left(_))), "{cleaned:?}");
        await_state(id, mode, std::process::id() as i32);
        let begun = Instant::now();
        let cleaned = orphan::clean_ids(&controller, &[id], GRACE).expect("clean");
        if let Some(waiting) = waiting {
            // Who waited in it held it open for a moment more.
            assert!(matches!(outcome(&cleaned), Some(Outcome::Deleted | Outcome::Deleting)), "{cleaned:?}");
            assert_eq!(waiting.result(), Err(libc::EIO));
        } else {
            assert!(matches!(outcome(&cleaned), Some(Outcome::Deleted)), "{cleaned:?}");
        }
        assert!(begun.elapsed() < LONG);
        eventually("it is gone", || !ids().contains(&id));
        client::close(&builder(&disk).id(id).start().expect("the id can be used again"));
    }
}

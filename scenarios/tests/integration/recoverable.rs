//! What trials of devices that outlive their servers have in common.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use ublkit::ctrl::{State, block_path};
use ublkit::sys::ublk::Features;
use ublkit::{Controller, ErrorKind, Geometry, Recovery};

use super::client::{self, MIB, assert_same, bounded, builder, eventually};
use super::disk::Disk;
use super::keeper::Keeper;
use super::runner::ids;

pub(super) const SIZE: u64 = 4 * MIB;
/// Writes from here on stay in a keeper's hands, if it is told so.
pub(super) const HELD: u64 = 2 * MIB;
pub(super) const LONG: Duration = Duration::from_secs(15);

pub(super) fn controller() -> Controller {
    Controller::open().expect("open")
}

/// The modes that this kernel has.
pub(super) fn modes() -> Vec<Recovery> {
    let fail_io = controller().features().contains(Features::USER_RECOVERY_FAIL_IO);
    let all = [Recovery::Wait, Recovery::Reissue, Recovery::FailIo];
    all.into_iter().filter(|mode| *mode != Recovery::FailIo || fail_io).collect()
}

/// A file for a keeper to store things in.
pub(super) struct Place(tempfile::TempDir);

impl Place {
    pub(super) fn new() -> Self {
        let this = Self(tempfile::tempdir().expect("a directory"));
        File::create(this.file()).and_then(|file| file.set_len(SIZE)).expect("make a file");
        this
    }

    pub(super) fn file(&self) -> PathBuf {
        self.0.path().join("disk")
    }

    pub(super) fn stored(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        File::open(self.file()).and_then(|file| file.read_exact_at(&mut data, offset)).expect("read the file");
        data
    }
}

pub(super) fn open(id: u32) -> File {
    client::direct_at(&block_path(id))
}

/// Deletes a device if its trial fails: what waits in it would keep the program from ending.
pub(super) struct Guard(pub(super) u32);

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = controller().delete_async(self.0);
        }
    }
}

/// What a device's state is once its server is gone; the state and the pid as the driver tells them.
pub(super) fn await_state(id: u32, mode: Recovery, dead: i32) {
    let state = if mode == Recovery::FailIo { State::FailIo } else { State::Quiesced };
    let controller = controller();
    eventually("the kernel takes the device back", || {
        controller.get_dev_info(id).is_ok_and(|info| info.state() == state)
    });
    let info = controller.get_dev_info(id).expect("info");
    assert_eq!(info.recovery(), mode);
    // Since 6.18 it is known that it is gone; before, its number stays.
    assert!(info.server_pid() == -1 || info.server_pid() == dead, "{info:?}");
    assert!(block_path(id).exists(), "the block device stays");
}

pub(super) fn assert_live(id: u32, pid: i32) {
    let info = controller().get_dev_info(id).expect("info");
    assert_eq!((info.state(), info.server_pid()), (State::Live, pid));
}

/// I/O of an application that does not know what happens to its device.
pub(super) struct Pending(mpsc::Receiver<io::Result<()>>);

impl Pending {
    pub(super) fn write(id: u32, writer: u64, offset: u64) -> Self {
        Self::write_to(open(id), writer, offset)
    }

    pub(super) fn write_to(file: File, writer: u64, offset: u64) -> Self {
        let (done, result) = mpsc::channel();
        std::thread::spawn(move || done.send(client::write(&file, writer, offset, 4096).map(drop)));
        Self(result)
    }

    pub(super) fn result(&self) -> Result<(), i32> {
        let result = self.0.recv_timeout(LONG).expect("the application's I/O ends");
        result.map_err(|error| error.raw_os_error().expect("an errno"))
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.0.try_recv().is_err()
    }
}

pub(super) fn assert_reads(id: u32, writer: u64, offset: u64) {
    let read = client::read(&open(id), offset, 4096).expect("read");
    assert_same(&read, &client::pattern(writer, offset, 4096), "read");
}

/// The next server, the data, and an end with nothing left.
pub(super) fn recovered(place: &Place, id: u32) -> Keeper {
    let (next, same) = Keeper::serving(&place.file(), &format!("recover={id}"));
    assert_eq!(same, id);
    assert_live(id, next.pid());
    assert_reads(id, 1, 0);
    next
}

pub(super) fn ended(keeper: &Keeper, id: u32) {
    client::write(&open(id), 9, MIB, 4096).expect("write");
    assert_reads(id, 9, MIB);
    keeper.end();
    assert!(!ids().contains(&id) && !block_path(id).exists());
    let disk = Disk::new(Geometry::bytes(MIB));
    client::close(&builder(&disk).id(id).start().expect("the id can be used again"));
}

/// A device of this process that waits for another server, its backend, and somebody who has it open. To open it now, or to
/// close it, may be to wait for that server: since 6.18 the kernel looks for partitions some time after the start, and holds
/// up whoever opens or closes the device meanwhile.
pub(super) fn detached(mode: Recovery) -> (Arc<Disk>, u32, File) {
    let disk = Disk::new(Geometry::bytes(SIZE));
    let device = builder(&disk).queues(2).recovery(mode).start().expect("start");
    let file = client::direct(&device);
    let written = client::write(&file, 1, 0, 4096).expect("write");
    let left = bounded("detaching", LONG, || device.detach()).expect("detach");
    assert_eq!(left.id, device.id());
    assert_same(&disk.stored(0, 4096), &written, "stored");
    await_state(left.id, mode, std::process::id() as i32);
    // It is not this one's any more.
    assert_eq!(device.close().expect_err("detached").kind(), ErrorKind::State);
    assert_eq!(device.detach().expect("again"), left);
    drop(device);
    await_state(left.id, mode, std::process::id() as i32);
    (disk, left.id, file)
}

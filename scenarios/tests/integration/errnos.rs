//! A backend's errno is the application's.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;
use ublkit::{Device, Geometry, blkdev};

use super::client::{self, Aligned, MIB, direct, errno, start, start_with};
use super::disk::{Disk, Op};
use super::runner::cases;

cases!("errnos":
    reads_and_writes_fail_with_the_backends_errno,
    fsync_fails_with_the_backends_errno,
    discard_fails_with_the_backends_errno,
    write_zeroes_fails_with_the_backends_errno,
    with_workers_too,
    an_error_does_not_outlive_its_cause,
);

/// The block layer has a status for each of these and turns it back (`blk_errors[]` in `block/blk-core.c`).
const SURVIVE: [Errno; 16] = [
    Errno::EOPNOTSUPP,
    Errno::ETIMEDOUT,
    Errno::ENOSPC,
    Errno::ENOLINK,
    Errno::EREMOTEIO,
    Errno::EBADE,
    Errno::ENODATA,
    Errno::EILSEQ,
    Errno::ENOMEM,
    Errno::EBUSY,
    Errno::EAGAIN,
    Errno::ENODEV,
    Errno::ETOOMANYREFS,
    Errno::EOVERFLOW,
    Errno::ETIME,
    Errno::EINVAL,
];

/// It has none for these.
const BECOME_EIO: [Errno; 6] = [Errno::EIO, Errno::EPERM, Errno::ENOENT, Errno::EINTR, Errno::EFAULT, Errno::ENXIO];

fn table() -> impl Iterator<Item = (Errno, Errno)> {
    SURVIVE.into_iter().map(|errno| (errno, errno)).chain(BECOME_EIO.into_iter().map(|errno| (errno, Errno::EIO)))
}

fn fail(disk: &Disk, op: Op, with: Errno) {
    disk.hook(move |call| if call.op == op { Err(io::Error::from_raw_os_error(with as i32)) } else { Ok(()) });
}

/// Lets each errno come from calls of `op`, and compares what `act` gets with `want`.
fn each(disk: &Disk, op: Op, want: impl Fn(Errno, Errno) -> Option<Errno>, act: impl Fn() -> io::Result<()>) {
    let mut wrong = Vec::new();
    for (from, usual) in table() {
        disk.forget();
        fail(disk, op, from);
        let got = errno(act()).map(Errno::from_raw);
        disk.unhook();
        assert!(!disk.calls_of(op).is_empty(), "{op:?} with {from:?}: the backend was not asked");
        let want = want(from, usual);
        if got != want {
            wrong.push(format!("{op:?} fails with {from:?}: the application gets {got:?}, not {want:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// `EOPNOTSUPP` makes the kernel do without.
fn unless_unsupported(from: Errno, usual: Errno) -> Option<Errno> {
    (from != Errno::EOPNOTSUPP).then_some(usual)
}

fn able() -> Arc<Disk> {
    Disk::new(Geometry::bytes(MIB).volatile_cache().discard(4096).write_zeroes())
}

fn read_and_write(disk: &Disk, device: &Device) {
    let file = direct(device);
    let buffer = Aligned::pattern(1, 8192, 4096);
    each(disk, Op::Read, |_, usual| Some(usual), || client::read(&file, 4096, 512).map(drop));
    each(disk, Op::Write, |_, usual| Some(usual), || file.write_all_at(&buffer, 8192));
}

fn reads_and_writes_fail_with_the_backends_errno() {
    let disk = able();
    let device = start(&disk);
    read_and_write(&disk, &device);
    client::close(&device);
}

fn with_workers_too() {
    let disk = able();
    let device = start_with(&disk, |builder| builder.workers(2).data_mode(ublkit::DataMode::UserCopy));
    read_and_write(&disk, &device);
    client::close(&device);
}

fn fsync_fails_with_the_backends_errno() {
    let disk = able();
    let device = start(&disk);
    let file = direct(&device);
    // A flush that is not supported is one that is not needed: blkdev_fsync() (block/fops.c).
    each(&disk, Op::Flush, unless_unsupported, || file.sync_all());
    drop(file);
    client::close(&device);
}

fn discard_fails_with_the_backends_errno() {
    let disk = able();
    let device = start(&disk);
    let file = direct(&device);
    // A discard is a hint: that it is not supported is no error to blkdev_issue_discard() and blk_ioctl_discard().
    each(&disk, Op::Discard, unless_unsupported, || blkdev::discard(&file, 0, 64 << 10));
    drop(file);
    client::close(&device);
}

fn write_zeroes_fails_with_the_backends_errno() {
    let disk = able();
    let device = start(&disk);
    let file = direct(&device);
    // Where it is not supported, blkdev_issue_zeroout() (block/blk-lib.c) writes zeroes instead.
    each(&disk, Op::WriteZeroes, unless_unsupported, || blkdev::zero_out(&file, 0, 64 << 10));
    drop(file);
    client::close(&device);
}

fn an_error_does_not_outlive_its_cause() {
    let disk = able();
    let device = start(&disk);
    let file = direct(&device);
    client::write(&file, 1, 0, 8192).expect("write");
    fail(&disk, Op::Write, Errno::ENOSPC);
    assert_eq!(errno(client::write(&file, 2, 0, 4096)), Some(Errno::ENOSPC as i32));
    // The sectors beside it and the reads of it are none of its business.
    client::assert_same(&client::read(&file, 0, 8192).expect("read"), &client::pattern(1, 0, 8192), "old");
    disk.unhook();
    client::write(&file, 3, 0, 4096).expect("write again");
    client::assert_same(&client::read(&file, 0, 4096).expect("read"), &client::pattern(3, 0, 4096), "new");
    let stats = device.stats();
    assert_eq!(stats.iter().map(|queue| queue.failed).sum::<u64>(), 1, "{stats:?}");
    assert!(device.first_error().is_none(), "a backend's error is not the device's");
    drop(file);
    client::close(&device);
}

//! What a backend declares is used; what it does not declare never reaches it.

use std::os::unix::fs::{FileExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use ublkit::{DiscardLimits, Geometry, blkdev};

use super::client::{self, Aligned, GIB, KIB, MIB, assert_same, direct, errno, open, start};
use super::disk::{Call, Disk, Op};
use super::runner::cases;

cases!("capabilities":
    a_volatile_cache_is_flushed_after_the_writes,
    without_a_volatile_cache_no_flush_ever_arrives,
    a_declared_fua_arrives_as_one,
    an_undeclared_fua_becomes_a_write_and_a_flush,
    without_a_cache_a_dsync_write_is_just_a_write,
    discard_arrives_whole_and_spares_its_neighbours,
    long_discards_are_split_at_the_limit,
    an_undeclared_discard_is_not_supported,
    write_zeroes_arrives_with_and_without_unmap,
    undeclared_write_zeroes_become_writes_of_zeroes,
    a_read_only_device_is_never_written,
);

fn kinds(calls: &[Call]) -> Vec<Op> {
    calls.iter().map(|call| call.op).collect()
}

fn a_volatile_cache_is_flushed_after_the_writes() {
    let disk = Disk::new(Geometry::bytes(MIB).volatile_cache());
    let device = start(&disk);
    let file = direct(&device);
    disk.forget();
    client::write(&file, 1, 0, 4096).expect("write");
    assert_eq!(kinds(&disk.changes()), [Op::Write], "no flush that nobody asked for");
    for round in 2..5 {
        file.sync_all().expect("fsync");
        assert_eq!(disk.calls_of(Op::Flush).len(), round - 1, "one flush for each fsync");
    }
    assert_eq!(disk.changes()[0].op, Op::Write);
    drop(file);
    client::close(&device);
}

fn without_a_volatile_cache_no_flush_ever_arrives() {
    let disk = Disk::new(Geometry::bytes(MIB));
    let device = start(&disk);
    let file = open(&device, 0);
    client::write(&file, 1, 0, 4096).expect("write");
    file.sync_all().expect("fsync");
    file.sync_data().expect("fdatasync");
    drop(file);
    client::close(&device);
    assert!(disk.calls_of(Op::Flush).is_empty(), "{:?}", disk.changes());
    assert!(!disk.calls_of(Op::Write).is_empty());
    assert!(disk.calls().iter().all(|call| !call.fua));
}

/// What arrives of one direct write with `O_DSYNC`.
fn dsync_write(geometry: Geometry) -> Vec<Call> {
    let disk = Disk::new(geometry);
    let device = start(&disk);
    let file = open(&device, libc::O_DIRECT | libc::O_DSYNC);
    disk.forget();
    let wrote = client::write(&file, 1, 4096, 8192).expect("write");
    let calls = disk.changes();
    assert_same(&disk.stored(4096, 8192), &wrote, "stored");
    drop(file);
    client::close(&device);
    assert_eq!(calls.iter().filter(|call| call.op == Op::Write).map(|call| call.len).sum::<u64>(), 8192, "{calls:?}");
    calls
}

fn a_declared_fua_arrives_as_one() {
    let calls = dsync_write(Geometry::bytes(MIB).fua());
    assert!(calls.iter().filter(|call| call.op == Op::Write).all(|call| call.fua), "{calls:?}");
}

fn an_undeclared_fua_becomes_a_write_and_a_flush() {
    let calls = dsync_write(Geometry::bytes(MIB).volatile_cache());
    assert!(calls.iter().all(|call| !call.fua), "{calls:?}");
    assert_eq!(calls.last().map(|call| call.op), Some(Op::Flush), "{calls:?}");
}

fn without_a_cache_a_dsync_write_is_just_a_write() {
    let calls = dsync_write(Geometry::bytes(MIB));
    assert!(calls.iter().all(|call| call.op == Op::Write && !call.fua), "{calls:?}");
}

/// A disk full of a pattern.
fn full(geometry: Geometry) -> std::sync::Arc<Disk> {
    let disk = Disk::new(geometry);
    disk.store(0, &client::pattern(9, 0, MIB as usize));
    disk
}

/// The range reads as zeroes and its neighbours as before, at both ends.
fn assert_hole(disk: &Disk, file: &std::fs::File, offset: u64, len: u64) {
    let (end, beside) = (offset + len, 4096);
    let mut want = client::pattern(9, offset - beside, (len + 2 * beside) as usize);
    want[beside as usize..][..len as usize].fill(0);
    assert_same(&disk.stored(offset - beside, want.len()), &want, &format!("stored around {offset} to {end}"));
    assert_same(&client::read(file, offset - beside, want.len()).expect("read"), &want, "read");
}

fn discard_arrives_whole_and_spares_its_neighbours() {
    let disk = full(Geometry::bytes(MIB).discard(4096));
    let device = start(&disk);
    let file = direct(&device);
    for (offset, len) in [(8 * KIB, 4 * KIB), (64 * KIB, 256 * KIB), (512 * KIB + 512, 1024)] {
        disk.forget();
        blkdev::discard(&file, offset, len).expect("discard");
        let calls = disk.changes();
        assert!(calls.iter().all(|call| call.op == Op::Discard), "{calls:?}");
        assert_eq!(calls.iter().map(|call| (call.offset, call.len)).collect::<Vec<_>>(), [(offset, len)]);
        assert_hole(&disk, &file, offset, len);
    }
    assert_eq!(errno(blkdev::discard(&file, 0, 100)), Some(Errno::EINVAL as i32));
    drop(file);
    client::close(&device);
}

fn long_discards_are_split_at_the_limit() {
    let size = 6 * GIB;
    let limits = DiscardLimits { granularity: 4096, alignment: 0, max_bytes: 512 * MIB };
    for (geometry, limit) in
        [(Geometry::bytes(size).discard_limits(limits), 512 * MIB), (Geometry::bytes(size).discard(4096), GIB)]
    {
        let disk = full(geometry);
        disk.store(5 * GIB, &client::pattern(9, 5 * GIB, 4096));
        let device = start(&disk);
        let file = direct(&device);
        blkdev::discard(&file, 4096, 5 * GIB - 4096).expect("discard");
        let mut calls = disk.changes();
        calls.sort_by_key(|call| call.offset);
        assert!(calls.iter().all(|call| call.op == Op::Discard && call.len <= limit), "{calls:?}");
        let mut at = 4096;
        for call in &calls {
            assert_eq!(call.offset, at, "without gaps: {calls:?}");
            at += call.len;
        }
        assert_eq!(at, 5 * GIB, "{calls:?}");
        assert_same(&disk.stored(0, 4096), &client::pattern(9, 0, 4096), "before");
        assert_same(&disk.stored(5 * GIB, 4096), &client::pattern(9, 5 * GIB, 4096), "behind");
        drop(file);
        client::close(&device);
    }
}

fn an_undeclared_discard_is_not_supported() {
    for geometry in [Geometry::bytes(MIB), Geometry::bytes(MIB).write_zeroes()] {
        let disk = full(geometry);
        let device = start(&disk);
        let file = direct(&device);
        assert_eq!(errno(blkdev::discard(&file, 0, 4096)), Some(Errno::EOPNOTSUPP as i32));
        assert!(disk.changes().is_empty(), "{:?}", disk.changes());
        drop(file);
        client::close(&device);
    }
}

fn write_zeroes_arrives_with_and_without_unmap() {
    let disk = full(Geometry::bytes(MIB).write_zeroes_max(128 * KIB));
    let device = start(&disk);
    let file = direct(&device);
    let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let offsets = [16 * KIB, 320 * KIB, 640 * KIB];
    let len = 256 * KIB;
    for (offset, how) in offsets.into_iter().zip([Some(zero), Some(punch), None]) {
        disk.forget();
        match how {
            Some(flags) => fallocate(&file, flags, offset as i64, len as i64).expect("fallocate"),
            None => blkdev::zero_out(&file, offset, len).expect("BLKZEROOUT"),
        }
        let calls = disk.changes();
        assert!(calls.iter().all(|call| call.op == Op::WriteZeroes && call.len <= 128 * KIB), "{how:?}: {calls:?}");
        assert_eq!(calls.iter().map(|call| call.len).sum::<u64>(), len, "{how:?}: {calls:?}");
        assert!(calls.iter().all(|call| call.no_unmap == (how != Some(punch))), "{how:?}: {calls:?}");
        assert_hole(&disk, &file, offset, len);
    }
    drop(file);
    client::close(&device);
}

fn undeclared_write_zeroes_become_writes_of_zeroes() {
    let disk = full(Geometry::bytes(MIB).discard(4096));
    let device = start(&disk);
    let file = direct(&device);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(&file, punch, 8192, 8192), Err(Errno::EOPNOTSUPP));
    assert!(disk.changes().is_empty(), "{:?}", disk.changes());
    blkdev::zero_out(&file, 64 * KIB, 192 * KIB).expect("BLKZEROOUT");
    let calls = disk.changes();
    assert!(calls.iter().all(|call| call.op == Op::Write), "{calls:?}");
    assert_eq!(calls.iter().map(|call| call.len).sum::<u64>(), 192 * KIB);
    assert_hole(&disk, &file, 64 * KIB, 192 * KIB);
    drop(file);
    client::close(&device);
}

fn a_read_only_device_is_never_written() {
    let disk = full(Geometry::bytes(MIB).volatile_cache().discard(4096).write_zeroes().read_only());
    let device = start(&disk);
    let reader = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device.path())
        .expect("open for reading");
    assert!(blkdev::read_only(&reader).expect("BLKROGET"));
    assert_same(&client::read(&reader, 4096, 4096).expect("read"), &client::pattern(9, 4096, 4096), "read");
    let data = Aligned::pattern(1, 0, 4096);
    match std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device.path()) {
        Err(error) => {
            let refused = [Errno::EACCES, Errno::EROFS, Errno::EPERM].map(|errno| Some(errno as i32));
            assert!(refused.contains(&error.raw_os_error()), "{error}");
        }
        Ok(writer) => {
            assert_eq!(errno(writer.write_at(&data, 0)), Some(Errno::EPERM as i32));
            assert!(blkdev::discard(&writer, 0, 4096).is_err());
            assert!(blkdev::zero_out(&writer, 0, 4096).is_err());
        }
    }
    assert!(errno(reader.write_at(&data, 0)).is_some());
    drop(reader);
    client::close(&device);
    assert!(disk.changes().iter().all(|call| call.op == Op::Flush), "{:?}", disk.changes());
    assert_same(&disk.stored(0, MIB as usize), &client::pattern(9, 0, MIB as usize), "all of it");
}

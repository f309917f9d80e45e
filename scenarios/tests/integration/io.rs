//! Reads and writes of every length and alignment, in every way a backend is called.

use std::io::IoSlice;

use nix::sys::uio::pwritev;
use ublkit::{DataMode, Geometry};

use super::client::{self, Aligned, KIB, MIB, assert_same, direct, start_with};
use super::disk::{Disk, Op};
use super::runner::cases;

const MAX_IO: u64 = 16 * KIB;

cases!("io":
    every_length_copied_by_the_driver_inline,
    every_length_copied_by_the_driver_with_workers,
    every_length_copied_by_the_server_inline,
    every_length_copied_by_the_server_with_workers,
    buffered_writes_reach_the_backend_on_fsync,
);

fn every_length_copied_by_the_driver_inline() {
    every_length(DataMode::Copy, 0);
}

fn every_length_copied_by_the_driver_with_workers() {
    every_length(DataMode::Copy, 4);
}

fn every_length_copied_by_the_server_inline() {
    every_length(DataMode::UserCopy, 0);
}

fn every_length_copied_by_the_server_with_workers() {
    every_length(DataMode::UserCopy, 4);
}

fn every_length(mode: DataMode, workers: usize) {
    for queues in [1, 2] {
        let disk = Disk::new(Geometry::bytes(2 * MIB));
        // Its memory holds noise beforehand, so that a read which brings nothing is seen.
        disk.store(0, &client::pattern(99, 0, 2 << 20));
        let device = start_with(&disk, |builder| {
            builder.queues(queues).max_io_bytes(MAX_IO as u32).data_mode(mode).workers(workers)
        });
        let file = direct(&device);
        for (writer, (sector, len)) in (1..).zip([
            (1, 512),
            (7, 1024),
            (63, 4 * KIB),
            (129, 4 * KIB + 512),
            (333, MAX_IO - 512),
            (511, MAX_IO),
            (1001, MAX_IO + 512),
            (1777, 4 * MAX_IO),
            (2777, 4 * MAX_IO + 512),
        ]) {
            let what = format!("{queues} queues, {len} bytes at sector {sector}");
            disk.forget();
            let (offset, len) = (sector * 512, len as usize);
            let wrote = client::write(&file, writer, offset, len).expect(&what);
            assert_same(&disk.stored(offset, len), &wrote, &format!("{what}: stored"));
            let writes = disk.calls_of(Op::Write);
            assert_eq!(writes.iter().map(|call| call.len).sum::<u64>(), len as u64, "{what}: {writes:?}");
            assert!(writes.iter().all(|call| (1..=MAX_IO).contains(&call.len)), "{what}: {writes:?}");
            for (at, name) in [(offset - 512, "before"), (offset + len as u64, "behind")] {
                assert_same(
                    &disk.stored(at, 512),
                    &client::pattern(99, at, 512),
                    &format!("{what}: the sector {name}"),
                );
                disk.store(at, &client::pattern(99, at, 512));
            }
            let back = client::read(&file, offset, len).expect(&what);
            assert_same(&back, &wrote, &format!("{what}: read"));
            let reads = disk.calls_of(Op::Read);
            assert!(reads.iter().all(|call| (1..=MAX_IO).contains(&call.len)), "{what}: {reads:?}");
            // The next one must not find its own neighbours changed.
            disk.store(offset, &client::pattern(99, offset, len));
        }
        vectored(&disk, &file);
        drop(file);
        let stats = device.stats();
        assert_eq!(stats.len(), usize::from(queues));
        assert!(
            stats.iter().all(|queue| queue.failed == 0 && queue.dropped == 0 && queue.panicked == 0),
            "{stats:?}"
        );
        client::close(&device);
    }
}

fn vectored(disk: &Disk, file: &std::fs::File) {
    let offset = MIB + MIB / 2 + 512;
    let lengths = [512, 1024, 4608, 512, 65536];
    let mut at = offset;
    let parts: Vec<Aligned> = lengths
        .iter()
        .map(|&len| {
            let part = Aligned::pattern(50, at, len);
            at += len as u64;
            part
        })
        .collect();
    let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let total: usize = lengths.iter().sum();
    assert_eq!(pwritev(file, &slices, offset as i64).expect("pwritev"), total);
    assert_same(&disk.stored(offset, total), &client::pattern(50, offset, total), "vectored: stored");
    let mut first = Aligned::zeroed(1536);
    let mut rest = Aligned::zeroed(total - 1536);
    let mut slices = [std::io::IoSliceMut::new(&mut first), std::io::IoSliceMut::new(&mut rest)];
    assert_eq!(nix::sys::uio::preadv(file, &mut slices, offset as i64).expect("preadv"), total);
    assert_same(&first, &client::pattern(50, offset, 1536), "vectored: first part");
    assert_same(&rest, &client::pattern(50, offset + 1536, total - 1536), "vectored: second part");
}

fn buffered_writes_reach_the_backend_on_fsync() {
    let disk = Disk::new(Geometry::bytes(MIB).volatile_cache());
    let device = start_with(&disk, |builder| builder.queues(2));
    let file = client::open(&device, 0);
    let wrote = client::write(&file, 5, 1234 * 8, 100_000).expect("write");
    file.sync_all().expect("fsync");
    assert_same(&disk.stored(1234 * 8, 100_000), &wrote, "stored");
    let calls = disk.changes();
    let last_write = calls.iter().rposition(|call| call.op == Op::Write).expect("written");
    assert!(calls[last_write..].iter().any(|call| call.op == Op::Flush), "a flush comes after the writes: {calls:?}");
    drop(file);
    client::close(&device);
}

//! Backends that are wrong in one place each, and how they are found out.

mod durable;
mod errors;
mod racy;
mod report;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ublkit::backends::{Memory, Null};
use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

use super::*;
use crate::sim::MediumDisk;

/// A right disk of 1 MiB.
fn right() -> Memory {
    Memory::new(1 << 20)
}

#[test]
fn a_right_backend_passes_and_the_work_is_counted() {
    let checked = check(right).seeds(20).ops(500).threads(3).run();
    assert_eq!((checked.seeds(), checked.ops()), (20, 20 * 500));
    assert!(checked.verified_bytes() > 1 << 20 && checked.thread_calls() > 10_000, "{checked}");
    assert!(checked.evidence().count("thread_overlaps") > 0 && checked.power_cuts() == 0, "{checked}");
}

#[test]
fn what_opens_may_be_a_result() {
    check(|| Ok::<_, io::Error>(right())).seeds(2).ops(200).run();
    let closed = || Err::<Memory, _>(io::Error::other("not today"));
    let found = check(closed).try_run().expect_err("it does not open");
    assert!(found.to_string().contains("not today"), "{found}");
    let found = check(|| -> Memory { panic!("nor ever") }).try_run().expect_err("it does not open");
    assert!(found.to_string().contains("nor ever") && found.operations() == 0, "{found}");
}

#[test]
fn a_device_that_is_none_is_refused() {
    for geometry in [Geometry::bytes(0), Geometry::bytes(1000), Geometry::bytes(1 << 20).logical_block(100)] {
        let found = check(move || Null::with_geometry(geometry)).try_run().expect_err("no device");
        assert!(found.to_string().contains("its geometry is wrong"), "{found}");
    }
}

#[test]
#[should_panic(expected = "nothing was checked")]
fn a_check_without_seeds_is_no_pass() {
    check(right).seeds(0).run();
}

#[test]
fn tiny_and_huge_devices_are_checked() {
    for size in [512, 4096, 65_024, 1 << 30, (1 << 40) + 512] {
        let checked = check(move || Memory::new(size)).seeds(5).ops(300).run();
        assert!(checked.verified_bytes() > 0, "{checked}");
    }
    let disk = || Memory::with_geometry(Geometry::bytes(1 << 33).logical_block(4096).fua().discard(65_536));
    check(disk).seeds(5).ops(300).discard_reads_zeroes().run();
}

#[test]
fn a_read_only_device_is_read() {
    let checked = check(|| Null::with_geometry(Geometry::bytes(1 << 20).read_only())).seeds(3).ops(200).run();
    assert_eq!(checked.evidence().count("writes"), 0, "{checked}");
}

#[test]
fn null_loses_what_is_written_and_that_is_found() {
    let found = check(|| Null::new(1 << 20)).try_run().expect_err("it stores nothing");
    assert!(found.operations() <= 2, "{found}");
}

/// Offsets of 32 bits.
struct Overflows(Memory);

impl Backend for Overflows {
    fn geometry(&self) -> Geometry {
        Geometry::bytes(self.0.geometry().size)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, u64::from(offset as u32))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.0.write_at(buf, u64::from(offset as u32), flags)
    }
}

#[test]
fn an_offset_that_overflows_is_found() {
    let found = check(|| Overflows(Memory::new((8 << 30) + (1 << 20)))).try_run().expect_err("two places are one");
    assert!(found.operations() <= 3, "{found}");
}

/// One that is right, but fails or panics from its 21st write on.
struct Fails(Memory, AtomicU64, bool);

impl Backend for Fails {
    fn geometry(&self) -> Geometry {
        Geometry::bytes(self.0.geometry().size)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        if self.1.fetch_add(1, Ordering::Relaxed) >= 20 {
            assert!(!self.2, "a hole in the map");
            return Err(io::Error::other("the map is full"));
        }
        self.0.write_at(buf, offset, flags)
    }
}

#[test]
fn what_a_backend_says_when_it_fails_is_told() {
    for (panics, words) in [(false, "the map is full"), (true, "a hole in the map")] {
        let found =
            check(move || Fails(right(), AtomicU64::new(0), panics)).ops(100).try_run().expect_err("it fails");
        assert!(found.operations() == 21 && found.to_string().contains(words), "{found}");
    }
}

/// Writes zeroes over one block too many.
struct Long(Arc<Memory>);

impl Backend for Long {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.0.write_at(buf, offset, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.0.write_zeroes(offset, (len + 512).min((1 << 20) - offset), flags)
    }
}

#[test]
fn zeroes_that_reach_too_far_are_found() {
    let found = check(|| Long(Arc::new(right()))).try_run().expect_err("it zeroes too much");
    assert!(found.operations() <= 3, "{found}");
    assert_eq!(found.script().map(|script| script.setup.bytes), Some(1 << 20), "the device stays what it is");
}

#[test]
fn a_seed_alone_shows_the_same_again() {
    let check = || check(|| Long(Arc::new(right())));
    let found = check().seeds(50).try_run().expect_err("it zeroes too much");
    let again = check().seed(found.seed()).try_run().expect_err("it still does");
    assert_eq!((again.seed(), again.signature()), (found.seed(), found.signature()));
}

#[test]
fn a_medium_may_be_used_as_it_is() {
    let disk = |medium: Medium| {
        let geometry = Geometry::bytes(medium.options().bytes).fua().write_zeroes().discard(4096);
        MediumDisk::new(medium, geometry)
    };
    let checked = check(disk).seeds(40).medium_bytes(256 << 10).discard_reads_zeroes().run();
    let count = |name: &str| checked.evidence().count(name);
    assert!(checked.power_cuts() > 10 && count("kills") > 10 && count("reopens") > 5, "{checked}");
    assert!(count("changes_lost") > 100 && count("held") > 0 && count("short_results") > 0, "{checked}");
}

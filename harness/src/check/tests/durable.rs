//! What power cuts and deaths show.

use std::sync::Mutex;

use super::*;
use crate::plan::OpKind;

/// What a backend on a medium gets wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    None,
    /// A flush that flushes nothing.
    Flush,
    /// A flush that flushes nothing, but all is flushed in the end: only who dies tells.
    FlushInTheEnd,
    /// FUA that is ignored.
    Fua,
    /// Does not open again once something was written.
    Open,
}

struct OnDisk {
    medium: Medium,
    bug: Bug,
}

impl OnDisk {
    fn open(medium: Medium, bug: Bug) -> io::Result<Self> {
        let mut first = [0];
        medium.read_at(&mut first, 0)?;
        if bug == Bug::Open && first != [0] {
            return Err(io::Error::other("unknown magic"));
        }
        Ok(Self { medium, bug })
    }
}

impl Drop for OnDisk {
    fn drop(&mut self) {
        if self.bug == Bug::FlushInTheEnd {
            let _ = self.medium.flush();
        }
    }
}

impl Backend for OnDisk {
    fn geometry(&self) -> Geometry {
        Geometry::bytes(self.medium.options().bytes).fua()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.medium.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        if flags.fua && self.bug != Bug::Fua {
            return self.medium.write_through(buf, offset);
        }
        self.medium.write_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        if matches!(self.bug, Bug::Flush | Bug::FlushInTheEnd) { Ok(()) } else { self.medium.flush() }
    }
}

#[test]
fn durable_bugs_are_found_in_a_few_steps() {
    let found =
        |bug| check(move |medium: Medium| OnDisk::open(medium, bug)).seeds(20).medium_bytes(1 << 20).try_run();
    assert!(found(Bug::None).expect("a right one").power_cuts() > 10);
    for bug in [Bug::Flush, Bug::FlushInTheEnd, Bug::Fua, Bug::Open] {
        let found = found(bug).expect_err("a wrong one");
        assert!(found.operations() <= 4, "{bug:?}: {found}");
        let durable = bug != Bug::Open;
        assert_eq!(found.failure().oracle == Oracle::Durable, durable, "{bug:?}: {found}");
    }
}

/// Declares no volatile cache: what it acknowledges is durable, except for changes of the kind that it forgets.
struct WriteThrough {
    medium: Medium,
    forgets: Option<OpKind>,
}

impl WriteThrough {
    /// What was done to the range is durable now.
    fn done(&self, kind: OpKind, offset: u64, len: u64) -> io::Result<()> {
        if self.forgets == Some(kind) {
            return Ok(());
        }
        // There is more than one way to do that.
        if len > 4096 { self.medium.flush() } else { self.medium.flush_range(offset, len) }
    }
}

impl Backend for WriteThrough {
    fn geometry(&self) -> Geometry {
        Geometry::bytes(self.medium.options().bytes).discard(4096).write_zeroes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.medium.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, _flags: WriteFlags) -> io::Result<()> {
        self.medium.write_at(buf, offset)?;
        self.done(OpKind::Write, offset, buf.len() as u64)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.medium.zero(offset, len)?;
        self.done(OpKind::Discard, offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> io::Result<()> {
        self.medium.zero(offset, len)?;
        self.done(OpKind::WriteZeroes, offset, len)
    }
}

#[test]
fn without_a_volatile_cache_all_that_is_acknowledged_has_to_be_there() {
    let check = |forgets| {
        let open = move |medium: Medium| WriteThrough { medium, forgets };
        check(open).seeds(40).medium_bytes(256 << 10).discard_reads_zeroes().try_run()
    };
    let checked = check(None).expect("a right one");
    let count = |name: &str| checked.evidence().count(name);
    assert!(
        count("power_cuts_in_flight") > 100 && count("kills_in_flight") > 100 && count("reopens") > 50,
        "{checked}"
    );
    assert!(count("discards") > 100 && count("zeroes") > 100 && count("verified_bytes") > 100 << 20, "{checked}");
    for kind in [OpKind::Write, OpKind::Discard, OpKind::WriteZeroes] {
        let found = check(Some(kind)).expect_err("it forgets");
        let page = found.to_string();
        assert!(page.contains("the power is cut"), "{kind}: {page}");
        // A change that is under way again hides when the other one was lost, where such a case is the smallest.
        let says = found.failure().oracle == Oracle::Durable && page.contains("without a volatile cache");
        assert!((says && found.operations() <= 4) || kind != OpKind::Write, "{kind}: {page}");
    }
}

/// A cache of its own above a medium, which is written when it is flushed and when it is dropped.
struct WriteBack {
    medium: Medium,
    cache: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl WriteBack {
    fn write_back(&self) -> io::Result<()> {
        let mut cache = self.cache.lock().expect("nobody panics");
        cache.drain(..).try_for_each(|(offset, data)| self.medium.write_at(&data, offset))
    }
}

impl Backend for WriteBack {
    fn geometry(&self) -> Geometry {
        Geometry::bytes(self.medium.options().bytes).volatile_cache()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.write_back()?;
        self.medium.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, _flags: WriteFlags) -> io::Result<()> {
        self.cache.lock().expect("nobody panics").push((offset, buf.to_vec()));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.write_back()?;
        self.medium.flush()
    }
}

impl Drop for WriteBack {
    fn drop(&mut self) {
        let _ = self.write_back();
    }
}

#[test]
fn a_cache_of_its_own_dies_with_the_server_unless_that_is_left_out() {
    let open = |medium: Medium| WriteBack { medium, cache: Mutex::default() };
    check(open).seeds(20).medium_bytes(1 << 20).kills(false).run();
    let found = check(open).seeds(20).medium_bytes(1 << 20).try_run().expect_err("it loses what it has");
    assert!(found.operations() <= 2 && found.to_string().contains("the server dies"), "{found}");
}

//! The backends that come with the library keep their promises.

use std::fs;
use std::io;

use tempfile::TempDir;
use ublkit::Geometry;
use ublkit::backends::{File, Memory, Null};
use ublkit_harness::check;

const BYTES: u64 = 2 << 20;

#[test]
fn memory_holds_what_it_is_given() {
    let checked = check(|| Memory::new(BYTES)).seeds(8).discard_reads_zeroes().threads(4).run();
    assert!(checked.thread_calls() >= 20_000, "{checked}");
}

#[test]
fn memory_with_any_geometry() {
    let geometry = Geometry::bytes(BYTES).logical_block(4096).fua().discard(65_536).write_zeroes_max(8192);
    check(move || Memory::with_geometry(geometry)).seeds(8).discard_reads_zeroes().threads(4).run();
}

#[test]
fn memory_of_a_tebibyte() {
    check(|| Memory::new(1 << 40)).seeds(5).ops(500).discard_reads_zeroes().run();
}

/// It stores nothing, and says so.
#[test]
fn null_is_found_to_lose_what_is_written() {
    let found = check(|| Null::new(BYTES)).try_run().expect_err("it stores nothing");
    assert!(found.operations() <= 2, "{found}");
}

/// A file that is made anew before each run, and opened again within one.
fn file(direct: bool) {
    let dir = TempDir::new().expect("a temporary directory");
    let path = dir.path().join("disk");
    let reset = {
        let path = path.clone();
        move || match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{}: {error}", path.display()),
            _ => {
                File::create(&path, BYTES).expect("a new file");
            }
        }
    };
    let checked = check(move || File::options().direct(direct).open(&path))
        .seeds(8)
        .ops(1000)
        .reset(reset)
        .discard_reads_zeroes()
        .threads(4)
        // The page cache copies without a lock that readers would wait for.
        .torn_by_races()
        .run();
    let count = |name: &str| checked.evidence().count(name);
    assert!(count("kills") > 5 && count("reopens") > 0 && checked.thread_calls() >= 20_000, "{checked}");
}

#[test]
fn a_file_holds_what_it_is_given_when_it_is_opened_again() {
    file(false);
}

#[test]
fn a_file_past_the_page_cache() {
    file(true);
}

#[test]
fn a_file_that_is_used_again_as_it_is() {
    let dir = TempDir::new().expect("a temporary directory");
    let path = dir.path().join("disk");
    File::create(&path, BYTES).expect("a new file");
    check(move || File::open(&path)).seeds(5).ops(1000).reopens().run();
}

use std::path::PathBuf;

use super::*;
use crate::backends::testing::{Rng, against_model};

/// A directory that is gone after the test, under the given parent.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path, name: &str) -> Self {
        let path = parent.join(format!("ublkit-file-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("create a scratch directory");
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// On disk (with luck a file system with direct I/O), and in memory (one that has other abilities).
fn places(name: &str) -> Vec<Scratch> {
    let mut places = vec![Scratch::new(&std::env::temp_dir(), name)];
    for parent in ["/var/tmp", "/dev/shm"].map(Path::new) {
        if parent.is_dir() {
            places.push(Scratch::new(parent, name));
        }
    }
    places
}

fn options() -> [FileOptions; 3] {
    [File::options(), File::options().direct(true), File::options().direct(true).logical_block(512)]
}

#[test]
fn behaves_like_a_vector_of_bytes() {
    for (index, place) in places("model").iter().enumerate() {
        for (way, options) in options().into_iter().enumerate() {
            let (size, seed) = (1 << 20, 1 + index as u64 * 3 + way as u64);
            let disk = options.create(place.path(&format!("{way}")), size).expect("create");
            against_model(&disk, size, seed, 300, u64::from(disk.geometry.logical_block));
            assert_eq!(disk.storage.metadata().expect("stat").len(), size, "the file keeps its size");
        }
    }
}

/// A file whose direct I/O needs 4 KiB, whatever the file system here needs.
fn coarse(place: &Scratch, name: &str, size: u64) -> File {
    let mut disk = File::options().direct(true).logical_block(512).create(place.path(name), size).expect("create");
    disk.direct = Some(Direct { memory: 4096, offset: 4096, whole_blocks: RwLock::new(()) });
    disk
}

#[test]
fn requests_below_the_files_alignment_go_through_a_copy() {
    for place in places("copy") {
        against_model(&coarse(&place, "a", 1 << 19), 1 << 19, 11, 400, 512);
    }
}

/// Each thread owns every fourth sector, so that every 4 KiB block belongs to all of them; some requests are whole
/// blocks. A sector that is put back to an older content by a neighbour's read-modify-write is a lost write.
#[test]
fn partial_writes_of_one_block_do_not_undo_each_other() {
    const SECTORS: u64 = 64;
    for place in places("partial") {
        let disk = &coarse(&place, "a", SECTORS * 512);
        std::thread::scope(|scope| {
            for thread in 0..3_u64 {
                scope.spawn(move || {
                    let mut rng = Rng::new(thread + 1);
                    let mut last = vec![0_u8; SECTORS as usize];
                    for _ in 0..400 {
                        let sector = rng.below(SECTORS / 4) * 4 + thread;
                        let mut buf = [0; 512];
                        disk.read_at(&mut buf, sector * 512).expect("read");
                        assert_eq!(buf, [last[sector as usize]; 512], "sector {sector}");
                        last[sector as usize] = rng.below(256) as u8;
                        let data = [last[sector as usize]; 512];
                        disk.write_at(&data, sector * 512, WriteFlags::NONE).expect("write");
                    }
                });
            }
        });
    }
}

#[test]
fn a_whole_block_is_not_undone_by_a_partial_write() {
    let places = places("whole");
    let disk = &coarse(&places[0], "a", 4096);
    let whole = std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..300_u32 {
                disk.write_at(&[round as u8; 512], 3584, WriteFlags::NONE).expect("write");
            }
        });
        let mut undone = 0;
        let mut memory = Aligned::new(4096, 4096).expect("memory");
        for round in 0..300_u32 {
            memory.bytes().fill(round as u8);
            disk.write_at(memory.bytes(), 0, WriteFlags::NONE).expect("write");
            let mut first = [0; 512];
            disk.read_at(&mut first, 0).expect("read");
            undone += u32::from(first != [round as u8; 512]);
        }
        undone
    });
    assert_eq!(whole, 0, "completed writes that were undone");
}

#[test]
fn what_is_written_is_in_the_file_and_a_discard_makes_a_hole() {
    use std::os::unix::fs::MetadataExt;
    for place in places("hole") {
        let path = place.path("a");
        let disk = File::create(&path, 1 << 20).expect("create");
        disk.write_at(&vec![7; 1 << 18], 1 << 18, WriteFlags::FUA).expect("write");
        disk.flush().expect("flush");
        assert_eq!(fs::read(&path).expect("read")[(1 << 18) - 1..=1 << 18], [0, 7]);
        let before = fs::metadata(&path).expect("stat").blocks();
        disk.discard(1 << 18, 1 << 18).expect("discard");
        let after = fs::metadata(&path).expect("stat").blocks();
        assert!(after < before, "{before} sectors before, {after} after");
        assert_eq!(fs::read(&path).expect("read"), vec![0; 1 << 20]);
    }
}

#[test]
fn sizes_and_kinds_that_cannot_be_served_are_refused_with_a_reason() {
    let places = places("sizes");
    let place = &places[0];
    let refuse = |result: io::Result<File>, what: &str| {
        let error = result.expect_err(what);
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains(what), "{error}");
    };
    refuse(File::create(place.path("x"), 1000), "not a multiple");
    refuse(File::create(place.path("x"), 0), "not a multiple");
    refuse(File::open("/dev/null"), "neither");
    refuse(File::open(&place.0), "neither");
    fs::write(place.path("small"), [1; 511]).expect("write");
    refuse(File::open(place.path("small")), "511 bytes");
    refuse(File::options().logical_block(1000).create(place.path("y"), 4096), "power of two");
    assert!(!place.path("y").exists(), "a failed create leaves nothing behind");
    assert_eq!(File::create(place.path("small"), 512).expect_err("exists").kind(), ErrorKind::AlreadyExists);

    fs::write(place.path("odd"), [1; 1300]).expect("write");
    let disk = File::open(place.path("odd")).expect("open");
    assert_eq!(disk.geometry().size, 1024, "rounded down");
    assert!(disk.read_at(&mut [0; 512], 1024).is_err());
}

#[test]
fn a_read_only_device_declares_no_writes() {
    let places = places("ro");
    let path = places[0].path("a");
    drop(File::create(&path, 8192).expect("create"));
    let disk = File::options().read_only(true).open(&path).expect("open");
    let geometry = disk.geometry();
    assert!(geometry.read_only && !geometry.volatile_cache && geometry.discard.is_none());
    disk.read_at(&mut [0; 512], 0).expect("read");
    assert!(disk.write_at(&[0; 512], 0, WriteFlags::NONE).is_err());
}

#[test]
fn a_file_that_is_cut_short_gives_eio_and_not_zeroes() {
    let places = places("cut");
    let path = places[0].path("a");
    let disk = File::create(&path, 8192).expect("create");
    fs::OpenOptions::new().write(true).open(&path).expect("open").set_len(4096).expect("truncate");
    let error = disk.read_at(&mut [0; 8192], 0).expect_err("short");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

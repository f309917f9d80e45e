//! Owned memory mappings: descriptor arrays of a character device, and page-aligned buffers.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

#[cfg(feature = "raw")]
use nix::sys::mman::mprotect;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap, mmap_anonymous, munmap};
use nix::unistd::{SysconfVar, sysconf};

/// The size of a page in bytes.
pub(crate) fn page_size() -> usize {
    sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|size| usize::try_from(size).ok()).unwrap_or(4096)
}

/// A mapping that is unmapped when dropped. It gives out addresses, not references: who may touch which part of
/// it, and when, is the owner's to know.
#[derive(Debug)]
pub(crate) struct Map {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and `Map` itself never reads or writes it.
unsafe impl Send for Map {}
// SAFETY: as above; every method takes `&self` and only computes addresses or calls the kernel.
unsafe impl Sync for Map {}

impl Map {
    /// `len` bytes of zeroed, page-aligned memory. Pages are not touched: they cost nothing until they are used.
    pub(crate) fn anonymous(len: usize) -> io::Result<Self> {
        let len = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice cannot alias anything.
        let start = unsafe {
            mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)?
        };
        Ok(Self { start: start.cast(), len: len.get() })
    }

    /// As [`anonymous`](Self::anonymous), rounded up to whole pages, with one more behind them that nobody can read or
    /// write: a kernel that copies upwards and is told no end is stopped there. That page counts in [`len`](Self::len).
    #[cfg(feature = "raw")]
    pub(crate) fn guarded(len: usize) -> io::Result<Self> {
        let page = page_size();
        let map = Self::anonymous(len.next_multiple_of(page) + page)?;
        // SAFETY: the last page of a mapping that is ours, which nobody has an address of yet.
        unsafe {
            let guard = map.start.add(map.len - page);
            mprotect(guard.cast(), page, ProtFlags::PROT_NONE)?;
        }
        Ok(map)
    }

    /// `len` bytes of address space that nobody can read or write.
    #[cfg(feature = "raw")]
    pub(crate) fn inaccessible(len: usize) -> io::Result<Self> {
        let len = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: as above.
        let start = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE)? };
        Ok(Self { start: start.cast(), len: len.get() })
    }

    /// `len` bytes of `file` from `offset`, read-only and shared with whoever writes them.
    pub(crate) fn shared_read_only(file: impl AsFd, offset: usize, len: usize) -> io::Result<Self> {
        let len = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice; it is only read, through raw pointers.
        let start = unsafe { mmap(None, len, ProtFlags::PROT_READ, flags, file, offset as i64)? };
        Ok(Self { start: start.cast(), len: len.get() })
    }

    /// `len` bytes of `file` from `offset`, readable and writable, shared with the kernel.
    pub(crate) fn shared(file: impl AsFd, offset: usize, len: usize) -> io::Result<Self> {
        let len = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags, file, offset as i64)? };
        Ok(Self { start: start.cast(), len: len.get() })
    }

    /// Has the kernel back the mapping with pages of the ordinary size. Where it is allowed to, it would take, and clear, 2 MiB at
    /// the first byte that is touched: 2 million instructions, and memory that is never used.
    pub(crate) fn avoid_huge_pages(&self) {
        // A kernel without huge pages refuses, and does what is wanted.
        // SAFETY: the range is ours and mapped, and the advice changes nothing in it.
        let _ = unsafe { madvise(self.start.cast(), self.len, MmapAdvise::MADV_NOHUGEPAGE) };
    }

    /// Keeps the mapping in memory (`mlock`); needs `CAP_IPC_LOCK` or a large enough `RLIMIT_MEMLOCK`.
    pub(crate) fn lock(&self) -> io::Result<()> {
        // SAFETY: the range is ours and mapped.
        unsafe { mlock(self.start.cast(), self.len)? };
        Ok(())
    }

    /// The address of the first byte.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// The length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by us and whoever used it has borrowed or outlived this value.
        // An error would mean the range is not mapped, which leaves nothing to do.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(feature = "raw")]
    fn behind_guarded_memory_is_a_page_that_stops_whoever_writes_on() {
        let map = Map::guarded(10_000).expect("map");
        let (start, page) = (map.start().as_ptr() as usize, page_size());
        assert_eq!(map.len(), 10_000_usize.next_multiple_of(page) + page);
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        let permissions = |address: usize| {
            let line = maps.lines().find(|line| {
                let (from, to) = line.split_once(' ').and_then(|(range, _)| range.split_once('-')).expect("a range");
                let number = |text| usize::from_str_radix(text, 16).expect("an address");
                (number(from)..number(to)).contains(&address)
            });
            line.and_then(|line| line.split(' ').nth(1)).unwrap_or("nothing is there")
        };
        assert_eq!(permissions(start), "rw-p");
        assert_eq!(permissions(start + map.len() - page - 1), "rw-p");
        assert_eq!(permissions(start + map.len() - page), "---p");
        assert_eq!(permissions(start + map.len() - 1), "---p");
    }

    #[test]
    fn anonymous_memory_is_aligned_and_zero_length_is_refused() {
        let map = Map::anonymous(10_000).expect("map");
        assert_eq!(map.start().as_ptr() as usize % page_size(), 0);
        assert_eq!(map.len(), 10_000);
        assert!(Map::anonymous(0).is_err());
    }
}

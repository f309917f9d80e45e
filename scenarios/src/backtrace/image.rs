//! The programs and libraries in a process's memory, and how their calls are unwound.

use std::fs::{self, File};
use std::io;

use framehop::{ExplicitModuleSectionInfo, MayAllocateDuringUnwind, Module, Unwinder as _};
use object::read::ReadCache;
use object::{Object as _, ObjectSection as _, ObjectSegment as _};

use super::stop::{Registers, Taken};

#[cfg(target_arch = "aarch64")]
use framehop::aarch64::{CacheAarch64 as Cache, UnwindRegsAarch64, UnwinderAarch64 as Unwinder};
#[cfg(target_arch = "x86_64")]
use framehop::x86_64::{CacheX86_64 as Cache, UnwindRegsX86_64, UnwinderX86_64 as Unwinder};

/// Frames of a stack that are told.
const FRAMES_MAX: usize = 64;

/// A file that is mapped, and where.
pub(super) struct Image {
    pub(super) path: String,
    /// What is added to the file's addresses.
    bias: u64,
    /// From its first mapped byte to behind its last.
    range: std::ops::Range<u64>,
    /// Read in pieces, as they are needed: most of a program is not.
    cache: ReadCache<File>,
}

/// All of them.
pub(super) struct Images(Vec<Image>);

impl Images {
    /// Those of process `pid`. What is no ELF file, or cannot be read, is left out.
    pub(super) fn of(pid: u32) -> io::Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let own = fs::read_link(format!("/proc/{pid}/exe")).ok();
        let open = |path: &str| {
            // By the process's own link: the file may have been replaced since.
            let is_own = own.as_ref().is_some_and(|own| own.as_os_str() == path);
            if is_own { File::open(format!("/proc/{pid}/exe")) } else { File::open(path) }.ok()
        };
        Ok(Self(mapped(&maps).into_iter().filter_map(|(path, range)| Image::new(path, range, open(path)?)).collect()))
    }
}

impl Images {
    /// The one at `address`, and the address inside of it.
    pub(super) fn at(&self, address: u64) -> Option<(&Image, u64)> {
        let image = self.0.iter().find(|image| image.range.contains(&address))?;
        Some((image, address - image.bias))
    }
}

/// The files of which something is executable, and the range of each.
fn mapped(maps: &str) -> Vec<(&str, std::ops::Range<u64>)> {
    let mut files: Vec<(&str, std::ops::Range<u64>, bool)> = Vec::new();
    for line in maps.lines() {
        let Some((range, rest)) = line.split_once(' ') else { continue };
        let Some((start, end)) = range.split_once('-') else { continue };
        let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)) else { continue };
        let Some(path) = rest.find('/').map(|at| &rest[at..]) else { continue };
        let executable = rest.as_bytes().get(2) == Some(&b'x');
        match files.iter_mut().find(|(known, ..)| *known == path) {
            Some((_, range, any)) => {
                *range = range.start.min(start)..range.end.max(end);
                *any |= executable;
            }
            None => files.push((path, start..end, executable)),
        }
    }
    files.into_iter().filter(|(.., executable)| *executable).map(|(path, range, _)| (path, range)).collect()
}

impl Image {
    fn new(path: &str, range: std::ops::Range<u64>, file: File) -> Option<Self> {
        let cache = ReadCache::new(file);
        let object = object::File::parse(&cache).ok()?;
        let first = object.segments().map(|segment| segment.address()).min()?;
        // Segments begin anywhere in their first page, mappings do not.
        let bias = range.start.checked_sub(first & !0xfff)?;
        let path = path.to_owned();
        Some(Self { path, bias, range, cache })
    }

    /// The file's headers, and what they lead to.
    pub(super) fn object(&self) -> Option<object::File<'_, &ReadCache<File>>> {
        object::File::parse(&self.cache).ok()
    }

    fn module(&self) -> Option<Module<&[u8]>> {
        let object = self.object()?;
        let range = |name: &str| {
            let section = object.section_by_name(name)?;
            Some(section.address()..section.address() + section.size())
        };
        let data = |name: &str| object.section_by_name(name)?.data().ok();
        let sections = ExplicitModuleSectionInfo {
            base_svma: 0,
            // Its bytes are not: they matter only where there is no `.eh_frame`, and are most of what would be read.
            text_svma: range(".text"),
            eh_frame_svma: range(".eh_frame"),
            eh_frame: data(".eh_frame"),
            eh_frame_hdr_svma: range(".eh_frame_hdr"),
            eh_frame_hdr: data(".eh_frame_hdr"),
            got_svma: range(".got"),
            ..ExplicitModuleSectionInfo::default()
        };
        Some(Module::new(self.path.clone(), self.range.clone(), self.bias, sections))
    }
}

/// Finds the return addresses of stacks.
pub(super) struct Unwinding<'a> {
    unwinder: Unwinder<&'a [u8], MayAllocateDuringUnwind>,
    cache: Cache<MayAllocateDuringUnwind>,
}

impl<'a> Unwinding<'a> {
    pub(super) fn new(images: &'a Images) -> Self {
        let mut unwinder = Unwinder::new();
        for module in images.0.iter().filter_map(Image::module) {
            unwinder.add_module(module);
        }
        Self { unwinder, cache: Cache::new() }
    }

    /// Where `thread` stands, innermost first: addresses inside of the calls, not behind them.
    pub(super) fn addresses(&mut self, thread: &Taken) -> Vec<u64> {
        let Registers { pc, .. } = thread.registers;
        let mut word = |address| thread.word(address).ok_or(());
        let mut frames = self.unwinder.iter_frames(pc, registers(thread.registers), &mut self.cache, &mut word);
        let mut addresses = Vec::new();
        while addresses.len() < FRAMES_MAX
            && let Ok(Some(frame)) = frames.next()
        {
            addresses.push(frame.address_for_lookup());
        }
        addresses
    }
}

#[cfg(target_arch = "x86_64")]
fn registers(Registers { pc, sp, fp, .. }: Registers) -> UnwindRegsX86_64 {
    UnwindRegsX86_64::new(pc, sp, fp)
}

#[cfg(target_arch = "aarch64")]
fn registers(Registers { sp, fp, lr, .. }: Registers) -> UnwindRegsAarch64 {
    UnwindRegsAarch64::new(lr, sp, fp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_read() {
        let maps = "\
55d0-55d1 r--p 00000000 08:01 1 /usr/bin/some program
55d1-55d4 r-xp 00001000 08:01 1 /usr/bin/some program
55d8-55d9 rw-p 00000000 00:00 0 [heap]
7f00-7f01 r--p 00000000 08:01 2 /usr/share/locale
7f10-7f12 rw-p 00000000 00:00 0 
7ffe-7fff r-xp 00000000 00:00 0 [vdso]
nonsense
";
        assert_eq!(mapped(maps), [("/usr/bin/some program", 0x55d0..0x55d4)]);
    }
}

//! What the driver says of the request that each tag of a queue has.

use std::fs::File;
use std::io;

use crate::sys::map::{Map, page_size};
use crate::sys::ublk::{self, IoDesc};

/// The descriptors of one queue, mapped.
#[derive(Debug)]
pub(crate) struct Descriptors {
    map: Map,
    depth: u16,
}

impl Descriptors {
    /// Maps the descriptors of queue `queue`, of `depth` tags.
    pub(crate) fn map(device: &File, queue: u16, depth: u16) -> io::Result<Self> {
        let page = page_size();
        let map =
            Map::shared_read_only(device, ublk::queue_map_offset(queue, page), ublk::queue_map_len(depth, page))?;
        Ok(Self { map, depth })
    }

    /// Memory in the driver's place, with the same descriptor for every tag.
    #[cfg(any(test, feature = "driverless"))]
    pub(crate) fn pretended(depth: u16, descriptor: IoDesc) -> io::Result<Self> {
        let map = Map::anonymous(ublk::queue_map_len(depth, page_size()))?;
        for tag in 0..usize::from(depth) {
            // SAFETY: in bounds by the length mapped, aligned (page start plus a multiple of 24), and new memory of which nobody
            // else knows.
            unsafe { map.start().cast::<IoDesc>().as_ptr().add(tag).write(descriptor) };
        }
        Ok(Self { map, depth })
    }

    /// How many tags there are.
    pub(crate) fn depth(&self) -> u16 {
        self.depth
    }

    /// A tag's descriptor as it stands there now, but for the buffer's address, which whoever gave it to the driver knows.
    ///
    /// # Safety
    /// `tag` is below the depth.
    #[inline(always)]
    pub(crate) unsafe fn request(&self, tag: u16) -> IoDesc {
        let at = self.at(tag);
        // SAFETY: in bounds by the caller's promise and the length mapped, aligned (page start plus a multiple of 24, alignment
        // 8), and every bit pattern is an `IoDesc`. Volatile, because the driver, which may write it, is another writer than the
        // compiler can see.
        unsafe {
            IoDesc {
                op_flags: (&raw const (*at).op_flags).read_volatile(),
                nr_sectors: (&raw const (*at).nr_sectors).read_volatile(),
                start_sector: (&raw const (*at).start_sector).read_volatile(),
                addr: 0,
            }
        }
    }

    /// All of it.
    #[cfg(feature = "raw")]
    pub(crate) fn get(&self, tag: u16) -> Option<IoDesc> {
        if tag >= self.depth {
            return None;
        }
        // SAFETY: it is below the depth; and as above.
        Some(unsafe { IoDesc { addr: (&raw const (*self.at(tag)).addr).read_volatile(), ..self.request(tag) } })
    }

    #[inline(always)]
    fn at(&self, tag: u16) -> *const IoDesc {
        self.map.start().cast::<IoDesc>().as_ptr().wrapping_add(usize::from(tag))
    }
}

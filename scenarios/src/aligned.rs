//! Buffers for direct I/O.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// What every block device and kernel is content with: a page.
const ALIGNMENT: usize = 4096;

/// Bytes that begin at a page boundary, as `O_DIRECT` wants them.
pub struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// `len` zeroes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let bytes = vec![0; len + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        // `align_offset` may decline in theory; the kernel would then say EINVAL, which is better than a panic.
        Self { start: if start > ALIGNMENT { 0 } else { start }, bytes, len }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Not the bytes themselves: there are many.
impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_buffer_begins_at_a_page() {
        for len in [0, 1, 512, 4096, 1 << 20] {
            let buf = AlignedBuf::zeroed(len);
            assert_eq!((buf.len(), buf.as_ptr().addr() % ALIGNMENT), (len, 0));
        }
    }
}

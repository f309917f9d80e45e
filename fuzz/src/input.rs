//! Bytes, as values of other types.

/// Takes values off the front of some bytes. After the last byte come zeroes, so that every input is long enough.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    bytes: &'a [u8],
}

impl<'a> Input<'a> {
    /// All of `bytes`.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// A 32-bit number, little endian.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// A 64-bit number: any, or, so that numbers meet, a small one or one a little below a power of two.
    pub fn u64(&mut self) -> u64 {
        match self.byte() {
            kind @ 0..=99 => u64::from(kind),
            kind @ 100..=199 => (1_u64 << (kind % 64)).wrapping_sub(u64::from(self.byte() % 4)),
            _ => u64::from_le_bytes(self.array()),
        }
    }

    /// Yes or no.
    pub fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// What is left.
    #[must_use]
    pub const fn rest(self) -> &'a [u8] {
        self.bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let (taken, rest) = self.bytes.split_at(N.min(self.bytes.len()));
        array[..taken.len()].copy_from_slice(taken);
        self.bytes = rest;
        array
    }
}

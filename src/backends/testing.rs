//! What the backends' tests share: a seeded generator and the brute-force model.

use crate::{Backend, WriteFlags, ZeroFlags};

/// xorshift64: the same numbers for the same seed, which is not 0.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// Runs `steps` random operations on a fresh backend and on a vector of bytes, and compares after each.
///
/// Requires what every backend here promises: discarded and unwritten bytes read as zeroes.
pub(crate) fn against_model<B: Backend>(backend: &B, size: u64, seed: u64, steps: u32, align: u64) {
    let mut rng = Rng::new(seed);
    let mut model = vec![0_u8; size as usize];
    let mut buf = Vec::new();
    for step in 0..steps {
        let offset = rng.below(size / align) * align;
        let most = if rng.below(50) == 0 { size } else { 40_000.max(align) };
        let len = (1 + rng.below((size - offset).min(most) / align)) * align;
        let range = offset as usize..(offset + len) as usize;
        let what = rng.below(12);
        match what {
            0..=4 => {
                let mut data = vec![0; len as usize];
                for part in data.chunks_mut(128) {
                    part.fill(rng.below(256) as u8);
                }
                let flags = if rng.below(4) == 0 { WriteFlags::FUA } else { WriteFlags::NONE };
                backend.write_at(&data, offset, flags).expect("write");
                model[range.clone()].copy_from_slice(&data);
            }
            5 => {
                backend.discard(offset, len).expect("discard");
                model[range.clone()].fill(0);
            }
            6 | 7 => {
                let flags = ZeroFlags { no_unmap: what == 6, fua: rng.below(2) == 0 };
                backend.write_zeroes(offset, len, flags).expect("write_zeroes");
                model[range.clone()].fill(0);
            }
            8 => backend.flush().expect("flush"),
            _ => {}
        }
        buf.clear();
        buf.resize(range.len(), 0xa5);
        backend.read_at(&mut buf, offset).expect("read");
        assert!(buf == model[range], "seed {seed} step {step} operation {what}: {len} bytes at {offset}");
    }
    buf.resize(model.len(), 0xa5);
    backend.read_at(&mut buf, 0).expect("read");
    assert!(buf == model, "seed {seed}: at the end");
}

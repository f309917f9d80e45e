//! Device ids, of which there are only so many.

/// How many devices there may be.
const IDS: u32 = 64;

/// The ids that are taken.
#[derive(Debug, Default)]
pub(crate) struct Ids {
    taken: u64,
    mine: Option<u32>,
}

impl Ids {
    /// A device is added. Returns whether there was an id for it.
    pub(crate) fn add(&mut self) -> bool {
        let free = (!self.taken).trailing_zeros();
        if free >= IDS {
            return false;
        }
        self.taken |= 1 << free;
        self.mine = Some(free);
        true
    }

    /// The device is gone; its id too, if it was given back.
    pub(crate) fn remove(&mut self, given_back: bool) {
        if let Some(id) = self.mine.take()
            && given_back
        {
            self.taken &= !(1 << id);
        }
    }

    /// The machine started anew.
    pub(crate) fn reboot(&mut self) {
        *self = Self::default();
    }

    /// How many ids are taken.
    pub(crate) fn taken(&self) -> u32 {
        self.taken.count_ones()
    }
}

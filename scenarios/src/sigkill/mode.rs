//! What becomes of a device whose server dies, and of the I/O to it.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use ublkit::ctrl::State;
use ublkit::sys::ublk::Features;

/// What a device was started with for the case that its server dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mode {
    /// The device dies with its server: whatever is in flight fails, and the disk is gone
    None,
    /// What the server had in hand fails; everything else waits for the next server
    Wait,
    /// Nothing fails: what the server had in hand is given to the next one, once more
    Reissue,
    /// What the server had in hand fails, and so does everything until there is another server
    FailIo,
}

impl Mode {
    /// What the driver calls a started device whose server has died.
    pub(super) const fn state(self) -> State {
        match self {
            Self::None => State::Dead,
            Self::Wait | Self::Reissue => State::Quiesced,
            Self::FailIo => State::FailIo,
        }
    }

    /// Whether another server can take the device over.
    pub(super) const fn recovers(self) -> bool {
        !matches!(self, Self::None)
    }

    /// What the driver has to be able to do.
    pub(super) fn features(self) -> Features {
        match self {
            Self::None => Features::NONE,
            Self::Wait => Features::USER_RECOVERY,
            Self::Reissue => Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE,
            Self::FailIo => Features::USER_RECOVERY | Features::USER_RECOVERY_FAIL_IO,
        }
    }
}

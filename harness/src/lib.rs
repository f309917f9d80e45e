//! Oracles for block devices.

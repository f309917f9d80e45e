//! Serve Linux block devices from user space through ublk.

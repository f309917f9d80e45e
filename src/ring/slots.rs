//! Reads and writes of a client on a block device or file.

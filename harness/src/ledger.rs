//! What each block may hold now, under overlapping and concurrent operations.

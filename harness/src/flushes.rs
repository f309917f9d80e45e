//! Flushes: what is acknowledged as durable reached the storage.

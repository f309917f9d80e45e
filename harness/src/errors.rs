//! Error accounting.

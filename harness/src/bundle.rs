//! What is kept of a failure.

//! The engine in anyone's tests.

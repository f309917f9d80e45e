//! Making a failing script small.

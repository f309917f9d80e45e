//! What a power cut may leave behind.

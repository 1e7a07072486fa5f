//! The binary framing among processes of ours.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pubsub_unix::fuzz::frames(data));

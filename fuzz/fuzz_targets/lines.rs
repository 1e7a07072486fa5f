//! The lines of TypeScript peers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pubsub_unix::fuzz::lines(data));

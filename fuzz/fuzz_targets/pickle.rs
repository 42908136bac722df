//! See `deltaserve::fuzzing::pickle`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltaserve::fuzzing::pickle(data));

//! See `deltaserve::fuzzing::grammar`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltaserve::fuzzing::grammar(data));

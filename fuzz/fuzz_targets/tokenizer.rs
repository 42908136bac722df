//! See `deltaserve::fuzzing::tokenizer`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltaserve::fuzzing::tokenizer(data));

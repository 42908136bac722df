//! See `deltaserve::fuzzing::gguf_header`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltaserve::fuzzing::gguf_header(data));

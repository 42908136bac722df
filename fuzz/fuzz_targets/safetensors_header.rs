//! See `deltaserve::fuzzing::safetensors_header`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltaserve::fuzzing::safetensors_header(data));

//! The laws of the running service, over real gRPC on loopback: one module per subject, a test's name is the law.
//!
//! Everything runs on a tiny random base that is written at the start of each test; nothing is downloaded or shared.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests stop where anything fails")]

mod access;
mod bad_input;
mod bench;
mod cancel;
mod classify_file;
mod compose;
mod constrained;
mod drain;
mod edges;
mod evaluation;
mod fair;
mod folders;
mod full;
mod generate;
mod generate_file;
mod generation;
mod heads;
mod hostile;
mod hostile_http2;
mod hostile_names;
mod hostile_wire;
mod hot_swap;
mod isolation;
mod keeping;
mod mix;
mod pause;
mod preference;
mod prefix_cache;
mod quantized;
mod restart;
mod seq2seq;
mod servers;
mod sharing;
mod speculation;
mod study;
mod support;
mod sweep;
mod tenants;
mod tls;
mod train;
mod transfer;

//! The generated protocol: messages, servers and clients of `deltaserve.v1`. Its reference is the comments in `proto/`.
//! Nothing outside `grpc` and `cli` uses it.
#![allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used, clippy::expect_used, unreachable_pub, reason = "generated")]

tonic::include_proto!("deltaserve.v1");

/// The protocol's description, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/deltaserve.bin"));

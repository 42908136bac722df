//! deltaserve: one frozen base model, many tenants' deltas, one forward.
//!
//! A process loads a base once and keeps it resident. What a tenant owns is a delta: small, named, versioned, loaded
//! and evicted while the server runs, and trained in the background on the same weights. Two threads own all compute,
//! the [`engine`] and the trainer of [`train`]; both run [`model::Transformer::forward`], to which the deltas of a step
//! are an argument. tokio owns all waiting: edges ([`grpc`], [`http`]) call [`admission`], which joins [`text`],
//! [`registry`], [`engine`] and [`train`]; the [`store`] keeps what must survive. [`app`] puts it together.
//!
//! # Glossary
//!
//! * **base**: the frozen model, with a fingerprint of its config and tensors. Its tensors never change.
//! * **delta**: what changes the base for one purpose: patches at sites, and possibly a head. Any method.
//! * **adapter**: the bottleneck method only; never a word for delta. (`adapters/` is PEFT's word for its folders.)
//! * **site**: a place of the model where a delta may attach: a projection, a norm, the language-model head.
//! * **patch**: what a delta does at one site: a low-rank update, a bias, a scale.
//! * **head**: a classification layer that travels with a delta, with its own labels.
//! * **row**: one position of one sequence in a step; hidden states are always `[rows, hidden]`.
//! * **span**: the consecutive rows of one sequence in a step.
//! * **slot**: of a step, one distinct delta and its rows; of the cache, the place of one position's key and value.
//! * **step**: one forward of the engine; of training, one update by the optimizer (of one or more micro-batches).
//! * **resident**: a delta whose tensors are in memory.
//! * **lease**: what keeps a version resident for a request, from admission to its last token.
//! * **publish**: to store an immutable version and move its name to it, all or nothing.
//! * **retire**: to end something by its one way out: a sequence in the engine, a version that no name has any more.
//! * **job**: a training run with one terminal state and a gap-free stream of events.
//!
//! ARCHITECTURE.md in the repository has the code map, the two data flows, and the invariants with their tests.

pub mod access;
pub mod admission;
pub mod app;
pub mod audit;
pub mod cli;
pub mod config;
pub mod delta;
pub mod engine;
pub mod failpoint;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod grammar;
pub mod grpc;
pub mod http;
pub mod hub;
pub mod ids;
pub mod interop;
pub mod kv;
pub mod measures;
pub mod merge;
pub mod model;
pub mod nn;
pub mod ops;
pub mod pacing;
pub mod registry;
pub mod rows;
pub mod shutdown;
pub mod store;
pub mod telemetry;
pub mod text;
pub mod train;

pub(crate) use failpoint::failpoint;

//! Protocol messages to domain values and back. Total: every field is converted or refused by name; the limits
//! themselves are in `admission::check`.

mod deltas;
mod inference;
mod jobs;
mod methods;
mod preference;
mod server;
mod sweep;
mod training;

pub(super) use deltas::*;
pub(super) use inference::*;
pub(super) use jobs::*;
pub(super) use server::*;
pub(super) use training::*;

use crate::{
    admission::{
        catalog_params::PageRequest,
        check::Problems,
        params::{PublishPolicy, ServeError},
    },
    delta::Task,
    grpc::proto,
    ids::DeltaId,
};

const DEFAULT_PAGE: u32 = 100;
const MAX_PAGE: u32 = 1000;

/// A list request's page.
pub(super) fn page(size: u32, token: String) -> Result<PageRequest, ServeError> {
    let size = match size {
        0 => DEFAULT_PAGE,
        1..=MAX_PAGE => size,
        _ => return Err(ServeError::field("page_size", format!("is {size}; accepted are up to {MAX_PAGE}"))),
    };
    Ok(PageRequest { size, token: (!token.is_empty()).then_some(token) })
}

/// A required string.
pub(super) fn required(field: &str, value: String) -> Result<String, ServeError> {
    if value.is_empty() { Err(ServeError::field(field, "is required")) } else { Ok(value) }
}

/// An optional expected version.
pub(super) fn expected(field: &str, value: Option<&str>) -> Result<Option<DeltaId>, ServeError> {
    value.map(|text| text.parse().map_err(|e| ServeError::field(field, format!("{e}")))).transpose()
}

/// A publish policy; unset = upsert. Contradictions are problems.
fn policy(at: &str, message: Option<proto::PublishPolicy>, problems: &mut Problems) -> PublishPolicy {
    use proto::PublishMode as Mode;
    let Some(proto::PublishPolicy { mode, expected_id }) = message else { return PublishPolicy::default() };
    let id_field = format!("{at}.expected_id");
    let mode = Mode::try_from(mode);
    if !expected_id.is_empty() && !matches!(mode, Ok(Mode::CompareAndSwap)) {
        problems.push(&id_field, "is only accepted with PUBLISH_MODE_COMPARE_AND_SWAP");
    }
    match mode {
        Ok(Mode::Unspecified | Mode::Upsert) => PublishPolicy::Upsert,
        Ok(Mode::Create) => PublishPolicy::Create,
        Ok(Mode::CompareAndSwap) => match expected_id.parse() {
            Ok(id) => PublishPolicy::CompareAndSwap(id),
            Err(error) => {
                problems.push(&id_field, format!("{error}"));
                PublishPolicy::default()
            }
        },
        Err(unknown) => {
            problems.push(format!("{at}.mode"), format!("{unknown}"));
            PublishPolicy::default()
        }
    }
}

/// A required task.
fn task(field: &str, value: i32, problems: &mut Problems) -> Task {
    use proto::Task as Wire;
    match Wire::try_from(value) {
        Ok(Wire::CausalLm) => return Task::CausalLm,
        Ok(Wire::Seq2seq) => return Task::Seq2Seq,
        Ok(Wire::SeqCls) => return Task::SeqCls,
        Ok(Wire::TokenCls) => return Task::TokenCls,
        Ok(Wire::Feature) => return Task::Feature,
        Ok(Wire::Unspecified) => problems.push(field, "is required"),
        Err(unknown) => problems.push(field, format!("{unknown}")),
    }
    Task::CausalLm
}

fn task_to_wire(task: Task) -> i32 {
    use proto::Task as Wire;
    match task {
        Task::CausalLm => Wire::CausalLm,
        Task::Seq2Seq => Wire::Seq2seq,
        Task::SeqCls => Wire::SeqCls,
        Task::TokenCls => Wire::TokenCls,
        Task::Feature => Wire::Feature,
    }
    .into()
}

//! What the fuzz targets call of this module.

use prost::Message;

use super::{convert, proto};
use crate::admission::params::ServeError;

/// Decodes a message of the kind that `kind` chooses, converts it and holds it against the limits.
pub(crate) fn request(kind: u8, data: &[u8]) {
    let done = match kind % 9 {
        0 => of(data, |m: proto::GenerateRequest| convert::generate(m, None).map(drop)),
        1 => of(data, |m: proto::GenerateBatchRequest| convert::generate_batch(m, None).map(drop)),
        2 => of(data, |m: proto::ClassifyRequest| convert::classify(m, None).map(drop)),
        3 => of(data, |m: proto::EmbedRequest| convert::embed(m, None).map(drop)),
        4 => of(data, |m: proto::ScoreRequest| convert::score(m, None).map(drop)),
        5 => of(data, |m: proto::MergeDeltasRequest| convert::merge(m).map(drop)),
        6 => of(data, |m: proto::CreateJobRequest| convert::train(m.spec, m.idempotency_key).map(drop)),
        7 => of(data, |m: proto::UploadHeader| convert::upload_header(&m)),
        _ => of(data, |m: proto::ListDeltasRequest| convert::page(m.page_size, m.page_token).map(drop)),
    };
    if let Some(Err(refused)) = done {
        // what is refused goes out as a status of bounded size
        let status = tonic::Status::from(refused);
        assert!(status.message().len() <= 1024 && status.details().len() <= 8192, "{}", status.details().len());
    }
}

/// `None`: it is no such message.
fn of<M: Message + Default>(
    data: &[u8],
    convert: impl Fn(M) -> Result<(), ServeError>,
) -> Option<Result<(), ServeError>> {
    M::decode(data).ok().map(convert)
}

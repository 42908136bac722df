//! Catalog messages: upload headers and delta versions.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::{
    admission::{
        check::Problems,
        params::{DeltaInfo, ServeError, UploadParams},
    },
    grpc::proto,
    ids::check_name,
};

/// An upload, once all its files are here.
pub(in crate::grpc) fn upload(
    header: proto::UploadHeader,
    files: BTreeMap<String, Bytes>,
) -> Result<UploadParams, ServeError> {
    let mut problems = Problems::default();
    check_header(&header, &mut problems);
    let policy = super::policy("header.policy", header.policy, &mut problems);
    // which files there must be is the decoder's to say: it knows why a pickle will not do
    problems.require(!files.is_empty(), "files", || "the upload has no files".into());
    problems.finish()?;
    Ok(UploadParams { name: header.name, policy, labels: header.labels, files })
}

/// What can be refused before any file arrives.
pub(in crate::grpc) fn upload_header(header: &proto::UploadHeader) -> Result<(), ServeError> {
    let mut problems = Problems::default();
    check_header(header, &mut problems);
    super::policy("header.policy", header.policy.clone(), &mut problems);
    problems.finish()
}

fn check_header(header: &proto::UploadHeader, problems: &mut Problems) {
    if let Err(error) = check_name(&header.name) {
        problems.push("header.name", error.to_string());
    }
    let mut seen = std::collections::HashSet::new();
    for (i, label) in header.labels.iter().enumerate() {
        let field = format!("header.labels[{i}]");
        problems.require(!label.is_empty(), &field, || "must not be empty".into());
        problems.require(seen.insert(label), &field, || format!("{label:?} is given twice"));
    }
}

/// A version to the wire.
pub(in crate::grpc) fn delta(info: DeltaInfo) -> proto::Delta {
    use proto::Task as Wire;
    let task = match info.task.as_str() {
        "causal_lm" => Wire::CausalLm,
        "seq2seq" => Wire::Seq2seq,
        "seq_cls" => Wire::SeqCls,
        "token_cls" => Wire::TokenCls,
        "feature" => Wire::Feature,
        _ => Wire::Unspecified,
    };
    proto::Delta {
        name: info.name,
        number: info.number,
        id: info.id.to_string(),
        current: info.current,
        methods: info.methods,
        task: task.into(),
        labels: info.labels,
        parameters: info.parameters,
        stored_bytes: info.stored_bytes,
        resident_bytes: info.resident_bytes,
        leases: info.leases,
        pinned: info.pinned,
        origin: info.origin,
        created_ms: info.created_ms,
        problem_type: info.problem.map(|p| p.as_str().to_owned()).unwrap_or_default(),
    }
}

//! Catalog messages: upload headers and delta versions.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::{
    admission::{
        catalog_params::{MajoritySign, MergeMethod, MergeParams},
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
        corrupt: info.corrupt,
        problem_type: info.problem.map(|p| p.as_str().to_owned()).unwrap_or_default(),
    }
}

/// Delta references with their weights.
pub(super) fn weighted(deltas: Vec<proto::WeightedDelta>) -> Vec<(String, f64)> {
    deltas.into_iter().map(|d| (d.delta, d.weight.unwrap_or(1.0))).collect()
}

/// A merge. Options that the method does not have are refused.
pub(in crate::grpc) fn merge(r: proto::MergeDeltasRequest) -> Result<MergeParams, ServeError> {
    use proto::{MajoritySign as WireSign, MergeMethod as Wire};
    let mut problems = Problems::default();
    let sign = match WireSign::try_from(r.majority_sign) {
        Ok(WireSign::Unspecified | WireSign::Total) => MajoritySign::Total,
        Ok(WireSign::Frequency) => MajoritySign::Frequency,
        Err(unknown) => {
            problems.push("majority_sign", unknown.to_string());
            MajoritySign::Total
        }
    };
    let (density, seed) = (r.density.unwrap_or(1.0), r.seed.unwrap_or(0));
    let method = match Wire::try_from(r.method) {
        Ok(Wire::Linear) => MergeMethod::Linear,
        Ok(Wire::Cat) => MergeMethod::Cat,
        Ok(Wire::Svd) => MergeMethod::Svd { rank: r.rank.map(|rank| rank as usize) },
        Ok(Wire::Ties) => MergeMethod::Ties { density, sign },
        Ok(Wire::MagnitudePrune) => MergeMethod::MagnitudePrune { density },
        Ok(Wire::DareLinear) => MergeMethod::DareLinear { density, seed },
        Ok(Wire::DareTies) => MergeMethod::DareTies { density, seed, sign },
        Ok(Wire::Unspecified) => {
            problems.push("method", "is required");
            MergeMethod::Linear
        }
        Err(unknown) => {
            problems.push("method", unknown.to_string());
            MergeMethod::Linear
        }
    };
    use MergeMethod as M;
    let name = method.as_str();
    let prunes = method.density().is_some();
    let elects = matches!(method, M::Ties { .. } | M::DareTies { .. });
    let draws = matches!(method, M::DareLinear { .. } | M::DareTies { .. });
    let missing = prunes && r.density.is_none();
    problems.require(!missing, "density", || format!("is required with {name}"));
    for (field, given, taken) in [
        ("density", r.density.is_some(), prunes),
        ("majority_sign", r.majority_sign != 0, elects),
        ("rank", r.rank.is_some(), matches!(method, M::Svd { .. })),
        ("seed", r.seed.is_some(), draws),
    ] {
        problems.require(taken || !given, field, || format!("is given, but {name} has none"));
    }
    let policy = super::policy("policy", r.policy, &mut problems);
    problems.finish()?;
    let params = MergeParams { name: r.name, policy, deltas: weighted(r.deltas), method };
    params.check()?;
    Ok(params)
}

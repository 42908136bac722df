//! The policy: what each RPC needs of its caller. An RPC that is not in the table is refused, whoever calls it.

use crate::access::{Identity, Permission};

/// What a call needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Nothing, not even credentials.
    Open,
    /// Any valid credentials.
    Known,
    /// Credentials with one of these permissions.
    Any(&'static [Permission]),
}

impl Rule {
    /// Whether an identity may make the call.
    pub fn allows(self, identity: &Identity) -> bool {
        match self {
            Self::Open | Self::Known => true,
            Self::Any(permissions) => permissions.iter().any(|&permission| identity.permissions.has(permission)),
        }
    }
}

const INFER: Rule = Rule::Any(&[Permission::Infer]);
const TRAIN: Rule = Rule::Any(&[Permission::Train]);
const MANAGE: Rule = Rule::Any(&[Permission::Manage]);
const ADMIN: Rule = Rule::Any(&[Permission::Admin]);
/// Whoever uses, makes or keeps deltas looks them up.
const LOOK_UP: Rule = Rule::Any(&[Permission::Infer, Permission::Train, Permission::Manage]);

const TABLE: &[(&str, Rule)] = &[
    ("/deltaserve.v1.InferenceService/Generate", INFER),
    ("/deltaserve.v1.InferenceService/GenerateBatch", INFER),
    ("/deltaserve.v1.InferenceService/Classify", INFER),
    ("/deltaserve.v1.InferenceService/Embed", INFER),
    ("/deltaserve.v1.InferenceService/Score", INFER),
    ("/deltaserve.v1.InferenceService/Tokenize", INFER),
    ("/deltaserve.v1.DeltaService/GetDelta", LOOK_UP),
    ("/deltaserve.v1.DeltaService/ListDeltas", LOOK_UP),
    ("/deltaserve.v1.DeltaService/Upload", MANAGE),
    ("/deltaserve.v1.DeltaService/DeleteDelta", MANAGE),
    ("/deltaserve.v1.DeltaService/PinDelta", MANAGE),
    ("/deltaserve.v1.DeltaService/SetAlias", MANAGE),
    ("/deltaserve.v1.DeltaService/MergeDeltas", MANAGE),
    ("/deltaserve.v1.DeltaService/Download", MANAGE),
    ("/deltaserve.v1.TrainingService/UploadDataset", TRAIN),
    ("/deltaserve.v1.TrainingService/ListDatasets", TRAIN),
    ("/deltaserve.v1.TrainingService/GetDataset", TRAIN),
    ("/deltaserve.v1.TrainingService/DeleteDataset", TRAIN),
    ("/deltaserve.v1.TrainingService/Plan", TRAIN),
    ("/deltaserve.v1.TrainingService/CreateJob", TRAIN),
    ("/deltaserve.v1.TrainingService/GetJob", TRAIN),
    ("/deltaserve.v1.TrainingService/ListJobs", TRAIN),
    ("/deltaserve.v1.TrainingService/WatchJob", TRAIN),
    ("/deltaserve.v1.TrainingService/DownloadModel", TRAIN),
    ("/deltaserve.v1.TrainingService/DeleteModel", TRAIN),
    ("/deltaserve.v1.TrainingService/PauseJob", TRAIN),
    ("/deltaserve.v1.TrainingService/ResumeJob", TRAIN),
    ("/deltaserve.v1.TrainingService/PublishCheckpoint", TRAIN),
    ("/deltaserve.v1.TrainingService/CancelJob", TRAIN),
    ("/deltaserve.v1.TenantService/GetQuota", Rule::Known),
    ("/deltaserve.v1.TenantService/DeleteTenant", ADMIN),
    ("/deltaserve.v1.ServerService/GetServerInfo", Rule::Known),
    ("/grpc.health.v1.Health/Check", Rule::Open),
    ("/grpc.health.v1.Health/Watch", Rule::Open),
    ("/grpc.health.v1.Health/List", Rule::Open),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Rule::Known),
];

/// What the RPC of this path needs; `None` = it is refused.
pub fn rule(path: &str) -> Option<Rule> {
    TABLE.iter().find(|(known, _)| *known == path).map(|(_, rule)| *rule)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;

    use super::*;
    use crate::{access::Permissions, grpc::proto::DESCRIPTORS};

    #[test]
    fn every_rpc_has_one_rule_and_every_rule_of_ours_is_of_an_rpc() {
        let set = prost_types::FileDescriptorSet::decode(DESCRIPTORS).expect("descriptors");
        let mut methods = BTreeSet::new();
        for file in &set.file {
            for service in &file.service {
                let path = |method: &str| format!("/{}.{}/{method}", file.package(), service.name());
                methods.extend(service.method.iter().map(|m| path(m.name())));
            }
        }
        let missing: Vec<_> = methods.iter().filter(|path| rule(path).is_none()).collect();
        assert!(missing.is_empty(), "no rule for {missing:?}");
        let mut seen = BTreeSet::new();
        for (path, rule) in TABLE {
            assert!(seen.insert(path), "{path} is there twice");
            assert!(!path.starts_with("/deltaserve.") || methods.contains(*path), "there is no {path}");
            assert!(*rule != Rule::Open || path.starts_with("/grpc.health.v1."), "{path} is open to everybody");
        }
        assert_eq!(rule("/deltaserve.v1.InferenceService/generate"), None);
    }

    #[test]
    fn one_of_a_rules_permissions_is_enough_and_no_other_is() {
        let with = |permission| Identity { permissions: Permissions::default().with(permission), ..Identity::anyone() };
        for one in Permission::ALL {
            assert_eq!(MANAGE.allows(&with(one)), one == Permission::Manage);
            assert_eq!(LOOK_UP.allows(&with(one)), one != Permission::Admin);
            assert!(Rule::Known.allows(&with(one)));
        }
    }
}

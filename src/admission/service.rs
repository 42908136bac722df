//! The application's one entrance: every edge calls these functions.

use futures::stream::BoxStream;

use super::{
    catalog_params::{AliasParams, DeltaDetail, DownloadReply, Page, PageRequest, ServerInfo},
    params::{
        ClassifyParams, ClassifyReply, DeltaInfo, EmbedParams, EmbedReply, GenerateChunk, GenerateParams, ScoreParams,
        ScoreReply, ServeError, TokenizeReply, UploadParams,
    },
    train_params::{DatasetInfo, DatasetUpload, JobEventInfo, JobInfo, JobState, PlanReply, TrainParams, WatchParams},
};
use crate::ids::{DeltaId, TenantId};

/// A stream of a reply's pieces; dropping it cancels the work behind it.
pub type Pieces<T> = BoxStream<'static, Result<T, ServeError>>;

/// Joins text, registry, engine and training.
#[derive(Debug, Clone, Default)]
pub struct Service;

macro_rules! methods {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $ty:ty),*) -> $out:ty;)*) => {
        #[allow(clippy::unused_async, missing_docs, clippy::missing_errors_doc)]
        impl Service {$(
            pub async fn $name(&self, $($arg: $ty),*) -> Result<$out, ServeError> {
                $(let _ = $arg;)*
                Err(ServeError::Internal("not wired".into()))
            }
        )*}
    };
}

methods! {
    generate(tenant: &TenantId, params: GenerateParams) -> Pieces<GenerateChunk>;
    classify(tenant: &TenantId, params: ClassifyParams) -> ClassifyReply;
    embed(tenant: &TenantId, params: EmbedParams) -> EmbedReply;
    score(tenant: &TenantId, params: ScoreParams) -> ScoreReply;
    tokenize(text: String, add_special: bool) -> TokenizeReply;
    upload(tenant: &TenantId, params: UploadParams) -> DeltaInfo;
    get_delta(tenant: &TenantId, reference: &str) -> DeltaDetail;
    list_deltas(tenant: &TenantId, page: PageRequest, prefix: &str) -> Page<DeltaInfo>;
    delete_delta(tenant: &TenantId, name: &str, expected: Option<DeltaId>) -> ();
    pin(tenant: &TenantId, name: &str, pinned: bool) -> DeltaInfo;
    set_alias(tenant: &TenantId, params: AliasParams) -> DeltaInfo;
    download(tenant: &TenantId, reference: &str) -> DownloadReply;
    upload_dataset(tenant: &TenantId, params: DatasetUpload) -> DatasetInfo;
    list_datasets(tenant: &TenantId, page: PageRequest) -> Page<DatasetInfo>;
    get_dataset(tenant: &TenantId, id: &str) -> DatasetInfo;
    delete_dataset(tenant: &TenantId, id: &str) -> ();
    plan(tenant: &TenantId, params: TrainParams) -> PlanReply;
    create_job(tenant: &TenantId, params: TrainParams) -> JobInfo;
    get_job(tenant: &TenantId, id: &str) -> JobInfo;
    list_jobs(tenant: &TenantId, page: PageRequest, state: Option<JobState>) -> Page<JobInfo>;
    watch_job(tenant: &TenantId, params: WatchParams) -> Pieces<JobEventInfo>;
    cancel_job(tenant: &TenantId, id: &str) -> JobInfo;
    server_info() -> ServerInfo;
}

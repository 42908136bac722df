//! `TrainingService`: decode, call, encode.

use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use tonic::{Request, Response, Status, Streaming};

use super::{
    convert, proto,
    proto::training_service_server::TrainingService,
    tenant::{tenant, timeout},
    upload::{Receiver, held},
};
use crate::admission::{Service, train_params::WatchParams};

/// The service.
#[derive(Debug, Clone)]
pub(super) struct Training {
    pub(super) service: Service,
    pub(super) receiver: Receiver,
}

#[tonic::async_trait]
impl TrainingService for Training {
    async fn upload_dataset(
        &self,
        request: Request<Streaming<proto::UploadDatasetRequest>>,
    ) -> Result<Response<proto::UploadDatasetResponse>, Status> {
        let tenant = tenant(&request)?;
        let place = self.receiver.place()?;
        let upload = self.receiver.dataset(request.into_inner()).await?;
        let service = self.service.clone();
        let dataset = held(place, async move { service.upload_dataset(&tenant, upload).await }).await?;
        Ok(Response::new(proto::UploadDatasetResponse { dataset: Some(convert::dataset(dataset)) }))
    }

    async fn list_datasets(
        &self,
        request: Request<proto::ListDatasetsRequest>,
    ) -> Result<Response<proto::ListDatasetsResponse>, Status> {
        let tenant = tenant(&request)?;
        let proto::ListDatasetsRequest { page_size, page_token } = request.into_inner();
        let page = self.service.list_datasets(&tenant, convert::page(page_size, page_token)?).await?;
        Ok(Response::new(proto::ListDatasetsResponse {
            datasets: page.items.into_iter().map(convert::dataset).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn get_dataset(
        &self,
        request: Request<proto::GetDatasetRequest>,
    ) -> Result<Response<proto::GetDatasetResponse>, Status> {
        let tenant = tenant(&request)?;
        let id = convert::required("id", request.into_inner().id)?;
        let dataset = self.service.get_dataset(&tenant, &id).await?;
        Ok(Response::new(proto::GetDatasetResponse { dataset: Some(convert::dataset(dataset)) }))
    }

    async fn delete_dataset(
        &self,
        request: Request<proto::DeleteDatasetRequest>,
    ) -> Result<Response<proto::DeleteDatasetResponse>, Status> {
        let tenant = tenant(&request)?;
        let id = convert::required("id", request.into_inner().id)?;
        self.service.delete_dataset(&tenant, &id).await?;
        Ok(Response::new(proto::DeleteDatasetResponse {}))
    }

    async fn plan(&self, request: Request<proto::PlanRequest>) -> Result<Response<proto::PlanResponse>, Status> {
        let tenant = tenant(&request)?;
        let params = convert::train(request.into_inner().spec, String::new())?;
        Ok(Response::new(convert::plan_response(self.service.plan(&tenant, params).await?)))
    }

    async fn create_job(
        &self,
        request: Request<proto::CreateJobRequest>,
    ) -> Result<Response<proto::CreateJobResponse>, Status> {
        let tenant = tenant(&request)?;
        let proto::CreateJobRequest { spec, idempotency_key } = request.into_inner();
        let params = convert::train(spec, idempotency_key)?;
        let job = self.service.create_job(&tenant, params).await?;
        Ok(Response::new(proto::CreateJobResponse { job: Some(convert::job(job)) }))
    }

    async fn get_job(&self, request: Request<proto::GetJobRequest>) -> Result<Response<proto::GetJobResponse>, Status> {
        let tenant = tenant(&request)?;
        let id = convert::required("id", request.into_inner().id)?;
        let job = self.service.get_job(&tenant, &id).await?;
        Ok(Response::new(proto::GetJobResponse { job: Some(convert::job(job)) }))
    }

    async fn list_jobs(
        &self,
        request: Request<proto::ListJobsRequest>,
    ) -> Result<Response<proto::ListJobsResponse>, Status> {
        let tenant = tenant(&request)?;
        let proto::ListJobsRequest { page_size, page_token, state } = request.into_inner();
        let state = convert::job_state_filter(state)?;
        let page = self.service.list_jobs(&tenant, convert::page(page_size, page_token)?, state).await?;
        Ok(Response::new(proto::ListJobsResponse {
            jobs: page.items.into_iter().map(convert::job).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    type WatchJobStream = BoxStream<'static, Result<proto::JobEvent, Status>>;

    async fn watch_job(
        &self,
        request: Request<proto::WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let (tenant, timeout) = (tenant(&request)?, timeout(request.metadata()));
        let proto::WatchJobRequest { id, from_seq } = request.into_inner();
        let params = WatchParams { job: convert::required("id", id)?, from_seq, timeout };
        let events = self.service.watch_job(&tenant, params).await?;
        Ok(Response::new(events.map_ok(convert::job_event).map_err(Status::from).boxed()))
    }

    type DownloadModelStream = BoxStream<'static, Result<proto::DownloadModelResponse, Status>>;

    async fn download_model(
        &self,
        request: Request<proto::DownloadModelRequest>,
    ) -> Result<Response<Self::DownloadModelStream>, Status> {
        use proto::download_model_response::Message;
        let tenant = tenant(&request)?;
        let id = convert::required("id", request.into_inner().id)?;
        let (model, files) = self.service.download_model(&tenant, &id).await?;
        let reply = |message| proto::DownloadModelResponse { message: Some(message) };
        let head = futures::stream::iter([Ok(reply(Message::Model(convert::model(model))))]);
        let pieces = files.map_ok(move |(file, data)| reply(Message::Chunk(proto::FileChunk { file, data })));
        Ok(Response::new(head.chain(pieces.map_err(Status::from)).boxed()))
    }

    async fn delete_model(
        &self,
        request: Request<proto::DeleteModelRequest>,
    ) -> Result<Response<proto::DeleteModelResponse>, Status> {
        let tenant = tenant(&request)?;
        let id = convert::required("id", request.into_inner().id)?;
        self.service.delete_model(&tenant, &id).await?;
        Ok(Response::new(proto::DeleteModelResponse {}))
    }

    async fn pause_job(
        &self,
        request: Request<proto::PauseJobRequest>,
    ) -> Result<Response<proto::PauseJobResponse>, Status> {
        let tenant = tenant(&request)?;
        let id = convert::required("id", request.into_inner().id)?;
        let job = self.service.pause_job(&tenant, &id).await?;
        Ok(Response::new(proto::PauseJobResponse { job: Some(convert::job(job)) }))
    }

    async fn resume_job(
        &self,
        request: Request<proto::ResumeJobRequest>,
    ) -> Result<Response<proto::ResumeJobResponse>, Status> {
        let tenant = tenant(&request)?;
        let id = convert::required("id", request.into_inner().id)?;
        let job = self.service.resume_job(&tenant, &id).await?;
        Ok(Response::new(proto::ResumeJobResponse { job: Some(convert::job(job)) }))
    }

    async fn publish_checkpoint(
        &self,
        request: Request<proto::PublishCheckpointRequest>,
    ) -> Result<Response<proto::PublishCheckpointResponse>, Status> {
        let tenant = tenant(&request)?;
        let proto::PublishCheckpointRequest { id, name, policy, step } = request.into_inner();
        let id = convert::required("id", id)?;
        let (name, policy) = convert::publish_target(name, policy)?;
        let delta = self.service.publish_checkpoint(&tenant, &id, step, (name, policy)).await?;
        Ok(Response::new(proto::PublishCheckpointResponse { delta: Some(convert::delta(delta)) }))
    }

    async fn cancel_job(
        &self,
        request: Request<proto::CancelJobRequest>,
    ) -> Result<Response<proto::CancelJobResponse>, Status> {
        let tenant = tenant(&request)?;
        let id = convert::required("id", request.into_inner().id)?;
        let job = self.service.cancel_job(&tenant, &id).await?;
        Ok(Response::new(proto::CancelJobResponse { job: Some(convert::job(job)) }))
    }
}

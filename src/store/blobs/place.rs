//! Where blobs are, by URL: a folder, or a bucket of S3, Google Cloud Storage or Azure. Credentials come from the
//! environment only, under the names that each provider's own tools read.

use std::{path::PathBuf, sync::Arc, time::Duration};

use object_store::{
    ClientConfigKey, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    path::Path as Key,
    prefix::PrefixStore,
};

use crate::store::StoreError;

/// Tries of a request after the first.
const RETRIES: usize = 3;
/// No try begins later than this after the first.
const RETRY_FOR: Duration = Duration::from_secs(20);
/// What the connections wait for, unless the environment says otherwise. The longest time of a whole request is for the
/// largest blobs on slow lines; that of each operation is bounded by its size before that.
const WAITS: [(ClientConfigKey, &str); 3] =
    [(ClientConfigKey::ConnectTimeout, "5s"), (ClientConfigKey::ReadTimeout, "15s"), (ClientConfigKey::Timeout, "1h")];

/// What is accepted.
const ACCEPTED: &str = "accepted are file:///FOLDER, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX and az://CONTAINER/PREFIX";

/// The folder that a URL names, if it names one.
pub(super) fn folder(url: &str) -> Option<PathBuf> {
    url.strip_prefix("file://").filter(|path| path.starts_with('/')).map(PathBuf::from)
}

/// Whether a URL can be one of blobs.
///
/// # Errors
/// What is wrong with it and what is accepted.
pub(in crate::store) fn check_url(url: &str) -> Result<(), String> {
    if folder(url).is_some() {
        return Ok(());
    }
    split(url).map(|_| ())
}

/// Scheme, bucket and prefix.
fn split(url: &str) -> Result<(&str, &str, &str), String> {
    let (scheme, rest) = url.split_once("://").ok_or_else(|| format!("{url:?} is not a URL; {ACCEPTED}"))?;
    if !matches!(scheme, "s3" | "gs" | "az") {
        return Err(format!("{url:?} is of an unknown kind; {ACCEPTED}"));
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() || bucket.contains(['@', '?', '#']) {
        return Err(format!("{url:?} names no bucket; {ACCEPTED}"));
    }
    Ok((scheme, bucket, prefix.trim_end_matches('/')))
}

/// A bucket; its settings are variables of the environment.
pub(super) fn bucket(
    url: &str,
    settings: impl Iterator<Item = (String, String)>,
) -> Result<Arc<dyn ObjectStore>, StoreError> {
    let invalid = |message| StoreError::Invalid { field: "--blobs", message };
    let (scheme, bucket, prefix) = split(url).map_err(invalid)?;
    let prefix = Key::parse(prefix).map_err(|e| invalid(format!("the prefix of {url:?}: {e}")))?;
    let retry = RetryConfig { max_retries: RETRIES, retry_timeout: RETRY_FOR, ..RetryConfig::default() };
    let objects: Arc<dyn ObjectStore> = match scheme {
        "s3" => {
            let waits = WAITS.map(|(key, wait)| (AmazonS3ConfigKey::Client(key), wait.to_owned()));
            let builder = AmazonS3Builder::new().with_retry(retry);
            let set = waits.into_iter().chain(of(settings, "AWS_"));
            let builder = set.fold(builder, |builder, (key, value)| builder.with_config(key, value));
            Arc::new(builder.with_bucket_name(bucket).build()?)
        }
        "gs" => {
            let waits = WAITS.map(|(key, wait)| (GoogleConfigKey::Client(key), wait.to_owned()));
            let builder = GoogleCloudStorageBuilder::new().with_retry(retry);
            let set = waits.into_iter().chain(of(settings, "GOOGLE_"));
            let builder = set.fold(builder, |builder, (key, value)| builder.with_config(key, value));
            Arc::new(builder.with_bucket_name(bucket).build()?)
        }
        _ => {
            let waits = WAITS.map(|(key, wait)| (AzureConfigKey::Client(key), wait.to_owned()));
            let builder = MicrosoftAzureBuilder::new().with_retry(retry);
            let set = waits.into_iter().chain(of(settings, "AZURE_"));
            let builder = set.fold(builder, |builder, (key, value)| builder.with_config(key, value));
            Arc::new(builder.with_container_name(bucket).build()?)
        }
    };
    match prefix.as_ref() {
        "" => Ok(objects),
        _ => Ok(Arc::new(PrefixStore::new(objects, prefix))),
    }
}

/// The settings whose variables begin so, as far as they are known.
fn of<K: std::str::FromStr>(
    settings: impl Iterator<Item = (String, String)>,
    begin: &'static str,
) -> impl Iterator<Item = (K, String)> {
    settings.filter(move |(name, _)| name.starts_with(begin)).filter_map(|(name, value)| {
        let key = name.to_ascii_lowercase().parse().ok()?;
        Some((key, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_a_folder_or_a_bucket_and_a_prefix() {
        assert_eq!(folder("file:///a/b"), Some(PathBuf::from("/a/b")));
        assert_eq!(folder("file://host/a"), None);
        assert_eq!(split("s3://bucket/a/b/"), Ok(("s3", "bucket", "a/b")));
        assert_eq!(split("gs://bucket"), Ok(("gs", "bucket", "")));
        assert_eq!(split("az://container/p"), Ok(("az", "container", "p")));
        for bad in ["bucket", "http://host/a", "s3://", "s3:///a", "s3://key@bucket/a", "file://a"] {
            let error = check_url(bad).unwrap_err();
            assert!(error.contains("accepted are file:///FOLDER"), "{error}");
        }
        check_url("file:///a").unwrap();
    }

    #[test]
    fn only_known_settings_of_the_provider_are_taken() {
        let settings = [("AWS_REGION", "x"), ("AWS_UNKNOWN_THING", "y"), ("GOOGLE_BUCKET", "z"), ("PATH", "/bin")];
        let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let found: Vec<(AmazonS3ConfigKey, String)> = of(settings.into_iter(), "AWS_").collect();
        assert_eq!(found, [(AmazonS3ConfigKey::Region, "x".to_owned())]);
    }
}

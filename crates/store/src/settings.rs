//! From an address and the variables of the environment to a client.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::multipart::MultipartStore;
use object_store::{ObjectStore, RetryConfig};

use crate::address::{Address, Scheme};
use crate::connect::{Connector, Link};
use crate::error::StoreError;

/// Variables that a client of S3 heeds, as the tools of AWS name them.
const AWS: [&str; 22] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL_STS",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "AWS_S3_EXPRESS",
    "AWS_METADATA_ENDPOINT",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_SKIP_SIGNATURE",
    "AWS_REQUEST_PAYER",
    "AWS_SERVER_SIDE_ENCRYPTION",
    "AWS_SSE_KMS_KEY_ID",
    "AWS_SSE_BUCKET_KEY_ENABLED",
];

/// Those of Google Cloud Storage.
const GOOGLE: [&str; 7] = [
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
    "GOOGLE_BASE_URL",
    "GOOGLE_SKIP_SIGNATURE",
];

/// Those of Azure Blob Storage.
const AZURE: [&str; 15] = [
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_STORAGE_USE_EMULATOR",
    "AZURE_CLIENT_ID",
    "AZURE_CLIENT_SECRET",
    "AZURE_TENANT_ID",
    "AZURE_AUTHORITY_HOST",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_MSI_ENDPOINT",
    "AZURE_MSI_RESOURCE_ID",
    "AZURE_USE_AZURE_CLI",
    "AZURE_SKIP_SIGNATURE",
];

/// Parts of the names of variables whose values no message may repeat.
const SECRET: [&str; 4] = ["KEY", "TOKEN", "SECRET", "SAS"];

/// Hosts that hand out credentials to what runs on the machine.
const METADATA: [&str; 4] = ["169.254.169.254", "169.254.170.2", "fd00:ec2::254", "metadata.google.internal"];

/// A client of one store.
pub(crate) struct Client {
    pub(crate) objects: Arc<dyn ObjectStore>,
    /// Uploads in parts that are sent one by one; a folder has no such thing.
    pub(crate) parts: Option<Arc<dyn MultipartStore>>,
    pub(crate) link: Arc<Link>,
}

/// The variables of a list that are set.
fn set<'v>(
    names: &'static [&'static str],
    variable: &'v dyn Fn(&str) -> Option<String>,
) -> impl Iterator<Item = (&'static str, String)> + 'v {
    names.iter().filter_map(|name| Some((*name, variable(name).filter(|value| !value.is_empty())?)))
}

/// The host of an address, without port.
fn host_of(url: &str) -> Option<String> {
    let uri: ureq::http::Uri = url.parse().ok()?;
    uri.host().map(str::to_string)
}

/// What of the variables is a key, as `object_store` knows it.
fn key<K: FromStr>(name: &str) -> Option<K> {
    name.to_ascii_lowercase().parse().ok()
}

pub(crate) fn client(
    address: &Address,
    timeout: Duration,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Client, StoreError> {
    let names: &'static [&'static str] = match address.scheme {
        Scheme::S3 => &AWS,
        Scheme::Gs => &GOOGLE,
        Scheme::Az => &AZURE,
        Scheme::File => &[],
    };
    let found: Vec<(&str, String)> = set(names, variable).collect();
    let is_secret = |name: &str| SECRET.iter().any(|part| name.contains(part)) && !name.ends_with("_FILE");
    let secrets = found.iter().filter(|(name, _)| is_secret(name)).map(|(_, value)| value.clone()).collect();
    let mut metadata: Vec<String> = METADATA.map(str::to_string).to_vec();
    let places = ["AWS_METADATA_ENDPOINT", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AZURE_MSI_ENDPOINT"];
    let places = found.iter().filter(|(name, _)| places.contains(name));
    metadata.extend(places.filter_map(|(_, url)| host_of(url)));
    // A store at the same place, as tests have it, is a store.
    let own = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT"];
    let own: Vec<String> =
        found.iter().filter(|(name, _)| own.contains(name)).filter_map(|(_, url)| host_of(url)).collect();
    metadata.retain(|host| !own.contains(host));
    let link = Arc::new(Link::new(timeout, metadata, secrets));
    let connector = Connector(Arc::clone(&link));
    // Requests are repeated by us: so a wish to stop is heeded, and told what is waited for.
    let once = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let settings = |error: object_store::Error| StoreError::Settings {
        address: address.clone(),
        problem: link.without_secrets(plain(&error)),
    };
    // Three builders that share their methods' names and no trait.
    macro_rules! built {
        ($builder:expr, $key:ty) => {{
            let mut builder = $builder;
            for (name, value) in &found {
                if let Some(key) = key::<$key>(name) {
                    builder = builder.with_config(key, value);
                }
            }
            let store = builder.with_retry(once).with_http_connector(connector).build().map_err(settings)?;
            let store = Arc::new(store);
            (Arc::clone(&store) as _, Some(store as _))
        }};
    }
    let bucket = &address.bucket;
    let (objects, parts): (Arc<dyn ObjectStore>, Option<Arc<dyn MultipartStore>>) = match address.scheme {
        Scheme::S3 => built!(AmazonS3Builder::new().with_bucket_name(bucket), AmazonS3ConfigKey),
        Scheme::Gs => built!(GoogleCloudStorageBuilder::new().with_bucket_name(bucket), GoogleConfigKey),
        Scheme::Az => built!(MicrosoftAzureBuilder::new().with_container_name(bucket), AzureConfigKey),
        Scheme::File => (Arc::new(LocalFileSystem::new().with_fsync(true)), None),
    };
    Ok(Client { objects, parts, link })
}

/// An error of the library without the name of its store in front.
pub(crate) fn plain(error: &object_store::Error) -> String {
    match error {
        object_store::Error::Generic { source, .. } => source.to_string(),
        other => other.to_string(),
    }
}

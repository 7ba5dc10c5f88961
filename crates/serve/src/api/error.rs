//! What a client reads when a request is not answered: OpenAI's JSON error shape.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::swap::Refused;

/// An error of one request.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    /// OpenAI's `type`.
    kind: &'static str,
    code: Option<&'static str>,
    /// The field that is wrong.
    param: Option<String>,
    message: String,
    retry_after_s: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { status, kind, code: None, param: None, message: message.into(), retry_after_s: None }
    }

    fn with_code(mut self, code: &'static str) -> ApiError {
        self.code = Some(code);
        self
    }

    /// A field with a wrong value.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        let mut error = ApiError::malformed(message);
        error.param = Some(param.into());
        error
    }

    /// A field that would change the answer in a way that is not built.
    pub(crate) fn unsupported(param: &str, what: &str) -> ApiError {
        ApiError::invalid(param, format!("`{param}` is not supported: {what}"))
            .with_code("unsupported_parameter")
    }

    /// The same error of another field.
    pub(crate) fn at(mut self, param: &str) -> ApiError {
        self.param = self.param.map(|_| param.to_owned());
        self
    }

    /// The same with a message of its own.
    pub(crate) fn unsupported_as(param: &str, message: impl Into<String>) -> ApiError {
        ApiError::invalid(param, message).with_code("unsupported_parameter")
    }

    /// A route of OpenAI's that is not built.
    pub(crate) fn no_such_api(path: &str, what: &str) -> ApiError {
        ApiError::malformed(format!("`{path}` is not supported: {what}")).with_code("unsupported_endpoint")
    }

    /// A request that is wrong as a whole.
    pub(crate) fn malformed(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A prompt and answer beyond what there is room for.
    pub(crate) fn too_long(param: &str, message: String) -> ApiError {
        ApiError::invalid(param, message).with_code("context_length_exceeded")
    }

    pub(crate) fn wrong_key() -> ApiError {
        ApiError::new(
            StatusCode::UNAUTHORIZED,
            "invalid_request_error",
            "the API key is missing or not known",
        )
        .with_code("invalid_api_key")
    }

    pub(crate) fn forbidden(message: &str) -> ApiError {
        ApiError::new(StatusCode::FORBIDDEN, "invalid_request_error", message).with_code("forbidden")
    }

    pub(crate) fn no_route(path: &str) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", format!("there is nothing at `{path}`"))
            .with_code("not_found")
    }

    pub(crate) fn wrong_method(method: &str, path: &str) -> ApiError {
        let message = format!("`{path}` does not answer {method}");
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
            .with_code("method_not_allowed")
    }

    /// `served`: the names that there are.
    pub(crate) fn no_model(asked: &str, served: &[&str]) -> ApiError {
        let are = if served.len() == 1 { "is" } else { "are" };
        let message = format!("the model `{asked}` is not served here; `{}` {are}", served.join("`, `"));
        let mut error = ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
            .with_code("model_not_found");
        error.param = Some("model".into());
        error
    }

    /// Of several models none is named.
    pub(crate) fn which_model() -> ApiError {
        ApiError::invalid("model", "`model` is missing: several models are served here (/v1/models)")
    }

    /// A model that cannot be loaded.
    pub(crate) fn not_loaded(name: &str, why: &Refused) -> ApiError {
        let hint = why.hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default();
        let message = format!("the model `{name}` cannot be loaded: {}{hint}", why.message);
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message).with_code("model_not_loaded")
    }

    /// All other models are used, and their requests do not end in time.
    pub(crate) fn no_room(name: &str) -> ApiError {
        let message = format!("the model `{name}` has no room beside those that are used now");
        let mut error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
            .with_code("model_not_loaded");
        error.retry_after_s = Some(5);
        error
    }

    /// Something was asked that only a loaded model can tell, and none is loaded.
    pub(crate) fn asleep(name: &str) -> ApiError {
        let message = format!("the model `{name}` is not loaded: a request for an answer loads it");
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message).with_code("model_not_loaded")
    }

    pub(crate) fn no_record(name: &str) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", format!("there is no record `{name}`"))
            .with_code("not_found")
    }

    pub(crate) fn no_run(name: &str) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", format!("there is no run `{name}`"))
            .with_code("not_found")
    }

    /// The server was told of no runs.
    pub(crate) fn no_runs() -> ApiError {
        let message = "this server shows no runs: start it with `--runs DIR`";
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message).with_code("no_runs")
    }

    pub(crate) fn no_generation(id: &str) -> ApiError {
        let message = format!("there is no generation `{id}` of yours, or not any more");
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message).with_code("not_found")
    }

    /// The server was told to keep no generations.
    pub(crate) fn keeps_none() -> ApiError {
        let message = "this server keeps no generations: start it with `--keep-generations N`";
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
            .with_code("keeps_no_generations")
    }

    pub(crate) fn too_large(limit: usize) -> ApiError {
        let message = format!("the body has more than {limit} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
            .with_code("request_too_large")
    }

    pub(crate) fn slow_body() -> ApiError {
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", "the body did not arrive in time")
            .with_code("request_timeout")
    }

    pub(crate) fn busy(message: &str) -> ApiError {
        ApiError::new(StatusCode::CONFLICT, "invalid_request_error", message).with_code("conflict")
    }

    pub(crate) fn queue_full(waiting: usize, retry_after_s: u64) -> ApiError {
        let message = format!("{waiting} requests are waiting already");
        let mut error =
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message).with_code("queue_full");
        error.retry_after_s = Some(retry_after_s);
        error
    }

    pub(crate) fn loading() -> ApiError {
        let mut error =
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "the model is being loaded")
                .with_code("loading");
        error.retry_after_s = Some(1);
        error
    }

    pub(crate) fn draining() -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "the server is going down")
            .with_code("draining")
    }

    pub(crate) fn timeout(seconds: f64) -> ApiError {
        let message = format!("the answer was not complete after {seconds} s");
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message).with_code("timeout")
    }

    pub(crate) fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message).with_code("internal_error")
    }

    /// A request that ran into a fault of ours.
    pub(crate) fn failed(message: &str) -> ApiError {
        let message = format!("the server has a bug, and this request ran into it: {message}");
        ApiError::internal(message)
    }

    /// The status that it is answered with.
    pub(crate) fn status(&self) -> u16 {
        self.status.as_u16()
    }

    /// OpenAI's word for it.
    pub(crate) fn code(&self) -> Option<&'static str> {
        self.code
    }

    /// What is wrong.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// `{"error": …}`, also the last event of a stream that breaks off.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

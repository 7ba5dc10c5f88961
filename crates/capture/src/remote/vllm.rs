//! vLLM with the method `extract_hidden_states` and the connector that writes one file per request [systems §4.5].
//!
//! The response to a completion of one token names the file. It lies in a folder that both sides see, perhaps under
//! different paths: only the last part of the name is used, so a server cannot make us read or remove anything else.
//! The server holds a lock on a file beside it while it writes. File and lock are removed once they are read.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use draftsmith_core::LayerId;
use draftsmith_formats::run::CaptureServerTable;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir};
use serde::Deserialize;
use serde_json::json;

use super::states::{RemoteStates, StatesProblem, StatesShape, finite, same_ids};
use crate::TokenRow;
use crate::http::{Failure, Fault, Flow, Http, Patience, ServerError, parse, read_body};

/// Bytes of a response besides the ids that it repeats.
const RESPONSE_BYTES: u64 = 1 << 20;
/// Bytes of a response, or of the head of a file, per token.
const TOKEN_BYTES: u64 = 32;
/// A lock is tried this often.
const LOCK_POLL: Duration = Duration::from_millis(5);

/// One server and the folder that it writes to.
pub(super) struct Vllm<'a> {
    pub(super) http: Http<'a>,
    patience_of_requests: Patience,
    /// The name that the run file gives.
    named: Option<&'a str>,
    /// The name in requests; empty until it is known.
    model: Mutex<String>,
    shared_dir: PathBuf,
    /// How long a file may be written.
    patience: Duration,
}

/// How to start it: the captured layers and the last one, each as the input of the next.
pub(super) fn launch(layers: &[LayerId], num_layers: u32) -> String {
    let ids: Vec<u32> = layers.iter().map(|l| l.as_next_input()).chain([num_layers]).collect();
    format!("`eagle_aux_hidden_state_layer_ids` = {ids:?}")
}

#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
    kv_transfer_params: Option<Transfer>,
}

#[derive(Deserialize)]
struct Choice {
    prompt_token_ids: Option<Vec<i64>>,
}

#[derive(Deserialize)]
struct Transfer {
    hidden_states_path: Option<String>,
}

impl<'a> Vllm<'a> {
    /// Nothing is sent yet; `shared_dir` is where the server writes, as seen from here.
    pub(super) fn new(
        table: &'a CaptureServerTable,
        http: Http<'a>,
        shared_dir: &Path,
        patience_of_requests: Patience,
    ) -> Vllm<'a> {
        Vllm {
            http,
            patience_of_requests,
            named: table.model.as_deref(),
            model: Mutex::default(),
            shared_dir: shared_dir.to_path_buf(),
            patience: Duration::from_secs_f64(table.timeout_s),
        }
    }

    /// Finds out which model is meant; `None` if it was called off.
    pub(super) fn connect(&self, flow: &Flow<'_>) -> Result<Option<String>, Failure> {
        let model = match self.named {
            Some(model) => Some(model.to_string()),
            None => self.http.only_model(self.patience_of_requests, flow)?,
        };
        if let Some(model) = &model {
            self.model.lock().unwrap_or_else(PoisonError::into_inner).clone_from(model);
        }
        Ok(model)
    }

    pub(super) fn states(
        &self,
        row: &TokenRow,
        layers: usize,
        width: usize,
        flow: &Flow<'_>,
    ) -> Result<Option<RemoteStates>, Failure> {
        let model = self.model.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let name = format!("row {}", row.number);
        let shape = StatesShape { ids: &row.ids, states: layers + 1, width };
        let body = json!({
            "model": model,
            "prompt": row.ids,
            "max_tokens": 1,
            "temperature": 0,
            "return_token_ids": true,
        });
        let limit = RESPONSE_BYTES + TOKEN_BYTES * row.ids.len() as u64;
        let values = self.http.ask(self.patience_of_requests, &name, flow, || {
            let answer = self.http.post("completions", &name, &body, "application/json")?;
            let completion: Completion = parse(&read_body(answer, limit)?)?;
            let problem = |problem: StatesProblem| problem.of(self.http.url(), &name);
            let file = file_of(&completion, &row.ids).map_err(problem)?;
            let path = self.shared_dir.join(file);
            let Some(bytes) = self.fetch(&path, shape, flow)? else { return Ok(None) };
            read_state_file(&path, bytes, shape).map(Some).map_err(problem)
        })?;
        Ok(values.flatten().map(|values| split(&values, layers, width)))
    }

    /// The bytes of a file once it is written, which is then removed; `None` if it was called off.
    fn fetch(
        &self,
        path: &Path,
        shape: StatesShape<'_>,
        flow: &Flow<'_>,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let garbled = |what: &str, e: &dyn std::fmt::Display| {
            Failure::from(Fault::Garbled { reason: format!("{what} `{}`: {e}", path.display()) })
        };
        let lock_path = path.with_added_extension("lock");
        let until = Instant::now() + self.patience;
        // Held until the file is read.
        let _lock = loop {
            if flow.is_cancelled() {
                return Ok(None);
            }
            match File::open(&lock_path) {
                Ok(lock) if lock.try_lock_shared().is_ok() => break lock,
                Ok(_) if Instant::now() >= until => return Err(Fault::Silence.into()),
                Err(e) if Instant::now() >= until => return Err(garbled("no lock beside", &e)),
                Ok(_) | Err(_) => std::thread::sleep(LOCK_POLL),
            }
        };
        let limit = RESPONSE_BYTES + 4 * shape.values() + TOKEN_BYTES * shape.ids.len() as u64;
        let read = || {
            let length = std::fs::metadata(path)?.len();
            if length > limit { Ok(Err(length)) } else { std::fs::read(path).map(Ok) }
        };
        let bytes = read().map_err(|e| garbled("the file", &e));
        for path in [path, lock_path.as_path()] {
            // A file that stays would fill the folder, row by row.
            match std::fs::remove_file(path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    let (url, path) = (self.http.url().to_string(), path.to_path_buf());
                    return Err(Failure::Lasting(ServerError::NotRemoved {
                        url,
                        path,
                        reason: e.to_string(),
                    }));
                }
                _ => {}
            }
        }
        match bytes? {
            Ok(bytes) => Ok(Some(bytes)),
            Err(_) => Err(Fault::TooLarge { limit }.into()),
        }
    }
}

/// The name of the file that a response speaks of.
fn file_of(completion: &Completion, ids: &[u32]) -> Result<String, StatesProblem> {
    let [choice] = completion.choices.as_slice() else {
        let found = format!("{} choices", completion.choices.len());
        return Err(StatesProblem::field("choices", found, 1));
    };
    let Some(found) = &choice.prompt_token_ids else {
        return Err(StatesProblem::field("choices[0].prompt_token_ids", "nothing", "the ids of the prompt"));
    };
    same_ids("choices[0].prompt_token_ids", found, ids)?;
    let field = "kv_transfer_params.hidden_states_path";
    let wanted = "the name of a `.safetensors` file";
    let path = completion.kv_transfer_params.as_ref().and_then(|t| t.hidden_states_path.as_deref());
    let Some(path) = path else { return Err(StatesProblem::field(field, "nothing", wanted)) };
    let name = path.rsplit(['/', '\\']).next().unwrap_or_default();
    match name.strip_suffix(".safetensors").is_some_and(|stem| !stem.is_empty()) {
        true => Ok(name.to_string()),
        false => Err(StatesProblem::field(field, format!("`{path}`"), wanted)),
    }
}

/// Reads and checks the file of one request; `path` is for messages.
///
/// # Shapes
/// - `hidden_states` in the file and the result: `[S, states, width]`
///
/// # Errors
/// [`StatesProblem`]: not a whole safetensors file, other tensors, types, shapes or token ids than asked for.
pub fn read_state_file(
    path: &Path,
    bytes: Vec<u8>,
    shape: StatesShape<'_>,
) -> Result<Vec<f32>, StatesProblem> {
    let garbled = |e: &dyn std::fmt::Display| StatesProblem::Garbled { reason: e.to_string() };
    let file = SafetensorsDir::from_bytes(path, bytes).map_err(|e| garbled(&e))?;
    let names: Vec<&str> = file.names().collect();
    if names != ["hidden_states", "token_ids"] {
        return Err(StatesProblem::field("tensors", format!("{names:?}"), "`hidden_states` and `token_ids`"));
    }
    let tensor = |name: &str| file.get(name).map_err(|e| garbled(&e));
    let (states, ids) = (tensor("hidden_states")?, tensor("token_ids")?);
    let types = |field: &str, found: Dtype, allowed: &[Dtype]| match allowed.contains(&found) {
        true => Ok(()),
        false => Err(StatesProblem::field(field, format!("type {found:?}"), format!("{allowed:?}"))),
    };
    types("token_ids", ids.dtype, &[Dtype::I64, Dtype::I32])?;
    if ids.shape.len() != 1 {
        return Err(StatesProblem::field("token_ids", format!("shape {:?}", ids.shape), "one row"));
    }
    same_ids("token_ids", &ids.to_i64().map_err(|e| garbled(&e))?, shape.ids)?;
    types("hidden_states", states.dtype, &[Dtype::F32, Dtype::BF16, Dtype::F16])?;
    let wanted = [shape.ids.len(), shape.states, shape.width];
    if states.shape != wanted {
        let (found, wanted) =
            (format!("shape {:?}", states.shape), format!("{wanted:?} (tokens, layers, width)"));
        return Err(StatesProblem::field("hidden_states", found, wanted));
    }
    let values = states.to_f32().map_err(|e| garbled(&e))?;
    finite("hidden_states", &values, shape.width)?;
    Ok(values)
}

/// Of each token the captured layers, then the last one.
fn split(values: &[f32], layers: usize, width: usize) -> RemoteStates {
    let tokens = values.len() / ((layers + 1) * width);
    let mut features = Vec::with_capacity(tokens * layers * width);
    let mut last = Vec::with_capacity(tokens * width);
    for token in values.chunks_exact((layers + 1) * width) {
        let (captured, end) = token.split_at(layers * width);
        features.extend_from_slice(captured);
        last.extend_from_slice(end);
    }
    RemoteStates { features, last }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use draftsmith_formats::safetensors_dir::{TensorData, to_bytes};

    use super::*;

    const SHAPE: StatesShape<'static> = StatesShape { ids: &[5, 6, 7], states: 2, width: 4 };

    fn file() -> Vec<u8> {
        let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let tensors = [
            TensorData::bf16("hidden_states", &[3, 2, 4], &values),
            TensorData::i64("token_ids", &[3], &[5, 6, 7]),
        ];
        to_bytes(&tensors, &BTreeMap::new())
    }

    #[test]
    fn a_file_is_split_into_captured_layers_and_the_last() {
        let states = split(&read_state_file(Path::new("f"), file(), SHAPE).unwrap(), 1, 4);
        assert_eq!(states.features, [0., 1., 2., 3., 8., 9., 10., 11., 16., 17., 18., 19.]);
        assert_eq!(states.last, [4., 5., 6., 7., 12., 13., 14., 15., 20., 21., 22., 23.]);
    }

    #[test]
    fn a_name_never_leads_out_of_the_folder() {
        let name = |path: &str| {
            let transfer = Some(Transfer { hidden_states_path: Some(path.to_string()) });
            let choices = vec![Choice { prompt_token_ids: Some(vec![5, 6, 7]) }];
            file_of(&Completion { choices, kv_transfer_params: transfer }, SHAPE.ids)
        };
        for path in ["a.safetensors", "/x/y/a.safetensors", "../../a.safetensors", "C:\\x\\a.safetensors"] {
            assert_eq!(name(path), Ok("a.safetensors".to_string()));
        }
        for path in ["", "/", "..", "/x/..", "/etc/passwd", "x/.safetensors", "a.safetensors/"] {
            assert!(name(path).is_err(), "{path}");
        }
    }

    proptest::proptest! {
        #[test]
        fn a_damaged_file_is_whole_in_shape_or_refused(at: proptest::sample::Index, byte: u8, end: proptest::sample::Index) {
            let mut bytes = file();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(bytes.len() - end.index(2) * end.index(bytes.len()));
            if let Ok(values) = read_state_file(Path::new("f"), bytes, SHAPE) {
                proptest::prop_assert!(values.len() == 24 && values.iter().all(|v| v.is_finite()));
            }
        }
    }
}

//! Servers of hidden states of our own: vLLM with files, SGLang with JSON, as their protocols are recorded here. They check
//! every field of every request, compute states with the tiny target, and fail as servers do.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use draftsmith::capture::{InProcess, TokenRow};
use draftsmith::core::LayerId;
use draftsmith::formats::cache::CaptureRow;
use draftsmith::formats::safetensors_dir::{Dtype, TensorData, to_bytes};
use draftsmith::kernels::Cpu;
use serde_json::{Value, json};

use crate::fake_http::{Out, Request, same, serve};
use crate::support::tiny_target;

/// Decoder layers of the tiny target.
const NUM_LAYERS: u32 = 8;

/// How an answer goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    Silence(Duration),
    /// 429 with `Retry-After`.
    Busy,
    Status(u16),
    Hangup,
    /// Half a body.
    Cut,
    /// Half a file (vLLM).
    CutFile,
    /// The file comes, but only some time after the answer.
    LateFile,
    /// The answer names a file that is never written.
    NoFile,
    /// The first token is another one, in the answer's echo of the prompt (vLLM).
    EchoedIds,
    /// The first token is another one, in the file (vLLM).
    IdsInFile,
    NoEcho,
    NoPath,
    /// A name that leads out of the folder.
    PathOutside,
    /// The last token is missing.
    Short,
    Narrow,
    MissingLayer,
    /// Integers (vLLM), a text instead of a number (SGLang).
    Whole,
    NotFinite,
    /// Another count of tokens (SGLang).
    Counted,
    /// The beginning came from a cache (SGLang).
    Cached,
    NoStates,
}

/// What the server is and how it was started.
#[derive(Clone)]
pub(crate) enum Started {
    /// The folder that it writes to and `eagle_aux_hidden_state_layer_ids`, counted from the input of layer 0.
    Vllm {
        dir: PathBuf,
        layer_ids: Vec<u32>,
        dtype: Dtype,
    },
    /// Layers that the draft's configuration names, counted by outputs.
    SglangLayers(Vec<u32>),
    SglangFinal,
}

type Fail = Box<dyn Fn(u64) -> Option<Fault> + Send + Sync>;

struct State {
    started: Started,
    key: Option<&'static str>,
    target: Mutex<InProcess<Cpu>>,
    fail: Fail,
    /// Rows asked for, faults included.
    asked: Mutex<Vec<Vec<u32>>>,
    extra_keys: Mutex<BTreeSet<String>>,
    faults: Mutex<BTreeMap<String, u64>>,
    /// Requests that were not as they must be.
    wrong: Mutex<Vec<String>>,
}

/// A running server.
pub(crate) struct FakeCapture {
    address: String,
    state: Arc<State>,
}

impl FakeCapture {
    /// `fail` says what happens to the n-th request for states.
    pub(crate) fn start(
        started: Started,
        key: Option<&'static str>,
        fail: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static,
    ) -> FakeCapture {
        let all = (0..NUM_LAYERS).map(LayerId).collect();
        let state = Arc::new(State {
            started,
            key,
            target: Mutex::new(InProcess::new(tiny_target().target, all)),
            fail: Box::new(fail),
            asked: Mutex::default(),
            extra_keys: Mutex::default(),
            faults: Mutex::default(),
            wrong: Mutex::default(),
        });
        let shared = Arc::clone(&state);
        let root = serve(move |out, request| shared.answer(out, request));
        let address = match &state.started {
            Started::Vllm { .. } => format!("{root}/v1"),
            Started::SglangLayers(_) | Started::SglangFinal => root,
        };
        FakeCapture { address, state }
    }

    pub(crate) fn url(&self) -> &str {
        &self.address
    }

    /// Rows asked for since the last call. Panics if a request was not as it must be.
    #[track_caller]
    pub(crate) fn take_rows(&self) -> Vec<Vec<u32>> {
        let wrong = self.state.wrong.lock().unwrap();
        assert!(wrong.is_empty(), "{wrong:#?}");
        std::mem::take(&mut *self.state.asked.lock().unwrap())
    }

    /// Faults so far.
    pub(crate) fn faults(&self) -> BTreeMap<String, u64> {
        self.state.faults.lock().unwrap().clone()
    }
}

impl State {
    fn answer(&self, out: &mut Out<'_>, request: &Request) -> std::io::Result<()> {
        let ids = match self.check(request) {
            Ok(Some(ids)) => ids,
            Ok(None) => {
                let body = json!({ "object": "list", "data": [{ "id": "tiny" }] }).to_string();
                return out.whole("200 OK", "application/json", "", &body);
            }
            Err(problem) => {
                self.wrong.lock().unwrap().push(format!("{}: {problem}", request.line));
                let body = json!({ "error": { "message": problem } }).to_string();
                return out.whole("400 Bad Request", "application/json", "", &body);
            }
        };
        let nth = {
            let mut asked = self.asked.lock().unwrap();
            asked.push(ids.clone());
            asked.len() as u64 - 1
        };
        let fault = (self.fail)(nth);
        if let Some(fault) = fault {
            *self.faults.lock().unwrap().entry(format!("{fault:?}")).or_default() += 1;
        }
        let gone = Err(std::io::ErrorKind::ConnectionAborted.into());
        match fault {
            Some(Fault::Silence(time)) => {
                std::thread::sleep(time);
                return gone;
            }
            Some(Fault::Busy) => {
                let more = "Retry-After: 0.7\r\n";
                return out.whole("429 Too Many Requests", "text/plain", more, "slow down");
            }
            Some(Fault::Status(status)) => {
                return out.whole(&format!("{status} Trouble"), "text/plain", "", "try later");
            }
            Some(Fault::Hangup) => return gone,
            _ => {}
        }
        // Answers arrive in no fixed order.
        std::thread::sleep(Duration::from_micros(u64::from(ids.iter().sum::<u32>()) % 5000));
        let row = TokenRow { number: 0, loss_mask: vec![false; ids.len()], ids: ids.clone() };
        let states = self.target.lock().unwrap().capture(row).unwrap();
        let body = match &self.started {
            Started::Vllm { dir, layer_ids, dtype } => {
                let path = dir.join(format!("cmpl-{nth}-0.safetensors"));
                let bytes = file(&states, layer_ids, *dtype, fault);
                write_file(path, bytes, fault);
                completion(&ids, nth, fault)
            }
            Started::SglangLayers(layers) => generated(&states, Some(layers), fault),
            Started::SglangFinal => generated(&states, None, fault),
        };
        let body = body.to_string();
        if fault == Some(Fault::Cut) {
            let half = &body[..body.len() / 2];
            let length = body.len();
            write!(
                out.0,
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{half}"
            )?;
            return gone;
        }
        out.whole("200 OK", "application/json", "", &body)
    }

    /// The ids of a row; `None` for the list of models.
    fn check(&self, request: &Request) -> Result<Option<Vec<u32>>, String> {
        if !request.header("user-agent").starts_with("draftsmith/") {
            return Err(format!("user agent `{}`", request.header("user-agent")));
        }
        same("accept", request.header("accept"), "application/json")?;
        let key = self.key.map_or(String::new(), |key| format!("Bearer {key}"));
        same("authorization", request.header("authorization"), &key)?;
        let is_vllm = matches!(self.started, Started::Vllm { .. });
        if is_vllm && request.path() == "/v1/models" {
            same("method", request.method(), "GET")?;
            return Ok(None);
        }
        same("path", request.path(), if is_vllm { "/v1/completions" } else { "/generate" })?;
        same("method", request.method(), "POST")?;
        same("content type", request.header("content-type"), "application/json")?;
        let body: Value = serde_json::from_slice(&request.body).map_err(|e| e.to_string())?;
        let mut fields = body.as_object().ok_or("no object")?.clone();
        let mut take = |name: &str| fields.remove(name).unwrap_or(Value::Null);
        let ids = if is_vllm {
            same("model", &take("model").to_string(), "\"tiny\"")?;
            same("max_tokens", &take("max_tokens").to_string(), "1")?;
            same("temperature", &take("temperature").to_string(), "0")?;
            same("return_token_ids", &take("return_token_ids").to_string(), "true")?;
            take("prompt")
        } else {
            let sampling = take("sampling_params");
            same("sampling_params.temperature", &sampling["temperature"].to_string(), "0")?;
            same("sampling_params.max_new_tokens", &sampling["max_new_tokens"].to_string(), "1")?;
            same("sampling_params", &sampling.as_object().map_or(0, |s| s.len()).to_string(), "2")?;
            same("return_hidden_states", &take("return_hidden_states").to_string(), "true")?;
            same("stream", &take("stream").to_string(), "false")?;
            let key = take("extra_key").as_str().ok_or("no extra_key")?.to_string();
            if !self.extra_keys.lock().unwrap().insert(key.clone()) {
                return Err(format!("extra_key `{key}` came twice"));
            }
            take("input_ids")
        };
        let ids: Vec<u32> = serde_json::from_value(ids).map_err(|e| format!("ids: {e}"))?;
        if ids.is_empty() {
            return Err("no ids".to_string());
        }
        if fields.is_empty() { Ok(Some(ids)) } else { Err(format!("fields {fields:?}")) }
    }
}

/// Chosen outputs of layers, per token side by side.
fn chosen(states: &CaptureRow, layers: &[u32], width: usize) -> Vec<f32> {
    let of_token = |token: usize| {
        layers.iter().flat_map(move |layer| {
            let at = (token * NUM_LAYERS as usize + *layer as usize) * width;
            states.features[at..at + width].iter().copied()
        })
    };
    (0..states.len()).flat_map(of_token).collect()
}

fn file(states: &CaptureRow, layer_ids: &[u32], dtype: Dtype, fault: Option<Fault>) -> Vec<u8> {
    let width = states.last.len() / states.len();
    let mut outputs: Vec<u32> = layer_ids.iter().map(|id| id - 1).collect();
    if fault == Some(Fault::MissingLayer) {
        outputs.remove(1);
    }
    let mut values = chosen(states, &outputs, width);
    let mut ids: Vec<i64> = states.ids.iter().map(|id| i64::from(*id)).collect();
    let mut shape = [states.len(), outputs.len(), width];
    match fault {
        Some(Fault::IdsInFile) => ids[0] += 1,
        Some(Fault::Short) => {
            shape[0] -= 1;
            values.truncate(shape.iter().product());
        }
        Some(Fault::Narrow) => {
            shape = [states.len(), 2 * outputs.len(), width / 2];
        }
        Some(Fault::NotFinite) => values[width + 3] = f32::INFINITY,
        _ => {}
    }
    let name = "hidden_states";
    let tensor = match (fault, dtype) {
        (Some(Fault::Whole), _) => {
            TensorData::i64(name, &shape, &values.iter().map(|v| *v as i64).collect::<Vec<_>>())
        }
        (_, Dtype::BF16) => TensorData::bf16(name, &shape, &values),
        (_, Dtype::F16) => TensorData::f16(name, &shape, &values),
        (_, Dtype::F32) => TensorData::f32(name, &shape, &values),
        (_, other) => panic!("{other:?}"),
    };
    let mut tensors = vec![tensor, TensorData::i64("token_ids", &[ids.len()], &ids)];
    if fault == Some(Fault::NoStates) {
        tensors.remove(0);
    }
    to_bytes(&tensors, &std::collections::BTreeMap::new())
}

/// As the connector does: the lock is held before the answer goes out, and given up when the file is whole.
fn write_file(path: PathBuf, mut bytes: Vec<u8>, fault: Option<Fault>) {
    let lock = std::fs::File::create(path.with_added_extension("lock")).unwrap();
    lock.lock().unwrap();
    if fault == Some(Fault::CutFile) {
        bytes.truncate(bytes.len() - 10);
    }
    let write = move || {
        if fault != Some(Fault::NoFile) {
            // In two pieces: whoever does not heed the lock sees half a file.
            let mut file = std::fs::File::create(path).unwrap();
            let (head, tail) = bytes.split_at(bytes.len() / 2);
            file.write_all(head).unwrap();
            std::thread::sleep(Duration::from_millis(2));
            file.write_all(tail).unwrap();
        }
        lock.unlock().unwrap();
    };
    match fault {
        Some(Fault::LateFile) => {
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                write();
            });
        }
        _ => drop(std::thread::spawn(write)),
    }
}

fn completion(ids: &[u32], nth: u64, fault: Option<Fault>) -> Value {
    let mut echoed = json!(ids);
    if fault == Some(Fault::EchoedIds) {
        echoed[0] = json!(ids[0] + 1);
    }
    let file = format!("cmpl-{nth}-0.safetensors");
    let path = match fault {
        Some(Fault::PathOutside) => "/elsewhere/secret".to_string(),
        // The server sees the folder under a name of its own.
        _ => format!("/of/the/server/{file}"),
    };
    let mut body = json!({
        "id": format!("cmpl-{nth}"), "object": "text_completion", "model": "tiny",
        "choices": [{ "index": 0, "text": "x", "finish_reason": "length", "token_ids": [5], "prompt_token_ids": echoed }],
        "usage": { "prompt_tokens": ids.len(), "completion_tokens": 1 },
        "kv_transfer_params": { "hidden_states_path": path },
    });
    match fault {
        Some(Fault::NoEcho) => body["choices"][0]["prompt_token_ids"] = Value::Null,
        Some(Fault::NoPath) => body["kv_transfer_params"] = Value::Null,
        _ => {}
    }
    body
}

/// `layers` side by side, or the final state.
fn generated(states: &CaptureRow, layers: Option<&[u32]>, fault: Option<Fault>) -> Value {
    let width = states.last.len() / states.len();
    let (values, mut count) = match layers {
        Some(layers) => (chosen(states, layers, width), layers.len() * width),
        None => (states.last.clone(), width),
    };
    let mut rows: Vec<Vec<f32>> = values.chunks(count).map(<[f32]>::to_vec).collect();
    match fault {
        Some(Fault::Short) => drop(rows.pop()),
        Some(Fault::MissingLayer) => count -= width,
        Some(Fault::Narrow) => count -= 1,
        _ => {}
    }
    rows.iter_mut().for_each(|row| row.truncate(count));
    // Two passes over the prompt, as when it is prefilled in chunks.
    let rest = rows.split_off(rows.len() / 2);
    let mut body = json!({
        "text": "x", "output_ids": [5],
        "meta_info": {
            "id": "1", "finish_reason": { "type": "length", "length": 1 }, "prompt_tokens": states.len(),
            "completion_tokens": 1, "cached_tokens": 0, "hidden_states": [rows, rest],
        },
    });
    match fault {
        Some(Fault::Counted) => body["meta_info"]["prompt_tokens"] = json!(states.len() + 1),
        Some(Fault::Cached) => body["meta_info"]["cached_tokens"] = json!(3),
        Some(Fault::NoStates) => {
            body["meta_info"].as_object_mut().unwrap().remove("hidden_states");
        }
        Some(Fault::Whole) => body["meta_info"]["hidden_states"][0][0][0] = json!("0.5"),
        Some(Fault::NotFinite) => body["meta_info"]["hidden_states"][0][0][0] = json!(1e300),
        _ => {}
    }
    body
}

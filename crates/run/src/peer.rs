//! Other engines and frameworks as sides of `bench decode` and `bench train`: a script of ours inside their own
//! interpreter, one JSON object per line each way.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use draftsmith_bench::BoxError;
use draftsmith_bench::decode::{Side, SideCosts, Timed};
use draftsmith_bench::train::{StepShape, StepTime, Trainer};
use draftsmith_formats::gguf::GgufFile;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::Error;

const LLAMA_CPP_PYTHON: &str = include_str!("../../../bench/peers/llama_cpp_python.py");
const TORCH: &str = include_str!("../../../bench/peers/torch_step.py");

/// A running script.
struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    /// Starts `script` in an interpreter that has `package` and sends it a first request.
    fn start(
        python: &Path,
        (package, script, installer): (&str, &str, &str),
        request: &serde_json::Value,
    ) -> Result<(Process, Loaded), Error> {
        let unusable = |what: String| {
            Error::input(
                format!("{package} does not run in `{}`: {what}", python.display()),
                format!(
                    "install it with `bench/peers/{installer}` and name its interpreter with `--peer-python`"
                ),
            )
        };
        let mut child = Command::new(python)
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|e| unusable(e.to_string()))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(unusable("its input and output are not there".to_string()));
        };
        let mut process = Process { child, input, output: BufReader::new(output) };
        let loaded = process.ask(request).map_err(|e| unusable(e.to_string()))?;
        Ok((process, loaded))
    }

    fn ask<T: DeserializeOwned>(&mut self, request: &serde_json::Value) -> Result<T, BoxError> {
        let mut line = request.to_string();
        line.push('\n');
        self.input.write_all(line.as_bytes())?;
        self.input.flush()?;
        let mut answer = String::new();
        if self.output.read_line(&mut answer)? == 0 {
            return Err("it ended without an answer; its own message stands above".into());
        }
        Ok(serde_json::from_str(&answer)?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Deserialize)]
struct Loaded {
    version: String,
    /// Where loading is what is measured.
    load_ns: Option<u64>,
}

#[derive(Deserialize)]
struct Passed {
    step_ns: u64,
}

#[derive(Deserialize)]
struct Memory {
    peak_bytes: u64,
}

#[derive(Deserialize)]
struct Answer {
    token_ids: Vec<u32>,
    prefill_ns: u64,
    decode_ns: u64,
}

/// A running engine.
pub struct Peer {
    name: String,
    process: Process,
    load_s: Option<f64>,
    /// Weights that it reads for one token.
    weight_bytes_per_token: Option<u64>,
}

impl Peer {
    /// Starts llama-cpp-python in the interpreter that has it and loads a GGUF file.
    ///
    /// # Errors
    /// No such interpreter, no such package in it, or a model that it refuses.
    pub fn llama_cpp_python(
        python: &Path,
        model: &Path,
        threads: usize,
        context: usize,
    ) -> Result<Peer, Error> {
        let request = json!({ "model": model, "threads": threads, "context": context });
        let package = ("llama-cpp-python", LLAMA_CPP_PYTHON, "install-llama-cpp-python.sh");
        let (process, loaded) = Process::start(python, package, &request)?;
        Ok(Peer {
            name: format!("llama-cpp-python {}", loaded.version),
            process,
            load_s: loaded.load_ns.map(|ns| ns as f64 / 1e9),
            weight_bytes_per_token: file_bytes_per_token(model),
        })
    }

    /// The id of its process.
    pub fn process_id(&self) -> u32 {
        self.process.child.id()
    }
}

/// Bytes of a GGUF file that a token reads: all tensors, without the embedding unless it is the head as well. `None` for
/// a mixture of experts, of which a token reads a part.
fn file_bytes_per_token(model: &Path) -> Option<u64> {
    let file = GgufFile::open(model).ok()?;
    if file.tensors().iter().any(|t| t.name.contains("_exps.")) {
        return None;
    }
    let has_head = file.find_tensor("output.weight").is_some();
    let read = file.tensors().iter().filter(|t| !(has_head && t.name == "token_embd.weight"));
    Some(read.map(|t| file.data(t).len() as u64).sum())
}

impl Side for Peer {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn decode(&mut self, prompt_ids: &[u32], new_tokens: usize) -> Result<Timed, BoxError> {
        let answer: Answer =
            self.process.ask(&json!({ "prompt_ids": prompt_ids, "new_tokens": new_tokens }))?;
        Ok(Timed {
            token_ids: answer.token_ids,
            prefill: Duration::from_nanos(answer.prefill_ns),
            decode: Duration::from_nanos(answer.decode_ns),
        })
    }

    fn step(&mut self, context: usize, rows: usize) -> Result<Option<Duration>, BoxError> {
        let passed: Passed = self.process.ask(&json!({ "step": rows, "context": context }))?;
        Ok(Some(Duration::from_nanos(passed.step_ns)))
    }

    fn costs(&mut self) -> Result<SideCosts, BoxError> {
        let memory: Memory = self.process.ask(&json!({ "memory": true }))?;
        Ok(SideCosts {
            load_s: self.load_s,
            peak_memory_bytes: Some(memory.peak_bytes),
            weight_bytes_per_token: self.weight_bytes_per_token,
        })
    }
}

#[derive(Deserialize)]
struct Stepped {
    step_ns: u64,
    loss: f64,
    peak_bytes: u64,
}

/// A draft that PyTorch trains.
pub struct TorchPeer {
    name: String,
    process: Process,
}

impl TorchPeer {
    /// Builds the draft in the interpreter that has PyTorch; `compile` asks for `torch.compile`.
    ///
    /// # Errors
    /// No such interpreter, or no PyTorch in it.
    pub fn start(
        python: &Path,
        shape: StepShape,
        threads: usize,
        compile: bool,
        lr: f64,
    ) -> Result<TorchPeer, Error> {
        let request = json!({ "shape": shape, "threads": threads, "compile": compile, "lr": lr });
        let (process, loaded) = Process::start(python, ("PyTorch", TORCH, "install-torch.sh"), &request)?;
        let how = if compile { "compiled" } else { "eager" };
        Ok(TorchPeer { name: format!("torch {} {how}", loaded.version), process })
    }
}

impl Trainer for TorchPeer {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn step(&mut self) -> Result<StepTime, BoxError> {
        let done: Stepped = self.process.ask(&json!({ "step": true }))?;
        let time = Duration::from_nanos(done.step_ns);
        Ok(StepTime { time, loss: done.loss, peak_bytes: Some(done.peak_bytes) })
    }
}

//! Other engines as a side of `bench decode`: a script of ours inside their own interpreter, one JSON object per line
//! each way.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use draftsmith_bench::BoxError;
use draftsmith_bench::decode::{Side, Timed};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::Error;

const LLAMA_CPP_PYTHON: &str = include_str!("../../../bench/peers/llama_cpp_python.py");

/// A running engine.
pub struct Peer {
    name: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

#[derive(Deserialize)]
struct Loaded {
    version: String,
}

#[derive(Deserialize)]
struct Answer {
    token_ids: Vec<u32>,
    prefill_ns: u64,
    decode_ns: u64,
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
        let hint = "install it with `bench/peers/install-llama-cpp-python.sh` and name its interpreter with \
                    `--peer-python`";
        let unusable = |what: String| {
            Error::input(format!("llama-cpp-python does not run in `{}`: {what}", python.display()), hint)
        };
        let mut child = Command::new(python)
            .args(["-c", LLAMA_CPP_PYTHON])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|e| unusable(e.to_string()))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(unusable("its input and output are not there".to_string()));
        };
        let mut peer = Peer { name: String::new(), child, input, output: BufReader::new(output) };
        let request = json!({ "model": model, "threads": threads, "context": context });
        let loaded: Loaded = peer.ask(&request).map_err(|e| unusable(e.to_string()))?;
        peer.name = format!("llama-cpp-python {}", loaded.version);
        Ok(peer)
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

impl Side for Peer {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn decode(&mut self, prompt_ids: &[u32], new_tokens: usize) -> Result<Timed, BoxError> {
        let answer: Answer = self.ask(&json!({ "prompt_ids": prompt_ids, "new_tokens": new_tokens }))?;
        Ok(Timed {
            token_ids: answer.token_ids,
            prefill: Duration::from_nanos(answer.prefill_ns),
            decode: Duration::from_nanos(answer.decode_ns),
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

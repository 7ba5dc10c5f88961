//! How other engines are started with a draft, as model cards and exports tell it. The commands themselves stand with
//! each kind's layouts.

use serde::Serialize;

use crate::Problem;
use crate::manifest::TargetInfo;

pub(crate) const SGLANG: &str = "SGLang";
pub(crate) const VLLM: &str = "vLLM";
pub(crate) const LLAMA_CPP: &str = "llama.cpp";

/// A command of another engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Launch {
    /// Which engine.
    pub engine: &'static str,
    /// Shell lines.
    pub command: String,
}

/// What the target is called by other engines.
pub(crate) fn engine_name(target: &TargetInfo) -> &str {
    target.hub_name.as_deref().unwrap_or("TARGET")
}

/// What is known to break an engine, as it is found in a draft.
pub(crate) struct Rules {
    engine: &'static str,
    problems: Vec<Problem>,
}

impl Rules {
    pub(crate) fn of(engine: &'static str) -> Rules {
        Rules { engine, problems: Vec::new() }
    }

    /// Notes what breaks it, fatally or not.
    pub(crate) fn rule(&mut self, breaks: bool, fatal: bool, what: impl Into<String>) {
        if breaks {
            self.problems.push(Problem::Engine { engine: self.engine, what: what.into(), fatal });
        }
    }

    /// What breaks this engine.
    pub(crate) fn problems(self) -> Vec<Problem> {
        self.problems
    }
}

//! `draftsmith generate`.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use draftsmith::bench::record::DeviceInfo;
use draftsmith::cli;
use draftsmith::core::{Sampling, VerifyRule};
use draftsmith::costs::with_costs;
use draftsmith::decode::{DraftPlan, FinishReason, GenerateOptions, Generation};
use draftsmith::device::Backend;
use draftsmith::engine::{default_plan, draft_plan, engine};
use draftsmith::kernels::PackMode;
use draftsmith::measure::prompt_ids_at;
use draftsmith::text::Message;
use draftsmith::{Error, formats};
use serde::Serialize;

use super::{DraftSource, OnDevice, Session, target_sources};
use crate::failure::{Failure, NOT_HELD};
use crate::printer;

/// Fixed by the contract of the command line; what follows `accept_len` was added.
#[derive(Serialize)]
struct Answer {
    prompt_ids: Vec<u32>,
    token_ids: Vec<u32>,
    text: String,
    finish_reason: &'static str,
    accept_len: Option<f64>,
    /// With `--prove`: every token equals target-only decoding.
    #[serde(skip_serializing_if = "Option::is_none")]
    identical: Option<bool>,
    tokens_per_s: Option<f64>,
    /// What it was computed on, if not on the processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<DeviceInfo>,
}

pub(crate) fn sampling(args: &cli::Choosing) -> Result<Sampling, Failure> {
    let wrong = |flag: &str, value: f32, wanted: &str| {
        let advice = format!("give `{flag}` {wanted}, or leave it out");
        Failure::input(format!("`{flag}` is {value}, expected {wanted}"), Some(advice))
    };
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return Err(wrong("--temperature", args.temperature, "a number of at least 0"));
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return Err(wrong("--top-p", args.top_p, "a number above 0 and at most 1"));
    }
    Ok(Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
        ..Sampling::GREEDY
    })
}

/// The plan that was asked for; `None` if nothing was said about it.
pub(crate) fn plan(args: &cli::Drafting) -> Option<DraftPlan> {
    match (args.auto, args.depth, args.tree_top_k) {
        (true, ..) => Some(DraftPlan::Auto),
        (false, None, None) => None,
        (false, depth, top_k) => {
            Some(draft_plan(depth.unwrap_or(DEFAULT_DEPTH), top_k.map(|k| (k, args.tree_nodes))))
        }
    }
}

/// The rule that was asked for, if the rest fits it.
pub(crate) fn rule(
    args: &cli::Verifying,
    drafting: &cli::Drafting,
    sampling: &Sampling,
) -> Result<VerifyRule, Failure> {
    let rule = args.verify;
    if rule == VerifyRule::Seeded {
        return Ok(rule);
    }
    let shape = if drafting.auto { Some("--auto") } else { drafting.tree_top_k.map(|_| "--tree-top-k") };
    if let Some(shape) = shape {
        return Err(Failure::input(
            format!(
                "`--verify {rule}` needs a chain that the draft draws, and `{shape}` takes its best tokens"
            ),
            Some(format!("give `--depth D` instead of `{shape}`, or `--verify seeded`")),
        ));
    }
    if sampling.is_greedy() {
        return Err(Failure::input(
            format!(
                "`--verify {rule}` draws tokens, and `--temperature {}` draws none",
                sampling.temperature
            ),
            Some("give a temperature above 0, or leave `--verify` out".to_string()),
        ));
    }
    Ok(rule)
}

/// Draft tokens per proposal when nobody says.
pub(crate) const DEFAULT_DEPTH: u32 = 5;

/// Reads a list of messages, or an object with `messages`.
fn read_messages(path: &Path) -> Result<Vec<Message>, Failure> {
    let shape = "write a JSON list of {\"role\", \"content\"}, or an object whose `messages` is one";
    let bytes = formats::atomic::read(path).map_err(Error::from)?;
    let wrong =
        |what: String| Failure::input(format!("`{}`: {what}", path.display()), Some(shape.to_string()));
    let value: serde_json::Value = serde_json::from_slice(&bytes)
        .map_err(|e| wrong(format!("broken JSON at line {}: {e}", e.line())))?;
    let list = value
        .get("messages")
        .unwrap_or(&value)
        .as_array()
        .ok_or_else(|| wrong("no list of messages".into()))?;
    if list.is_empty() {
        return Err(wrong("the list of messages is empty".into()));
    }
    list.iter()
        .enumerate()
        .map(|(i, m)| Message::from_json(m).map_err(|e| wrong(format!("message {i}: {e}"))))
        .collect()
}

pub(crate) fn run(args: &cli::Generate, session: &Session) -> Result<u8, Failure> {
    session.work(args.computing.device, args.threads, args)
}

impl OnDevice for cli::Generate {
    fn on<K: Backend>(&self, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
        generate(self, session, kernels)
    }
}

fn generate<K: Backend>(args: &cli::Generate, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
    let sampling = sampling(&args.choosing)?;
    let messages = match (&args.prompt, &args.messages) {
        (Some(prompt), _) => Some(vec![Message::new("user", prompt.as_str())]),
        (None, Some(path)) => Some(read_messages(path)?),
        (None, None) => None,
    };
    let mode = if args.f32 { PackMode::F32 } else { PackMode::Q8 };
    let source = DraftSource::of(args.bundle.as_ref(), args.draft_model.as_ref());
    let sources = target_sources(source, args.target.as_ref())?;
    let target = session.load_target_on(kernels, &sources, None, args.f32)?;
    let draft = source.map(|source| session.load_source(source, &target, mode)).transpose()?;
    let prompt = match (&messages, &args.prompt_ids) {
        (Some(messages), _) => prompt_ids_at(&target.text, messages, Some(today()))?,
        (None, ids) => ids.clone().unwrap_or_default(),
    };
    let speculative = match (plan(&args.drafting), &draft) {
        (Some(DraftPlan::Auto), _) => DraftPlan::Auto,
        (Some(_), None) => {
            return Err(Failure::input(
                "`--depth` and `--tree-top-k` need a draft",
                Some("give one with `--bundle DIR` or `--draft-model REF`, or leave them out".to_string()),
            ));
        }
        (Some(plan), Some(_)) => plan,
        // What is drawn is a chain.
        (None, Some(_)) if args.verifying.verify != VerifyRule::Seeded => {
            DraftPlan::Chain { depth: DEFAULT_DEPTH as usize }
        }
        (None, Some(draft)) => default_plan(draft),
        (None, None) => DraftPlan::None,
    };
    let verify = rule(&args.verifying, &args.drafting, &sampling)?;
    if args.prove && verify != VerifyRule::Seeded {
        return Err(Failure::input(
            format!("`--prove` compares texts token by token, and `--verify {verify}` draws another one"),
            Some("leave one of them out: `--verify seeded` is the rule that gives the same text".to_string()),
        ));
    }
    if args.prove && speculative == DraftPlan::None {
        return Err(Failure::input(
            "`--prove` compares decoding with and without speculation, and there is none",
            Some("give a draft with `--bundle DIR` or `--draft-model REF`, or `--auto`".to_string()),
        ));
    }
    let mut engine = engine(&target, draft.as_ref());
    if speculative == DraftPlan::Auto {
        engine = with_costs(engine, &session.places, &target, draft.as_ref(), &session.printer);
    }
    let decode = |draft: DraftPlan, stream: bool| -> Result<(Generation, String), Failure> {
        let options = GenerateOptions {
            max_new_tokens: args.max_new_tokens as usize,
            sampling,
            stop_ids: target.stop_ids(),
            draft,
            verify,
            ..GenerateOptions::default()
        };
        let mut decoder = target.text.tokenizer.stream_decoder(true, &args.stop);
        let mut text = String::new();
        let mut written = Ok(());
        let mut done = engine
            .generate(&prompt, &options, &mut |event| {
                let chunk = decoder.push(event.id);
                if stream {
                    written = printer::out(&chunk.text);
                }
                text.push_str(&chunk.text);
                match chunk.stopped || session.stop.requested() || written.is_err() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            })
            .map_err(Error::from)?;
        written?;
        if decoder.stopped() {
            // Ended by a stop text, as by a stop id.
            done.finish_reason = FinishReason::Stop;
        }
        let rest = decoder.finish().text;
        if stream {
            printer::out(&format!("{rest}\n"))?;
        }
        text.push_str(&rest);
        if done.finish_reason == FinishReason::Cancelled {
            return Err(Failure::interrupted("interrupted", None));
        }
        Ok((done, text))
    };
    let (done, text) = decode(speculative, !args.json)?;
    let identical = match args.prove {
        true => Some(decode(DraftPlan::None, false)?.0.token_ids == done.token_ids),
        false => None,
    };
    let seconds = done.decode.as_secs_f64();
    let tokens_per_s =
        (seconds > 0.0 && done.token_ids.len() > 1).then(|| (done.token_ids.len() - 1) as f64 / seconds);
    let accept_len = (speculative != DraftPlan::None).then(|| done.stats.accept_len()).flatten();
    if args.json {
        printer::json(&Answer {
            text,
            prompt_ids: prompt,
            token_ids: done.token_ids,
            finish_reason: done.finish_reason.name(),
            accept_len,
            identical,
            tokens_per_s,
            device: kernels.device(),
        })?;
    } else {
        let mut line = format!("{} tokens", done.token_ids.len());
        if let Some(rate) = tokens_per_s {
            line.push_str(&format!(", {rate:.1} tokens/s"));
        }
        if let Some(accept_len) = accept_len {
            line.push_str(&format!(", accept length {accept_len:.2}"));
        }
        match identical {
            Some(true) => line.push_str(match K::ROW_EXACT {
                true => ", equal to target-only decoding token for token",
                false => {
                    ", equal to target-only decoding token for token here; this device does not promise it"
                }
            }),
            Some(false) => line.push_str(", DIFFERENT from target-only decoding"),
            None => {}
        }
        draftsmith::report::Report::note(&session.printer, &line);
    }
    Ok(if identical == Some(false) { NOT_HELD } else { 0 })
}

/// Now, for templates that tell the model the date.
fn today() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0))
}

//! `draftsmith quickstart`: what a draft gains, from nothing, in a few minutes.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith::bench::{BusyTimes, Doubt};
use draftsmith::bundle::{MANIFEST_FILE, Manifest};
use draftsmith::core::AcceptStats;
use draftsmith::costs::with_costs;
use draftsmith::decode::{DraftPlan, FinishReason, GenerateOptions, Generation, TokenOrigin};
use draftsmith::device::Backend;
use draftsmith::engine::{engine, target_references};
use draftsmith::kernels::PackMode;
use draftsmith::measure::{busy_times_with, prompt_ids};
use draftsmith::pull::Reference;
use draftsmith::report::Report;
use draftsmith::text::Message;
use draftsmith::{Error, cli};
use serde_json::json;

use super::{OnDevice, Session, find_shipped, shipped_data};
use crate::failure::{Failure, NOT_HELD};
use crate::printer;

/// The draft that ships with draftsmith.
const BUNDLE: &str = "bundles/smollm2-135m-instruct-eagle3";

/// Everyday requests of different kinds, within the reach of a small model: a letter, an explanation, code, a list.
const PROMPTS: [&str; 4] = [
    "Write a short thank-you note to a neighbour who watered my plants.",
    "Explain why the sky is blue in a few sentences.",
    "Write a Python function that returns the sum of the even numbers in a list.",
    "Give me five tips for learning a new language.",
];

const GREEN: &str = "\x1b[32m";
const BOLD: &str = "\x1b[1m";
const RESET: &str = "\x1b[0m";

fn find_bundle() -> Result<PathBuf, Failure> {
    let found = find_shipped(&format!("{BUNDLE}/{MANIFEST_FILE}"));
    found.and_then(|manifest| manifest.parent().map(Path::to_path_buf)).ok_or_else(|| {
        let copy = |data: PathBuf| format!(", copy the repository's `bundles` into `{}`", data.display());
        let copy = shipped_data().map_or(String::new(), copy);
        Failure::input(
            format!("the draft `{BUNDLE}` was not found here, above here, or beside the program"),
            Some(format!(
                "install the wheel or unpack the archive, which bring it{copy}, run it inside the repository, or \
                 name a bundle with `--bundle DIR`"
            )),
        )
    })
}

pub(crate) fn run(args: &cli::Quickstart, session: &Session) -> Result<u8, Failure> {
    session.work(args.computing.device, args.threads, args)
}

impl OnDevice for cli::Quickstart {
    fn on<K: Backend>(&self, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
        quickstart(self, session, kernels)
    }
}

fn quickstart<K: Backend>(
    args: &cli::Quickstart,
    session: &Session,
    kernels: &Arc<K>,
) -> Result<u8, Failure> {
    let bundle = match &args.bundle {
        Some(dir) => dir.clone(),
        None => find_bundle()?,
    };
    let manifest = Manifest::read(&bundle).map_err(Error::from)?;
    let (sources, sha256) = match &args.target {
        Some(reference) => (vec![reference.clone()], None),
        // Exactly the weights that the draft was trained for.
        None => (target_references(&bundle)?, Some(manifest.target.weights_sha256.as_str())),
    };
    session.printer.note(&format!("target {} ({})", manifest.target.name, manifest.target.license));
    // A folder has no hash before it is loaded: it is compared then.
    let is_folder = |source: &String| match source.parse() {
        Ok(Reference::Path(path)) => path.is_dir(),
        Ok(Reference::Hf { file, .. }) => file.is_none(),
        Ok(Reference::Pip { .. } | Reference::PipParts(_)) | Err(_) => false,
    };
    let known = sha256.filter(|_| !sources.iter().any(is_folder));
    let target = session.load_target_on(kernels, &sources, known, false)?;
    if let Some(wanted) = sha256.filter(|wanted| *wanted != target.sha256) {
        return Err(Failure::input(
            format!(
                "target `{}` has weights with sha256 `{}`, but the draft was trained for `{wanted}`",
                target.reference, target.sha256
            ),
            Some(format!(
                "get the weights that `{}` names, or try these anyway with `--target {}`",
                bundle.join(MANIFEST_FILE).display(),
                target.reference
            )),
        ));
    }
    let draft = session.load_draft(&bundle, &target, PackMode::Q8)?;
    session.printer.note(&format!("draft  {} in `{}`", manifest.name, shown(&bundle)));
    let engine = engine(&target, Some(&draft));
    let engine = with_costs(engine, &session.places, &target, Some(&draft), &session.printer);
    let plan = DraftPlan::Auto;
    let show = Show { live: !args.json, colour: !args.json && std::io::stdout().is_terminal() };
    let decode =
        |prompt: &[u32], draft: DraftPlan, limit: usize, show: Show| -> Result<Generation, Failure> {
            let options = GenerateOptions {
                max_new_tokens: limit,
                stop_ids: target.stop_ids(),
                draft,
                ..GenerateOptions::default()
            };
            let mut decoder = target.text.tokenizer.stream_decoder(true, &[]);
            let mut written = Ok(());
            let done = engine
                .generate(prompt, &options, &mut |event| {
                    if show.live {
                        let text = decoder.push(event.id).text;
                        written = match show.colour && event.origin == TokenOrigin::Draft && !text.is_empty()
                        {
                            true => printer::out(&format!("{GREEN}{text}{RESET}")),
                            false => printer::out(&text),
                        };
                    }
                    match session.stop.requested() || written.is_err() {
                        true => ControlFlow::Break(()),
                        false => ControlFlow::Continue(()),
                    }
                })
                .map_err(Error::from)?;
            written?;
            if done.finish_reason == FinishReason::Cancelled {
                if show.live {
                    printer::out("\n")?;
                }
                return Err(Failure::interrupted("interrupted", None));
            }
            Ok(done)
        };
    // Both ways once, unseen: the first pass over the weights is slower.
    let warm = prompt_ids(&target.text, &[Message::new("user", PROMPTS[0])])?;
    let silent = Show { live: false, colour: false };
    decode(&warm, DraftPlan::None, 8, silent)?;
    decode(&warm, plan, 8, silent)?;

    let limit = args.max_new_tokens as usize;
    let before = busy_times_with(None);
    let mut total = Total::default();
    let mut rows = Vec::new();
    for (i, prompt) in PROMPTS.iter().enumerate() {
        let ids = prompt_ids(&target.text, &[Message::new("user", *prompt)])?;
        let head = |title: &str| match show.live {
            true => printer::out(&format!("{}{title}{}\n", show.bold(), show.plain())),
            false => Ok(()),
        };
        head(&format!("\n── {prompt}"))?;
        // The side that goes first alternates, so that neither has the warmer machine.
        let mut plain = None;
        let mut spec = None;
        for with_draft in [i % 2 == 1, i % 2 == 0] {
            head(if with_draft { "with draft:" } else { "target alone:" })?;
            let side = if with_draft { plan } else { DraftPlan::None };
            let done = decode(&ids, side, limit, show)?;
            let tokens = done.token_ids.len().saturating_sub(1);
            let rate = tokens as f64 / done.decode.as_secs_f64().max(1e-9);
            let accept = match done.stats.accept_len().filter(|_| with_draft) {
                Some(accept_len) => format!(", accept length {accept_len:.2}"),
                None => String::new(),
            };
            head(&format!("\n   {rate:.1} tokens/s{accept}\n"))?;
            if with_draft { spec = Some(done) } else { plain = Some(done) }
        }
        let (Some(plain), Some(spec)) = (plain, spec) else { continue };
        let identical = plain.token_ids == spec.token_ids;
        rows.push(json!({
            "prompt": prompt,
            "tokens": spec.token_ids.len(),
            "identical": identical,
            "accept_len": spec.stats.accept_len(),
        }));
        total.add(&plain, &spec, identical);
    }
    let identical = total.identical == PROMPTS.len();
    let accept_len = total.stats.accept_len();
    let (plain_rate, spec_rate) =
        (total.plain_tokens / total.plain_s.max(1e-9), total.spec_tokens / total.spec_s.max(1e-9));
    let speedup = spec_rate / plain_rate;
    let others = before.zip(busy_times_with(None)).and_then(|(a, b)| BusyTimes::others_share(a, b));
    let busy = others.and_then(Doubt::of_others);
    if args.json {
        let mut page = json!({
            "accept_len": accept_len,
            "speedup": speedup,
            "speedup_baseline": "target-only decoding, same session, alternating",
            "plain_tokens_per_s": plain_rate,
            "spec_tokens_per_s": spec_rate,
            "identical": identical,
            "tokens_compared": total.compared,
            "threads": target.threads,
            "prompts": rows,
            "others_busy_share": others,
            "doubts": busy.iter().map(|doubt| json!({
                "kind": doubt.kind(), "message": doubt.message(), "advice": doubt.advice(),
            })).collect::<Vec<_>>(),
        });
        if let Some(device) = kernels.device() {
            page["device"] = json!(device);
        }
        printer::json(&page)?;
    } else {
        let on = match kernels.device() {
            Some(device) => device.name,
            None => format!("{} threads", target.threads),
        };
        let promise = if K::ROW_EXACT { "" } else { ", which this device does not promise" };
        let accept = accept_len.map_or("none".to_string(), |a| format!("{a:.2}"));
        printer::out(&format!(
            "accept length  {accept} tokens per pass of the target\n\
             speedup        {speedup:.2}x over the target alone ({plain_rate:.1} to {spec_rate:.1} tokens/s, {on}, {} prompts, \
             alternating)\n\
             proof          {} of {} answers equal, {} tokens compared one by one{promise}\n",
            PROMPTS.len(),
            total.identical,
            PROMPTS.len(),
            total.compared
        ))?;
        if let Some(doubt) = &busy {
            printer::out(&format!("doubt          {}: {}\n", doubt.message(), doubt.advice()))?;
        }
        // What ships has a name that every verb knows.
        let name = bundle.file_name().filter(|_| args.bundle.is_none());
        let name = name.map_or_else(|| shown(&bundle), |name| name.to_string_lossy().into_owned());
        printer::out(&format!(
            "next           a page, and OpenAI's API: draftsmith serve --bundle {}\n\
             \x20              a draft for your own model: draftsmith make hf:ORG/NAME --data chats.jsonl --hours 1\n",
            name
        ))?;
    }
    Ok(if identical { 0 } else { NOT_HELD })
}

fn shown(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here).unwrap_or(path).display().to_string()
}

/// What of an answer is shown while it is written.
#[derive(Clone, Copy)]
struct Show {
    live: bool,
    colour: bool,
}

impl Show {
    fn bold(self) -> &'static str {
        if self.colour { BOLD } else { "" }
    }

    fn plain(self) -> &'static str {
        if self.colour { RESET } else { "" }
    }
}

#[derive(Default)]
struct Total {
    stats: AcceptStats,
    plain_s: f64,
    plain_tokens: f64,
    spec_s: f64,
    spec_tokens: f64,
    identical: usize,
    compared: usize,
}

impl Total {
    fn add(&mut self, plain: &Generation, spec: &Generation, identical: bool) {
        self.stats.add(&spec.stats);
        self.plain_s += plain.decode.as_secs_f64();
        self.plain_tokens += plain.token_ids.len().saturating_sub(1) as f64;
        self.spec_s += spec.decode.as_secs_f64();
        self.spec_tokens += spec.token_ids.len().saturating_sub(1) as f64;
        self.identical += usize::from(identical);
        self.compared += plain.token_ids.len().max(spec.token_ids.len());
    }
}

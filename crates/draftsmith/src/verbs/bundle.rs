//! `draftsmith bundle check`, `export`, `verify-export`, `import` and `card`.

use draftsmith::Error;
use draftsmith::bundle::{
    CheckReport, Existing, ExportInput, Layout, Manifest, Problem, TargetFacts, check_alone,
    check_with_target,
};
use draftsmith::cli::{self, ExportFormat};
use draftsmith::device::Host;
use draftsmith::engine::{LoadedTarget, default_threads, locate};
use draftsmith::imports::{ImportOptions, import_draft, rewrite_card};
use draftsmith::report::Report;
use draftsmith::target::gguf_tokenizer;
use serde_json::json;

use super::{DraftSource, Session, target_sources};
use crate::failure::{Failure, NOT_HELD};
use crate::printer;

pub(crate) fn check(args: &cli::BundleCheck, session: &Session) -> Result<u8, Failure> {
    let report = match &args.target {
        None => check_alone(&args.dir, &Host::new(default_threads())).map_err(Error::from)?,
        Some(reference) => {
            // A folder that is no bundle is told before a model is fetched.
            Manifest::read(&args.dir).map_err(Error::from)?;
            let target = load(reference, session)?;
            check_with_target(&args.dir, &target.info(), &target.target).map_err(Error::from)?
        }
    };
    tell(&report, args.json)
}

fn load(reference: &String, session: &Session) -> Result<LoadedTarget, Error> {
    session.load_target(std::slice::from_ref(reference), None, false, None)
}

/// Prints a report; the exit code says whether it holds.
fn tell(report: &CheckReport, as_json: bool) -> Result<u8, Failure> {
    match as_json {
        true => printer::json(report)?,
        false => printer::out(&report.text())?,
    }
    Ok(if report.holds { 0 } else { NOT_HELD })
}

fn existing(replace: bool) -> Existing {
    if replace { Existing::Replace } else { Existing::Refuse }
}

pub(crate) fn export(args: &cli::BundleExport, session: &Session) -> Result<u8, Failure> {
    Manifest::read(&args.dir).map_err(Error::from)?;
    // Only a GGUF draft asks for its target; the rest would load one for nothing.
    let target = match (&args.target, args.format) {
        (None, ExportFormat::Gguf) => {
            let sources = target_sources(Some(DraftSource::Bundle(&args.dir)), None)?;
            Some(session.load_target(&sources, None, false, None)?)
        }
        (target, _) => target.as_ref().map(|reference| load(reference, session)).transpose()?,
    };
    let tokenizer = match (&target, args.format) {
        (Some(target), ExportFormat::Gguf) => gguf_tokenizer(&target.path).map_err(Error::from)?,
        _ => Vec::new(),
    };
    let input = ExportInput {
        bundle: &args.dir,
        layout: match args.format {
            ExportFormat::Sglang | ExportFormat::Specforge => Layout::Sglang,
            ExportFormat::Vllm => Layout::Vllm,
            ExportFormat::Speculators => Layout::Speculators,
            ExportFormat::Gguf => Layout::Gguf,
        },
        out: &args.out,
        existing: existing(args.replace),
        target: target
            .as_ref()
            .map(|target| TargetFacts { config: target.target.config(), tokenizer: &tokenizer }),
    };
    let exported = match args.format {
        ExportFormat::Specforge => draftsmith::bundle::export_specforge(input),
        _ => draftsmith::bundle::export(&input),
    }
    .map_err(Error::from)?;
    if args.json {
        let files: Vec<_> =
            exported.files.iter().map(|(path, bytes)| json!({ "path": path, "bytes": bytes })).collect();
        printer::json(&json!({
            "path": exported.path,
            "files": files,
            "warnings": exported.warnings,
            "launch": exported.launch,
        }))?;
        return Ok(0);
    }
    let mut text = format!("{}\n", exported.path.display());
    for (path, bytes) in &exported.files {
        text.push_str(&format!("  {path}  {bytes} bytes\n"));
    }
    text.push_str(&warnings(&exported.warnings));
    for line in &exported.launch {
        text.push_str(&format!("\n# {}\n{}\n", line.engine, line.command));
    }
    printer::out(&text)?;
    Ok(0)
}

fn warnings(problems: &[Problem]) -> String {
    let mut text = String::new();
    for problem in problems {
        text.push_str(&format!("warning: {problem}\n"));
        if let Some(hint) = problem.hint() {
            text.push_str(&format!("  hint: {hint}\n"));
        }
    }
    text
}

pub(crate) fn verify_export(args: &cli::BundleVerifyExport) -> Result<u8, Failure> {
    let kernels = Host::new(default_threads());
    let report = draftsmith::bundle::verify_export(&args.dir, &args.bundle, &kernels).map_err(Error::from)?;
    tell(&report, args.json)
}

/// The layers of `--layers`; how many a draft reads is known when it was read.
fn layers(written: &[String]) -> Result<Vec<u32>, Failure> {
    let refused = |message: String| {
        let hint = "give the layers low, mid, high, counted from 0: `--layers 1,14,26`";
        Failure::input(message, Some(hint.into()))
    };
    let layers: Result<Vec<u32>, Failure> = written
        .iter()
        .map(|text| {
            text.trim().parse().map_err(|_| {
                refused(format!("`--layers` has `{text}`, expected whole numbers counted from 0"))
            })
        })
        .collect();
    let layers = layers?;
    match layers.windows(2).all(|pair| pair[0] < pair[1]) {
        true => Ok(layers),
        false => {
            Err(refused(format!("`--layers` is {layers:?}, expected different layers in ascending order")))
        }
    }
}

pub(crate) fn import(args: &cli::BundleImport, session: &Session) -> Result<u8, Failure> {
    let places = &session.places;
    let pulled = locate(std::slice::from_ref(&args.draft), None, places, &session.printer, &session.stop)?;
    // The command line decides before the draft's own word is read: it may be wrong.
    let layers = args.layers.as_ref().map(|written| layers(written)).transpose()?;
    // What cannot be read is told before the target is fetched.
    let draft = draftsmith::bundle::import_with(&pulled.path, layers.as_deref()).map_err(Error::from)?;
    let target = load(&args.target, session)?;
    let made = import_draft(
        &draft,
        &target,
        &ImportOptions {
            reference: &args.draft,
            out: &args.out,
            existing: existing(args.replace),
            name: args.name.as_deref(),
            license: &args.license,
            base_model: args.base_model.as_deref(),
        },
    )?;
    let mut rounded = draft.rounded();
    rounded.sort_unstable();
    if let Some(first) = rounded.first() {
        session.printer.note(&format!(
            "{} of {} tensors are rounded to bf16, among them `{first}`",
            rounded.len(),
            draft.tensors.len()
        ));
    }
    if args.json {
        printer::json(&json!({
            "path": made.path,
            "layout": draft.layout.name(),
            "rounded_to_bf16": rounded,
            "bytes": made.bytes,
            "warnings": made.warnings,
        }))?;
        return Ok(0);
    }
    let shape = draft.config.shape();
    printer::out(&format!(
        "{}\n  {} layout, {} tensors, {} of {} token ids, layers {:?}\n{}",
        made.path.display(),
        draft.layout.name(),
        draft.tensors.len(),
        shape.draft_vocab_size,
        shape.vocab_size,
        made.manifest.draft.target_layer_ids,
        warnings(&made.warnings)
    ))?;
    Ok(0)
}

pub(crate) fn card(args: &cli::BundleCard, session: &Session) -> Result<u8, Failure> {
    session.shelf().check_own(&args.dir)?;
    let made = rewrite_card(&args.dir, &args.record, args.base_model.as_deref())?;
    let recommended = &made.manifest.recommended;
    if args.json {
        printer::json(&json!({ "path": made.path, "recommended": recommended }))?;
        return Ok(0);
    }
    printer::out(&format!(
        "{}\n  {}: depth {}, top-k {}, {} draft tokens ({})\n",
        made.path.display(),
        match recommended.pays {
            true => "recommended",
            false => "nothing is recommended: decode without the draft here; nearest came",
        },
        recommended.depth,
        recommended.top_k,
        recommended.num_draft_tokens,
        recommended.because
    ))?;
    Ok(0)
}

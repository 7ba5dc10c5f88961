//! `draftsmith doctor --draft`.

use std::fmt::Write;
use std::path::Path;
use std::slice::from_ref;
use std::sync::Arc;

use draftsmith::Error;
use draftsmith::bench::Workload;
use draftsmith::bundle::has_manifest;
use draftsmith::catalogue::catalogued;
use draftsmith::cli;
use draftsmith::device::Backend;
use draftsmith::doctor::draft::{DraftReport, Patient, Suspicion};
use draftsmith::doctor::score::Measure;
use draftsmith::doctor::texts::{Texts, built_in_prompts};
use draftsmith::engine::{bundle_place, locate};
use draftsmith::measure::first_prompt;

use super::{DraftSource, OnDevice, Session, target_sources};
use crate::failure::{Failure, NOT_HELD};
use crate::printer;

pub(crate) fn run(args: &cli::Doctor, session: &Session) -> Result<u8, Failure> {
    session.work(args.device, args.threads, args)
}

impl OnDevice for cli::Doctor {
    fn on<K: Backend>(&self, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
        doctor(self, session, kernels)
    }
}

fn doctor<K: Backend>(args: &cli::Doctor, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
    let Some(draft) = &args.draft else { return Ok(0) };
    let (report, stop) = (&session.printer, &session.stop);
    let draft = &place(draft, session)?;
    let pulled = locate(from_ref(draft), None, &session.places, report, stop)?;
    // What cannot be read is told before the target is fetched.
    let patient = Patient::open(&pulled.path)?;
    let workload = args.workload.as_ref().map(|file| Workload::read(file, Some(args.limit as usize)));
    let workload = workload.transpose().map_err(Error::from)?;
    let sources = match &args.target {
        None if !has_manifest(&pulled.path) => {
            return Err(Failure::input(
                format!("draft `{draft}` does not say which target it drafts for"),
                Some("name the target with `--target REF`".to_string()),
            ));
        }
        target => target_sources(Some(DraftSource::Bundle(&pulled.path)), target.as_ref())?,
    };
    let target = session.load_target_on(kernels, &sources, None, false)?;
    let mut prompts = match &workload {
        Some(workload) => {
            workload.rows.iter().map(|row| first_prompt(&target.text, row)).collect::<Result<_, _>>()?
        }
        None => built_in_prompts(&target)?,
    };
    if !patient.can_be_asked() {
        prompts.clear();
    }
    let texts = Texts::read(&target, &prompts, args.max_new_tokens as usize, report, stop)?;
    let found = patient.examine(&target, &texts, report, stop)?;
    match args.json {
        true => printer::json(&found)?,
        false => printer::out(&page(&found, draft))?,
    }
    Ok(if found.is_well() { 0 } else { NOT_HELD })
}

/// A name of the catalogue and the folder of a run become the folder of a bundle; anything else may be a draft of any layout.
fn place(draft: &str, session: &Session) -> Result<String, Failure> {
    let path = Path::new(draft);
    Ok(match (path.exists(), catalogued(draft)) {
        (true, _) => bundle_place(path).display().to_string(),
        (false, Some(_)) => session.bundle(path)?.display().to_string(),
        (false, None) => draft.to_string(),
    })
}

fn rates(measure: &Measure) -> String {
    let rates: Vec<String> = measure.accept_rate_at.iter().map(|rate| format!("{rate:.2}")).collect();
    format!(
        "accept length {:.2} ({:.2} to {:.2}), by position {}",
        measure.accept_len,
        measure.accept_len_low,
        measure.accept_len_high,
        rates.join(" ")
    )
}

fn page(found: &DraftReport, name: &str) -> String {
    let mut page = String::new();
    // Writing to a String cannot fail.
    let mut row = |name: &str, value: String| {
        let _ = writeln!(page, "{name:<11} {value}");
    };
    let kind = match (found.kind, found.layout) {
        (Some(kind), Some(layout)) => format!(" ({kind}, {layout} layout)"),
        _ => String::new(),
    };
    row("draft", format!("{name}{kind}"));
    row("target", found.target.clone());
    if let Some(device) = &found.device {
        row("asked on", format!("{}: {}", device.name, device.card));
    }
    if let Some(own) = &found.own {
        row("as it is", rates(own));
    }
    if let Some(corrected) =
        found.corrected.as_ref().filter(|corrected| found.own.as_ref() != Some(corrected))
    {
        row("corrected", rates(corrected));
    }
    let positions = found.own.as_ref().or(found.corrected.as_ref()).map_or(0, |m| m.positions);
    row("tried", format!("{} other settings, at {positions} positions", found.tried.len()));
    for Suspicion { id, what, key, found, write, before, after, as_good } in &found.suspicions {
        let _ = writeln!(page, "\nsuspicion: {what} [{id}]");
        let now = found.as_ref().map(|found| format!(", now {found}")).unwrap_or_default();
        let _ = writeln!(page, "  about    {key}{now}");
        let _ = writeln!(page, "  write    {write}");
        if let Some(before) = before {
            let _ = writeln!(page, "  before   {}", rates(before));
        }
        if let Some(after) = after {
            let _ = writeln!(page, "  after    {}", rates(after));
        }
        for other in as_good {
            let _ = writeln!(page, "  as good  {other}");
        }
    }
    page.push('\n');
    for note in &found.notes {
        let _ = writeln!(page, "note: {note}");
    }
    if found.is_well() {
        page += "Nothing about this draft is suspected.\n";
    }
    page
}

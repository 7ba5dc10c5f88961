//! `draftsmith doctor serve-gap`.

use std::fmt::Write;
use std::sync::Arc;

use draftsmith::Error;
use draftsmith::bench::Workload;
use draftsmith::capture::{RegenerateError, knock};
use draftsmith::cli;
use draftsmith::device::Host;
use draftsmith::engine::default_threads;
use draftsmith::formats::run::ServerTable;
use draftsmith::serve_gap::{Accepted, Gap, Replay, replay};
use draftsmith::server::server_key;
use draftsmith::text::Message;
use serde_json::{Value, json};

use super::{DraftSource, Session, target_and_draft, variable};
use crate::failure::{Failure, NOT_HELD};
use crate::printer;

pub(crate) fn run(args: &cli::ServeGap, session: &Session) -> Result<u8, Failure> {
    let server = server(args)?;
    let key = server_key(&args.url, server.key_env.as_deref(), &session.places, variable)?;
    // A dead address is told before a model is loaded.
    knock(&args.url, key.as_deref(), server.timeout_s)
        .map_err(|error| Error::from(RegenerateError::Server(error)))?;
    let workload = Workload::read(&args.workload, Some(args.limit as usize)).map_err(Error::from)?;
    let prompts: Vec<(String, Vec<Message>)> = workload
        .rows
        .iter()
        .filter_map(|row| Some((row.id.clone(), vec![Message::new("user", row.turns.first()?.as_str())])))
        .collect();
    let (target, draft) = match (&args.bundle, &args.target) {
        (Some(bundle), target) => {
            let threads = args.threads.map_or_else(default_threads, |t| t as usize);
            let kernels = Arc::new(Host::new(threads));
            let (target, draft) =
                target_and_draft(&kernels, DraftSource::Bundle(bundle), target.as_ref(), session)?;
            (target, Some(draft))
        }
        // Clap made sure that one of them is there.
        (None, target) => (session.load_target(target.as_slice(), None, false, args.threads)?, None),
    };
    let gap = replay(
        &Replay {
            target: &target,
            draft: draft.as_ref(),
            server: &server,
            key,
            prompts: &prompts,
            max_new_tokens: args.max_new_tokens as usize,
            depth: args.depth as usize,
        },
        &session.printer,
        &session.stop,
    )?;
    let findings = gap.findings();
    if args.json {
        let mut value = serde_json::to_value(&gap).expect("a gap holds only what JSON can say");
        value["findings"] = json!(findings);
        printer::json(&value)?;
    } else {
        printer::out(&page(&gap))?;
    }
    Ok(if findings.is_empty() { 0 } else { NOT_HELD })
}

fn server(args: &cli::ServeGap) -> Result<ServerTable, Failure> {
    let extra: Value = match &args.extra {
        None => json!({}),
        Some(text) => serde_json::from_str(text).map_err(|e| no_object(&e))?,
    };
    let table = json!({
        "url": args.url, "api": args.api, "model": args.model, "key_env": args.key_env, "extra": extra,
    });
    let server: ServerTable = serde_json::from_value(table).map_err(|e| no_object(&e))?;
    match server.problem() {
        Some((key, problem)) => {
            let advice = match key.as_str() {
                "url" => {
                    "give the address up to and including the version, `http://127.0.0.1:8000/v1`".to_string()
                }
                key => format!("correct or leave out `{key}`"),
            };
            Err(Failure::input(format!("`{key}` {problem}"), Some(advice)))
        }
        None => Ok(server),
    }
}

fn no_object(error: &serde_json::Error) -> Failure {
    Failure::input(
        format!("`--extra` is no JSON object: {error}"),
        Some("quote it for the shell, for example `--extra '{\"repetition_penalty\": 1.0}'`".to_string()),
    )
}

fn page(gap: &Gap) -> String {
    let mut page = String::new();
    // Writing to a String cannot fail.
    if gap.prompt.is_none() {
        let rounding = gap.differences.iter().filter(|d| d.is_rounding()).count();
        let _ = writeln!(
            page,
            "same text       {} of {} answers; {rounding} part within rounding, {} beyond it",
            gap.same,
            gap.rows,
            gap.differences.len() - rounding
        );
        let side = |name: &str, side: &Option<Accepted>| match side {
            None => format!("{name:<15} not known\n"),
            Some(side) => {
                let rates: Vec<String> = side.rate_at.iter().map(|r| format!("{r:.3}")).collect();
                let accept_len = side.accept_len.map_or("none".to_string(), |l| format!("{l:.3}"));
                format!(
                    "{name:<15} accept length {accept_len}, {} proposals, by position {}\n",
                    side.proposals,
                    rates.join(" ")
                )
            }
        };
        page += &side("drafts here", &gap.ours);
        page += &side("drafts there", &gap.theirs);
    }
    for finding in gap.findings() {
        let _ = writeln!(page, "gap: {}\n  hint: {}", finding.what, finding.hint);
    }
    if gap.findings().is_empty() {
        page += "No gap was found.\n";
    }
    page
}

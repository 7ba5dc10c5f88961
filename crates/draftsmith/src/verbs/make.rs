//! `draftsmith init` and `draftsmith make`.

use std::path::{Path, PathBuf};

use draftsmith::formats::atomic;
use draftsmith::report::Report;
use draftsmith::run::plan::Plan;
use draftsmith::run::{InitOptions, init as write_init, run_name};
use draftsmith::{Error, cli};
use serde_json::json;

use super::stages::{advance_on, plan, plan_of, plan_text};
use super::{Session, find_shipped};
use crate::failure::Failure;
use crate::printer;

/// Something of the prompts that ship, to find them by.
const SHIPPED: &str = "recipes/data/prompts-general.jsonl.zst";

/// Where the run file goes, and the command that it is made by.
fn place(args: &cli::Making) -> (PathBuf, String, String) {
    let name = args.name.clone().unwrap_or_else(|| run_name(&args.target));
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from(format!("{name}.toml")));
    let mut command = format!("draftsmith init {}", args.target);
    for file in &args.data {
        command.push_str(&format!(" --data {}", file.display()));
    }
    if let Some(from) = &args.from {
        command.push_str(&format!(" --from {from}"));
    }
    command.push_str(&format!(" --hours {}", args.hours));
    if let Some(name) = &args.name {
        command.push_str(&format!(" --name {name}"));
    }
    if let Some(out) = &args.out {
        command.push_str(&format!(" --out {}", out.display()));
    }
    (out, name, command.replace('\n', " "))
}

/// Writes the run file.
fn write(args: &cli::Making, session: &Session) -> Result<PathBuf, Failure> {
    let (out, name, command) = place(args);
    let env = session.env();
    let shipped = find_shipped(SHIPPED).and_then(|file| file.parent().map(Path::to_path_buf));
    let options = InitOptions {
        target: &args.target,
        data: &args.data,
        from: args.from.as_deref(),
        hours: args.hours,
        out: &out,
        name: &name,
        shipped: shipped.as_deref(),
        command: &command,
    };
    let made = write_init(&options, env)?;
    atomic::write(&out, &made.text).map_err(Error::from)?;
    session.printer.note(&format!("written: `{}`", out.display()));
    made.notes.iter().for_each(|note| session.printer.note(&format!("warning: {note}")));
    Ok(out)
}

/// Refuses to write over a run file.
fn refuse(out: &Path, why: &str) -> Failure {
    Failure::input(
        format!("`{}` is there already{why}", out.display()),
        Some("name another file with `--out` (and `--name`), or write it anew with `--replace`".to_string()),
    )
}

pub(crate) fn init(args: &cli::Making, session: &Session) -> Result<u8, Failure> {
    let (out, ..) = place(args);
    if out.exists() && !args.replace {
        return Err(refuse(&out, ""));
    }
    let out = write(args, session)?;
    match args.json {
        true => printer::json(&json!({ "run_file": out }))?,
        false => printer::out(&format!(
            "run file    {0}\nnext        draftsmith run {0} --plan\n            draftsmith run {0}\n",
            out.display()
        ))?,
    }
    Ok(0)
}

pub(crate) fn make(args: &cli::Make, session: &Session) -> Result<u8, Failure> {
    let making = &args.making;
    let (out, _, command) = place(making);
    let there = std::fs::read_to_string(&out).ok().filter(|_| !making.replace);
    match there {
        // The same command goes on with what it wrote, whatever was changed in it since.
        Some(text) if text.lines().next().is_some_and(|first| first == format!("# {command}")) => {
            session.printer.note(&format!("`{}` is there: it goes on", out.display()));
        }
        Some(_) => return Err(refuse(&out, ", and another command made it")),
        None if out.exists() && !making.replace => return Err(refuse(&out, "")),
        None => drop(write(making, session)?),
    }
    let run = cli::RunArgs { run_file: out, overrides: Vec::new(), json: making.json };
    if args.plan {
        return plan("run", &run, session);
    }
    let bill = plan_of("run", &run, session)?;
    // The size of the draft is said when the run begins.
    plan_text(&Plan { draft: None, ..bill.clone() }).lines().for_each(|line| session.printer.note(line));
    session.printer.note("it begins; stopped at any moment, the same command goes on");
    advance_on(&bill, &run, session)
}

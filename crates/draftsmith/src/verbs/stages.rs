//! The verbs that work on a run: one stage, or all of them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use draftsmith::cli;
use draftsmith::disk::human;
use draftsmith::formats::run::{RunFile, Stage};
use draftsmith::run::among::{Among, RanksPlan};
use draftsmith::run::plan::{Plan, StagePlan};
use draftsmith::run::planned::{Held, HeldStage};
use draftsmith::run::{Env, Origin, Run, StageDone, Told};
use serde_json::{Value, json};

use super::Session;
use crate::failure::{Failure, NOT_HELD};
use crate::printer::{self, duration};

fn open<'a>(verb: &str, args: &cli::RunArgs, session: &'a Session) -> Result<Run<'a>, Failure> {
    let (file, faults, origin, env) = prepare(verb, args, session)?;
    Ok(Run::open_on(file, faults, origin, env)?)
}

fn look<'a>(verb: &str, args: &cli::RunArgs, session: &'a Session) -> Result<Run<'a>, Failure> {
    let (file, faults, origin, env) = prepare(verb, args, session)?;
    Ok(Run::look_on(file, faults, origin, env)?)
}

fn prepare<'a>(
    verb: &str,
    args: &cli::RunArgs,
    session: &'a Session,
) -> Result<(RunFile, Vec<Told>, Origin, Env<'a>), Failure> {
    let loaded = draftsmith::run::load_all(&args.run_file, &args.overrides);
    let (file, faults) = session.ranks.agree(loaded, |_| BTreeMap::new())?;
    let origin =
        Origin { verb: verb.to_string(), path: args.run_file.clone(), overrides: args.overrides.clone() };
    Ok((file, faults, origin, session.env()))
}

/// The bill of all stages.
pub(crate) fn plan(verb: &str, args: &cli::RunArgs, session: &Session) -> Result<u8, Failure> {
    print_plan(&plan_of(verb, args, session)?, args.json)
}

/// The bill of all stages, for as many processes as were asked for.
pub(crate) fn plan_run(args: &cli::Run, session: &Session) -> Result<u8, Failure> {
    let among = args.ranks.map_or(Among::ALONE, |ranks| Among::new(ranks, args.link_gbit));
    print_plan(&look("run", &args.run, session)?.plan_among(&among)?, args.run.json)
}

fn print_plan(plan: &Plan, json: bool) -> Result<u8, Failure> {
    match json {
        true => printer::json(plan)?,
        false => printer::out(&plan_text(plan))?,
    }
    Ok(0)
}

/// The bill, looked at and not printed.
pub(crate) fn plan_of(verb: &str, args: &cli::RunArgs, session: &Session) -> Result<Plan, Failure> {
    Ok(look(verb, args, session)?.plan()?)
}

/// The bill as a table.
pub(crate) fn plan_text(plan: &Plan) -> String {
    let number = |n: Option<u64>| n.map_or_else(|| "–".to_string(), |n| n.to_string());
    let time =
        |s: Option<f64>| s.map_or_else(|| "?".to_string(), |s| duration(Duration::from_secs_f64(s.max(0.0))));
    let bytes = |n: Option<u64>| n.map_or_else(|| "–".to_string(), human);
    let mut page = format!(
        "{:<11} {:>7} {:>9} {:>6} {:>7} {:>10} {:>10}  \n",
        "", "rows", "tokens", "steps", "time", "disk", "memory"
    );
    for stage in &plan.stages {
        let _ = writeln!(
            page,
            "{:<11} {:>7} {:>9} {:>6} {:>7} {:>10} {:>10}  {}",
            stage.stage.name(),
            number(stage.rows),
            number(stage.tokens),
            number(stage.steps),
            time(stage.seconds),
            bytes(Some(stage.disk_bytes)),
            bytes(stage.memory_bytes),
            stage.how
        );
    }
    let free = plan.free_bytes.map_or_else(String::new, |free| format!(", {} are free", human(free)));
    let _ = writeln!(
        page,
        "{:<11} {:>7} {:>9} {:>6} {:>7} {:>10} {:>10}  of the disk {} may go when the run is over{free}",
        "all",
        "",
        "",
        "",
        time(Some(plan.seconds)),
        bytes(Some(plan.disk_bytes)),
        bytes(plan.memory_bytes),
        human(plan.freed_bytes)
    );
    if let Some(draft) = &plan.draft {
        let _ = writeln!(page, "draft       {draft}");
    }
    if let Some(ranks) = &plan.ranks {
        page.push_str(&ranks_text(ranks, &plan.stages));
    }
    let _ = writeln!(page, "rates       {}", plan.measured);
    if plan.free_bytes.is_some_and(|free| free < plan.disk_bytes) {
        let _ = writeln!(
            page,
            "warning     the disk has too little room: `capture.mode=online` needs none for states"
        );
    }
    for warning in &plan.warnings {
        let _ = writeln!(page, "warning     {}", warning.line());
    }
    page
}

/// What several processes change about a bill.
fn ranks_text(ranks: &RanksPlan, stages: &[StagePlan]) -> String {
    let time = |s: f64| duration(Duration::from_secs_f64(s.max(0.0)));
    let mut page = format!(
        "ranks       {}: one process takes {}; {} of this stay however many there are\n",
        ranks.ranks,
        time(ranks.alone_seconds),
        time(ranks.fixed_seconds)
    );
    let fixed = |stage: &StagePlan| {
        let fixed = stage.fixed_seconds.filter(|fixed| *fixed > 0.0)?;
        Some(format!("{} {}", stage.stage.name(), time(fixed)))
    };
    let fixed: Vec<String> = stages.iter().filter_map(fixed).collect();
    let _ = writeln!(page, "ranks       of that {}", fixed.join(", "));
    if ranks.sent_bytes_a_step > 0 {
        let all: u64 = stages.iter().filter_map(|stage| stage.sent_bytes).sum();
        let _ = writeln!(
            page,
            "ranks       a rank sends {} in each step of {} micro-batches, {} in all",
            human(ranks.sent_bytes_a_step),
            ranks.micro_batches,
            human(all)
        );
    }
    if let Some(bytes) = ranks.one_machine_memory_bytes {
        let _ = writeln!(
            page,
            "ranks       memory is that of each rank; all of them on one machine need {}",
            human(bytes)
        );
    }
    for note in &ranks.notes {
        let _ = writeln!(page, "ranks       {note}");
    }
    page
}

/// Does all stages, and keeps the bill that was made of them.
pub(crate) fn advance_on(bill: &Plan, args: &cli::RunArgs, session: &Session) -> Result<u8, Failure> {
    let run = open("run", args, session)?;
    if session.ranks.is_first() {
        run.keep(bill)?;
    }
    work(&run, args, None, session)
}

/// Does everything up to `last`; `None`: all stages.
pub(crate) fn advance(
    verb: &str,
    args: &cli::RunArgs,
    last: Option<Stage>,
    session: &Session,
) -> Result<u8, Failure> {
    let run = open(verb, args, session)?;
    if let Some(last) = last.filter(|last| !run.stages().contains(last)) {
        return Err(Failure::input(
            format!("run file `{}` has no stage `{}`", args.run_file.display(), last.name()),
            Some(
                match last {
                    Stage::Regenerate => "set `regenerate.enabled=true`",
                    Stage::Capture => "set `capture.mode=cache`; `online` captures while it trains",
                    Stage::Data | Stage::Train | Stage::Bundle | Stage::Bench => "name `bench.workloads`",
                }
                .to_string(),
            ),
        ));
    }
    work(&run, args, last, session)
}

fn work(run: &Run<'_>, args: &cli::RunArgs, last: Option<Stage>, session: &Session) -> Result<u8, Failure> {
    let done = run.advance(last.unwrap_or(Stage::Bench))?;
    if !session.ranks.is_first() {
        return Ok(0);
    }
    let root = run.folder().root();
    let verdict = match last {
        None => Some(run.verdict(&done)?),
        Some(_) => None,
    };
    let held = match last {
        None => run.held(&done)?,
        Some(_) => None,
    };
    if args.json {
        let mut value = json!({ "run": root, "stages": done });
        if let Some(verdict) = &verdict {
            value["verdict"] = verdict.clone();
        }
        if let Some(held) = &held {
            value["planned"] = json!(held);
        }
        printer::json(&value)?;
    } else {
        let mut page = String::new();
        for stage in &done {
            let _ = writeln!(page, "{:<11} {}", stage.stage.name(), line(stage));
        }
        let _ = writeln!(page, "{:<11} {}", "run", root.display());
        if let Some(held) = &held {
            page.push_str(&held_text(held));
        }
        if let Some(verdict) = &verdict {
            page.push_str(&draftsmith::run::verdict::text_of(verdict));
        }
        printer::out(&page)?;
    }
    let identical = done
        .iter()
        .filter(|d| d.stage == Stage::Bench)
        .all(|d| d.file.summary["results"]["identical"].as_bool().unwrap_or(true));
    Ok(if identical { 0 } else { NOT_HELD })
}

/// What a run took, and was planned to take.
fn held_text(held: &Held) -> String {
    let time = |s: f64| duration(Duration::from_secs_f64(s.max(0.0)));
    let of = |stage: &HeldStage| {
        let planned = stage.planned_seconds.filter(|planned| planned.max(stage.seconds) >= 1.0)?;
        Some(format!("{} {} of {}", stage.stage.name(), time(stage.seconds), time(planned)))
    };
    let stages: Vec<String> = held.stages.iter().filter_map(of).collect();
    let stages = if stages.is_empty() { String::new() } else { format!(": {}", stages.join(", ")) };
    let memory = match (held.memory_bytes, held.planned_memory_bytes) {
        (Some(bytes), Some(planned)) => format!(", {} of {} of memory", human(bytes), human(planned)),
        _ => String::new(),
    };
    format!(
        "{:<11} {} of {} that were planned{stages}\n{:<11} {} of {} of disk{memory}\n",
        "took",
        time(held.seconds),
        time(held.planned_seconds),
        "",
        human(held.disk_bytes),
        human(held.planned_disk_bytes)
    )
}

/// What came out of a stage, in words.
fn line(done: &StageDone) -> String {
    let s = &done.file.summary;
    let count = |key: &str| s[key].as_u64().unwrap_or(0);
    let what = match done.stage {
        Stage::Data => format!("{} rows, {} held out", count("rows"), count("validation_rows")),
        Stage::Regenerate => format!(
            "{} conversations, {} tokens generated, {} trained",
            count("dialogues"),
            count("generated_tokens"),
            count("trained_tokens")
        ),
        Stage::Capture => format!("{} tokens, {}", count("tokens"), human(count("bytes"))),
        Stage::Train => match s["accept_len"].as_f64() {
            Some(accept_len) => {
                let draft = match s["draft_mean_of"].as_array().map_or(0, Vec::len) {
                    0 => format!("at step {}", count("draft_step")),
                    drafts => format!("of the mean of the best {drafts} drafts"),
                };
                format!("{} steps, best accept length {accept_len:.2} {draft}", count("steps"))
            }
            None => format!("{} steps", count("steps")),
        },
        Stage::Bundle => format!("{}, {}", text(&s["path"]), human(count("bytes"))),
        Stage::Bench => {
            let r = &s["results"];
            let numbers = |r: &Value| {
                let number = |key: &str| r[key].as_f64().map_or("none".to_string(), |v| format!("{v:.2}"));
                format!("accept length {}, speedup {}", number("accept_len"), number("speedup"))
            };
            let of_plan = |plan: &Value| format!("{}: {}", text(&plan["drafting"]), numbers(plan));
            let measured = match s["plans"].as_array() {
                Some(plans) => plans.iter().map(of_plan).collect::<Vec<_>>().join("; "),
                None => numbers(r),
            };
            let same = match r["identical"].as_bool() {
                Some(true) => "outputs equal to target-only decoding",
                Some(false) => "outputs DIFFER from target-only decoding",
                None => "nothing compared",
            };
            format!("{measured}, {same}; {}", text(&s["report"]))
        }
    };
    let when = if done.before { "done before, " } else { "" };
    format!("{what} ({when}{})", duration(Duration::from_secs_f64(done.file.seconds.max(0.0))))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

pub(crate) fn capture(args: &cli::Capture, session: &Session) -> Result<u8, Failure> {
    if !args.plan {
        return advance("capture", &args.run, Some(Stage::Capture), session);
    }
    let bill = look("capture", &args.run, session)?.plan_capture()?;
    if args.run.json {
        printer::json(&bill)?;
    } else {
        let free = bill.free_bytes.map_or("unknown".to_string(), human);
        let estimate = |text: &str| format!("estimated from {text}\n");
        let from = bill.estimated_from.as_deref().map(estimate).unwrap_or_default();
        let about = if from.is_empty() { "" } else { "about " };
        let kept = match bill.kept_tokens {
            0 => String::new(),
            kept if from.is_empty() => format!("of the tokens   {kept} have their states already\n"),
            kept => format!("of the tokens   about {kept} have their states kept when they are answered\n"),
        };
        printer::out(&format!(
            "rows            {about}{}\ntokens          {about}{}\ntrained tokens  {about}{}\nbytes           about {} ({free} free)\n\
             minutes         about {:.1} at {:.0} tokens/s\n{kept}{from}",
            bill.rows,
            bill.tokens,
            bill.trained_tokens,
            human(bill.bytes),
            bill.minutes,
            bill.tokens_per_s
        ))?;
    }
    Ok(0)
}

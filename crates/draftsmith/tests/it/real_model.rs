//! The real target. The shipped draft on it: text with speculation equals text without, for chains of depth 1 to 7, a
//! tree and the automatic plan, greedy and seeded.
//!
//! And rows of its answers under the templates of reasoning models: trained tokens are the generated ones.
//!
//! Needs the model file (`DRAFTSMITH_TEST_TARGET`, see the README). CI compares a few prompts;
//! `DRAFTSMITH_PROVE_PROMPTS=100` compares a hundred of the public evaluation prompts in the repo.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use draftsmith::capture::{AnswerMark, Dialogue, EngineGenerator, Prompter, SamplingMix, regenerate};
use draftsmith::doctor::draft::Patient;
use draftsmith::doctor::score::Measure;
use draftsmith::doctor::texts::{Texts, built_in_prompts};
use draftsmith::engine::{LoadedTarget, TargetOptions};
use draftsmith::measure::prompt_ids;
use draftsmith::pull::Places;
use draftsmith::report::{Silent, Stop};
use draftsmith::target::TargetText;
use draftsmith_core::{AcceptStats, Sampling};
use draftsmith_data::read_workload;
use draftsmith_decode::{DraftPlan, Engine, GenerateOptions, drafter};
use draftsmith_kernels::{Cpu, PackMode};
use draftsmith_model::{Draft, Precision, Target};
use draftsmith_text::{Message, RenderOptions};
use serde_json::{Value, json};

const MAX_NEW_TOKENS: usize = 48;

fn model() -> PathBuf {
    PathBuf::from(std::env::var_os("DRAFTSMITH_TEST_TARGET").expect(
        "set DRAFTSMITH_TEST_TARGET to SmolLM2-135M-Instruct.Q4_1.gguf (`draftsmith pull` prints its path)",
    ))
}

fn repo(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

#[test]
#[expect(clippy::print_stdout, reason = "the accept lengths are worth reading beside the verdict")]
fn real_model_speculation_gives_the_same_text() {
    let model = model();
    let wanted: usize = std::env::var("DRAFTSMITH_PROVE_PROMPTS").map_or(6, |n| n.parse().expect("a number"));
    let text = TargetText::open(&model, None).unwrap();
    let target = Arc::new(Target::load(Arc::new(Cpu::new(2)), &model, Precision::Stored).unwrap());
    let bundle = repo("bundles/smollm2-135m-instruct-eagle3");
    let draft = Draft::load(target.kernels().as_ref(), &bundle, PackMode::Q8).unwrap();
    let drafter = drafter(&target, draft).unwrap();
    let engine = Engine::new(Arc::clone(&target), Some(drafter));

    let (math, chat) = (repo("recipes/data/eval/gsm8k.jsonl"), repo("recipes/data/eval/mtbench.jsonl"));
    let rows = |path: &PathBuf, count| read_workload(path, Some(count)).unwrap();
    let chat_rows = rows(&chat, (wanted / 2).min(40));
    let math_rows = rows(&math, wanted - chat_rows.len());
    let prompts: Vec<(String, Vec<u32>)> = chat_rows
        .iter()
        .chain(&math_rows)
        .map(|row| {
            let ids = prompt_ids(&text, &[Message::new("user", row.turns[0].as_str())]).unwrap();
            (row.id.clone(), ids)
        })
        .collect();
    assert_eq!(prompts.len(), wanted);

    let mut plans: Vec<DraftPlan> = (1..=7).map(|depth| DraftPlan::Chain { depth }).collect();
    plans.push(DraftPlan::Tree { depth: 5, top_k: 3, num_draft_tokens: 12 });
    plans.push(DraftPlan::Auto);
    let seeded = Sampling { temperature: 0.8, top_p: 0.95, seed: 7, ..Sampling::GREEDY };
    for sampling in [Sampling::GREEDY, seeded] {
        let mut stats: Vec<AcceptStats> = vec![AcceptStats::default(); plans.len()];
        for (id, prompt) in &prompts {
            let run = |draft| {
                let options = GenerateOptions {
                    max_new_tokens: MAX_NEW_TOKENS,
                    sampling,
                    stop_ids: text.tokenizer.eos_ids().to_vec(),
                    draft,
                    ..GenerateOptions::default()
                };
                engine.generate(prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap()
            };
            let plain = run(DraftPlan::None);
            for (plan, stats) in plans.iter().zip(&mut stats) {
                let found = run(*plan);
                assert_eq!(found.token_ids, plain.token_ids, "{id}, {plan:?}, {sampling:?}");
                stats.add(&found.stats);
            }
        }
        for (plan, stats) in plans.iter().zip(&stats) {
            println!(
                "{wanted} prompts, {plan:?}, temperature {}: identical, accept length {:.3}",
                sampling.temperature,
                stats.accept_len().unwrap_or(f64::NAN)
            );
        }
    }
}

#[test]
#[expect(clippy::print_stdout, reason = "the table is worth reading beside the verdict")]
fn real_model_rows_of_reasoning_hold_every_generated_token() {
    let model = model();
    for name in ["opens_and_shows", "opens_and_strips"] {
        let template = repo(&format!("fixtures/thinking/{name}.jinja"));
        let text = TargetText::open(&model, Some(&template)).unwrap();
        let target = Arc::new(Target::load(Arc::new(Cpu::new(2)), &model, Precision::Stored).unwrap());
        let engine = Engine::new(target, None);
        let prompter = Prompter {
            tokenizer: &text.tokenizer,
            template: text.template().unwrap(),
            max_new_tokens: 48,
            max_context: 2048,
        };
        let rows = read_workload(&repo("recipes/data/eval/mtbench.jsonl"), Some(20)).unwrap();
        let mut dialogues = rows.iter().map(|row| Dialogue {
            id: row.id.clone(),
            domain: String::new(),
            turns: row.turns.iter().map(|turn| Message::new("user", turn.as_str())).collect(),
            render: RenderOptions::default(),
        });
        let mix = SamplingMix { temperature: 0.8, top_p: 0.95, seed: 1, greedy_share: 0.5 };
        let mut generator =
            EngineGenerator { engine: &engine, prompter: prompter.clone(), batch_size: 16, keep: None };
        let (mut dialogue_count, mut generated, mut trained, mut cut, mut empty) = (0, 0, 0, 0, 0);
        let progress = regenerate(&mut dialogues, &mut generator, mix, &mut |done, _| {
            for row in &done.rows {
                assert!(row.is_sound());
                for span in &row.answers {
                    let asked =
                        prompter.text(&done.messages[..span.message], &RenderOptions::default()).unwrap();
                    let asked = text.tokenizer.encode(&asked, false).unwrap();
                    assert_eq!(row.ids[..span.start], asked, "{name}, {}", done.id);
                }
                trained += row.loss_mask().iter().filter(|m| **m).count();
            }
            dialogue_count += 1;
            generated += done.generated_tokens;
            cut += usize::from(done.cut);
            empty += usize::from(done.mark == Some(AnswerMark::Empty));
            ControlFlow::Continue(())
        })
        .unwrap();
        println!(
            "{name}: {dialogue_count} dialogues, generated {generated}, trained {trained}, cut {cut}, empty {empty}"
        );
        assert_eq!((dialogue_count, progress.tokens), (20, generated as u64));
        assert_eq!(generated, trained, "{name}");
        assert!(cut > 0, "some answers end inside their reasoning");
    }
}

/// The shipped draft has nothing wrong with it, and a number changed in its folder is named, each within a minute.
#[test]
#[expect(clippy::print_stdout, reason = "the accept lengths and times are worth reading beside the verdict")]
fn real_model_doctor_names_what_is_wrong_with_a_draft() {
    let sources = [model().display().to_string()];
    let options = TargetOptions {
        sources: &sources,
        sha256: None,
        precision: Precision::Stored,
        threads: 2,
        template: None,
    };
    // Without a home packed weights would be kept in the current folder.
    let home = tempfile::tempdir().unwrap();
    let vars = |name: &str| (name == "HOME").then(|| home.path().display().to_string());
    let (places, stop) = (Places::from_vars(vars), Stop::default());
    let target = LoadedTarget::load(&options, &places, &Silent, &stop).unwrap();
    let prompts = built_in_prompts(&target).unwrap();
    let texts = Texts::read(&target, &prompts, 48, &Silent, &stop).unwrap();
    let bundle = repo("bundles/smollm2-135m-instruct-eagle3");
    let config: Value = serde_json::from_slice(&std::fs::read(bundle.join("config.json")).unwrap()).unwrap();
    let layers = |ids: [u32; 3]| {
        let mut config = config.clone();
        config["eagle_config"] = json!({ "eagle_aux_hidden_state_layer_ids": ids });
        config.as_object_mut().unwrap().remove("eagle_aux_hidden_state_layer_ids");
        config
    };
    let with = |key: &str, value: Value| {
        let mut config = config.clone();
        config[key] = value;
        config
    };
    for (config, wanted) in [
        (config.clone(), None),
        (layers([26, 14, 1]), Some("layers_out_of_order")),
        (with("norm_before_residual", json!(true)), Some("norm_before_residual")),
        (with("rope_theta", json!(10)), Some("rope_theta")),
    ] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(bundle.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let began = Instant::now();
        let found = Patient::open(dir.path()).unwrap().examine(&target, &texts, &Silent, &stop).unwrap();
        let ids: Vec<&str> = found.suspicions.iter().map(|s| s.id.as_str()).collect();
        let accept_len = |m: &Option<Measure>| m.as_ref().map(|m| m.accept_len);
        let (own, corrected) = (accept_len(&found.own), accept_len(&found.corrected));
        println!("{wanted:?}: {ids:?}, {own:?} -> {corrected:?}, {:.0?}", began.elapsed());
        assert_eq!(ids, wanted.into_iter().collect::<Vec<&str>>());
    }
}

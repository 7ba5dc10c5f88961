//! The two kinds of [`Generator`] side by side: the target in this process, and the same target behind a server.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use draftsmith::capture::{
    Alive, Asked, Dialogue, EngineGenerator, FinishedDialogue, Generator, InProcess, OpenAiGenerator,
    Outcome, Prompter, Request, SamplingMix, TokenRow, regenerate,
};
use draftsmith::core::{LayerId, Sampling};
use draftsmith::decode::{Engine, FinishReason, GenerateOptions};
use draftsmith::engine::{LoadedTarget, engine};
use draftsmith::formats::cache::{CacheSpec, RowEncoder};
use draftsmith::formats::run::{CaptureDtype, ServerTable};
use draftsmith::kernels::Cpu;
use draftsmith::text::{Message, RenderOptions};

use crate::fake_openai::{Fake, Fault, Ids, Protocol, Said};
use crate::support::{repository, tiny_target};

const MAX_NEW_TOKENS: usize = 24;
const MAX_CONTEXT: usize = 120;

fn prompter(target: &LoadedTarget) -> Prompter<'_> {
    Prompter {
        tokenizer: &target.text.tokenizer,
        template: target.text.template().unwrap(),
        max_new_tokens: MAX_NEW_TOKENS,
        max_context: MAX_CONTEXT,
    }
}

/// What the target says greedily, for a server to say it.
pub(crate) fn speaking(
    target: &Arc<LoadedTarget>,
    max_new_tokens: usize,
    max_context: usize,
) -> impl Fn(&str) -> Said + Send + Sync + 'static {
    let served: Mutex<(Engine<Cpu>, Arc<LoadedTarget>)> =
        Mutex::new((engine(target, None), Arc::clone(target)));
    move |prompt: &str| {
        let served = served.lock().unwrap();
        let (engine, target) = &*served;
        let tokenizer = &target.text.tokenizer;
        let ids = tokenizer.encode(prompt, false).unwrap();
        let options = GenerateOptions {
            max_new_tokens: max_new_tokens.min(max_context - ids.len()),
            stop_ids: target.stop_ids(),
            ..GenerateOptions::default()
        };
        let done = engine.generate(&ids, &options, &mut |_| ControlFlow::Continue(())).unwrap();
        let cut = done.finish_reason == FinishReason::Length;
        let body = &done.token_ids[..done.token_ids.len() - usize::from(!cut)];
        Said { text: tokenizer.decode(body, true), cut, ids: Some(done.token_ids) }
    }
}

/// Runs `check` with both kinds; the server fails now and then.
fn with_both(check: impl Fn(&str, &mut dyn Generator)) {
    let target = tiny_target();
    let (mine, batch_size) = (engine(&target, None), 4);
    let prompter_here = prompter(&target);
    let here = &mut EngineGenerator { engine: &mine, prompter: prompter_here, batch_size, keep: None };
    check("in process", here);

    let behind = Arc::new(target);
    let speak = speaking(&behind, MAX_NEW_TOKENS, MAX_CONTEXT);
    let protocol = Protocol { max_tokens: MAX_NEW_TOKENS as u64, ids: Ids::Given, ..Protocol::default() };
    let fake = Fake::start(protocol, speak, |nth| (nth % 5 == 2).then_some(Fault::Cut));
    let server: ServerTable =
        serde_json::from_value(serde_json::json!({ "url": fake.url() })).expect("an address is enough");
    let stop = AtomicBool::new(false);
    let mut remote = OpenAiGenerator {
        server: &server,
        key: None,
        prompter: prompter(&behind),
        batch_size,
        stop: &stop,
        note: &|_| {},
        asked: Asked::default(),
        asked_each: Vec::new(),
        alive: Alive::default(),
    };
    check("behind a server", &mut remote);
    fake.take_prompts();
}

fn dialogues(count: usize) -> Vec<Dialogue> {
    let text =
        std::fs::read_to_string(repository().join("fixtures/tiny-target/prompts-valid.jsonl")).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    rows.take(count)
        .enumerate()
        .map(|(i, row)| {
            let mut turns: Vec<Message> = serde_json::from_value(row["messages"].clone()).unwrap();
            // Every third has a second question; one of them fills the context.
            if i % 3 == 0 {
                turns.push(Message::new("user", "Calculate 2 + 3."));
            }
            if i == 6 {
                turns.push(Message::new("user", "and again ".repeat(60)));
            }
            if i == 7 {
                turns = vec![Message::new("user", "too long ".repeat(80))];
            }
            Dialogue {
                id: format!("row-{i}"),
                domain: "test".into(),
                turns,
                render: RenderOptions::default(),
            }
        })
        .collect()
}

const GREEDY: SamplingMix = SamplingMix { temperature: 0.0, top_p: 1.0, seed: 1, greedy_share: 1.0 };

#[test]
fn both_kinds_give_the_same_rows() {
    let rows: Mutex<BTreeMap<String, BTreeMap<String, FinishedDialogue>>> = Mutex::default();
    with_both(|kind, generator| {
        let mut done = BTreeMap::new();
        let progress = regenerate(&mut dialogues(20).into_iter(), generator, GREEDY, &mut |row, _| {
            assert!(done.insert(row.id.clone(), row).is_none());
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!((progress.dialogues, progress.unanswered), (20, 1), "{kind}");
        assert!(done["row-7"].messages.is_empty());
        let answers = |row: &FinishedDialogue| row.messages.iter().filter(|m| m.role == "assistant").count();
        assert!(done.values().any(|row| answers(row) == 2), "{kind}: a second turn was answered");
        rows.lock().unwrap().insert(kind.to_string(), done);
    });
    let rows = rows.into_inner().unwrap();
    assert_eq!(rows["in process"], rows["behind a server"]);
}

fn request(key: usize, text: &str) -> Request {
    Request {
        key,
        id: format!("request {key}"),
        messages: vec![Message::new("user", text)],
        render: RenderOptions::default(),
        sampling: Sampling::GREEDY,
        before: None,
    }
}

#[test]
fn a_break_is_the_last_thing_that_is_heard() {
    with_both(|kind, generator| {
        let (mut handed, mut heard) = (0, 0);
        generator
            .answer(
                &mut || {
                    handed += 1;
                    (handed <= 12).then(|| request(handed, &format!("Calculate {handed} + 4.")))
                },
                &mut |_, outcome: Outcome| {
                    assert!(matches!(outcome, Outcome::Answered(_)));
                    heard += 1;
                    if heard == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                },
            )
            .unwrap();
        assert_eq!(heard, 3, "{kind}");
        assert!(handed <= 3 + 4, "{kind} asked for {handed}");
    });
}

#[test]
fn a_prompt_without_room_is_reported_and_the_others_are_answered() {
    with_both(|kind, generator| {
        let texts = ["Calculate 1 + 1.".to_string(), "long ".repeat(200), "Calculate 2 + 2.".to_string()];
        let mut todo = texts.iter().enumerate();
        let mut heard = BTreeMap::new();
        generator
            .answer(&mut || todo.next().map(|(key, text)| request(key, text)), &mut |key, outcome| {
                let answered = matches!(outcome, Outcome::Answered(_));
                assert!(heard.insert(key, answered).is_none());
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(heard.into_iter().collect::<Vec<_>>(), [(0, true), (1, false), (2, true)], "{kind}");
    });
}

#[test]
fn states_that_answering_keeps_are_those_of_a_capture() {
    let target = tiny_target();
    let config = target.target.config();
    // Stored as bf16: whatever differs is seen.
    let none = String::new;
    let spec = CacheSpec {
        target: none(),
        target_sha256: none(),
        precision: none(),
        tokenizer_sha256: none(),
        template_sha256: none(),
        tokens_sha256: none(),
        target_layer_ids: vec![0, config.num_layers as u32 - 1],
        hidden_size: config.hidden_size as u32,
        dtype: CaptureDtype::Bf16,
        shard_rows: 1,
        rows: 0,
    };
    let layers = spec.target_layer_ids.iter().map(|l| LayerId(*l)).collect();
    let capture = InProcess::new(Arc::clone(&target.target), layers);
    let sampled = SamplingMix { temperature: 0.9, top_p: 0.9, seed: 7, greedy_share: 0.3 };
    for (mix, cache_bytes, batch_size) in [(GREEDY, 1 << 20, 4), (sampled, 1 << 20, 3), (sampled, 0, 1)] {
        let mine = engine(&target, None).with_prefix_cache(cache_bytes);
        let prompter = prompter(&target);
        let mut generator = EngineGenerator { engine: &mine, prompter, batch_size, keep: Some(spec.clone()) };
        let (mut rows, mut joined) = (0, 0);
        regenerate(&mut dialogues(20).into_iter(), &mut generator, mix, &mut |done, _| {
            assert_eq!(done.rows.len(), done.states.len());
            for (row, states) in done.rows.iter().zip(&done.states) {
                let row_tokens = TokenRow { number: 0, ids: row.ids.clone(), loss_mask: row.loss_mask() };
                let captured = capture.capture(row_tokens).unwrap();
                let mut wanted = RowEncoder::new(&spec);
                wanted.push(&captured.features, &captured.last);
                assert!(states.as_ref() == Some(&wanted), "{}, batch of {batch_size}", done.id);
                rows += 1;
                joined += usize::from(row.answers.len() > 1);
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        assert!(rows >= 19 && joined > 0, "{rows} rows, {joined} with several answers");
    }
}

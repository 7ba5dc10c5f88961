//! Rows of reasoning models: a generator that writes known ids, over templates that open, strip and invent reasoning.
//!
//! Right values: before each answer stand the ids of its prompt as the template and the tokenizer make it, then the very
//! ids that were written.

use std::collections::HashMap;
use std::ops::ControlFlow;

use draftsmith_text::{ChatTemplate, Message, RenderOptions, SpecialIds, Tokenizer};

use crate::{
    AnsweredRow, Dialogue, FinishedDialogue, Generator, IdsFrom, Outcome, Prompter, RegenerateError, Request,
    SamplingMix, regenerate,
};

const TEMPLATES: [&str; 5] = ["opens_and_strips", "opens_and_shows", "hybrid", "strips", "chatml"];

fn fixture(path: &str) -> String {
    let path = format!("{}/../../fixtures/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn tokenizer() -> Tokenizer {
    let special = SpecialIds { bos: Some(1), eos: vec![2], pad: Some(0), ..SpecialIds::default() };
    Tokenizer::from_json(fixture("tiny-target/tokenizer.json").as_bytes(), special).unwrap()
}

fn template(name: &str, tokenizer: &Tokenizer) -> ChatTemplate {
    let source = match name {
        "chatml" => "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}".to_string(),
        name => fixture(&format!("thinking/{name}.jinja")),
    };
    ChatTemplate::parse(&source).unwrap().with_tokens_of(tokenizer)
}

/// Writes the answers that it is given, one per turn.
struct Scripted<'a> {
    prompter: Prompter<'a>,
    script: HashMap<String, Vec<Written>>,
}

#[derive(Clone)]
struct Written {
    ids: Vec<u32>,
    cut: bool,
}

impl Generator for Scripted<'_> {
    fn answer(
        &mut self,
        next: &mut dyn FnMut() -> Option<Request>,
        on_done: &mut dyn FnMut(usize, Outcome) -> ControlFlow<()>,
    ) -> Result<(), RegenerateError> {
        while let Some(request) = next() {
            let turn = request.messages.iter().filter(|m| m.role == "assistant").count();
            let written = self.script[&request.id][turn].clone();
            let outcome = match self.prompter.prompt(&request) {
                Ok(prompt) => Outcome::Answered(self.prompter.judge(
                    prompt.ids,
                    written.ids,
                    IdsFrom::Model,
                    written.cut,
                )),
                Err(outcome) => outcome,
            };
            if on_done(request.key, outcome).is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// One token per byte: the text is that of the usual tokens, the ids are not.
fn byte_by_byte(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let bytes = tokenizer.byte_ids();
    let id = |byte: u8| *bytes.iter().find(|id| tokenizer.token_to_piece(**id) == [byte]).unwrap();
    text.bytes().map(id).collect()
}

fn answered(name: &str) -> (Vec<FinishedDialogue>, HashMap<String, Vec<Written>>) {
    let tokenizer = tokenizer();
    let template = template(name, &tokenizer);
    let eos = tokenizer.eos_ids()[0];
    let usual = |text: &str| [tokenizer.encode(text, false).unwrap(), vec![eos]].concat();
    let odd = |text: &str| [byte_by_byte(&tokenizer, text), vec![eos]].concat();
    let whole = |ids: Vec<u32>| Written { ids, cut: false };
    let cut = |mut ids: Vec<u32>| {
        ids.pop();
        Written { ids, cut: true }
    };
    let opened = name.starts_with("opens");
    let think = |text: &str| if opened { text.to_string() } else { format!("<think>\n{text}") };
    let reasoned = think("20 and 2\n</think>\n\n22.");
    let script: HashMap<String, Vec<Written>> = [
        (
            "reasoning",
            vec![whole(usual(&reasoned)), whole(usual(&reasoned)), cut(usual(&think("Okay, the user")))],
        ),
        ("cut at once", vec![cut(usual(&think("Once upon a")))]),
        ("other tokens", vec![whole(odd(&reasoned)), whole(odd("and so on")), whole(odd("  \n done \n"))]),
        ("plain", vec![whole(usual("22.")), whole(usual("23")), whole(usual("24"))]),
        ("spaces", vec![whole(usual(" 22 ")), whole(usual("\n23\n")), whole(usual("\n\n24"))]),
        ("only the end", vec![whole(vec![eos])]),
        ("control tokens", vec![whole(vec![1, 30, 1, 0, eos])]),
    ]
    .map(|(id, answers)| (id.to_string(), answers))
    .into();
    let turns = ["a", "b", "c"].map(|text| Message::new("user", text));
    let mut dialogues: Vec<Dialogue> = script
        .iter()
        .map(|(id, answers)| Dialogue {
            id: id.clone(),
            domain: "test".into(),
            turns: turns[..answers.len()].to_vec(),
            render: RenderOptions::default(),
        })
        .collect();
    dialogues.sort_by(|a, b| a.id.cmp(&b.id));
    let prompter =
        Prompter { tokenizer: &tokenizer, template: &template, max_new_tokens: 64, max_context: 4096 };
    let mut generator = Scripted { prompter: prompter.clone(), script: script.clone() };
    let mix = SamplingMix { temperature: 0.0, top_p: 1.0, seed: 1, greedy_share: 1.0 };
    let mut done = Vec::new();
    regenerate(&mut dialogues.into_iter(), &mut generator, mix, &mut |row, _| {
        done.push(row);
        ControlFlow::Continue(())
    })
    .unwrap();
    for dialogue in &done {
        let mut spans = Vec::new();
        for row in &dialogue.rows {
            assert!(row.is_sound());
            for span in &row.answers {
                let text =
                    prompter.text(&dialogue.messages[..span.message], &RenderOptions::default()).unwrap();
                let asked = tokenizer.encode(&text, false).unwrap();
                assert_eq!(row.ids[..span.start], asked, "{name}, {}: the prompt", dialogue.id);
                spans.push(row.ids[span.start..span.end].to_vec());
            }
        }
        let written: Vec<Vec<u32>> = script[&dialogue.id].iter().map(|w| w.ids.clone()).collect();
        assert_eq!(spans, written, "{name}, {}: the answers", dialogue.id);
        let trained: usize =
            dialogue.rows.iter().map(|row| row.loss_mask().iter().filter(|m| **m).count()).sum();
        assert_eq!(trained, dialogue.generated_tokens);
        assert_eq!(trained, dialogue.rows.iter().map(AnsweredRow::generated_tokens).sum::<usize>());
    }
    (done, script)
}

fn rows_of(done: &[FinishedDialogue], id: &str) -> usize {
    done.iter().find(|d| d.id == id).unwrap().rows.len()
}

#[test]
fn every_written_token_is_in_a_row_behind_what_was_asked() {
    for name in TEMPLATES {
        let (done, _) = answered(name);
        assert_eq!(done.len(), 7, "{name}");
    }
}

#[test]
fn turns_stay_together_where_the_next_prompt_begins_with_them() {
    let (done, _) = answered("chatml");
    assert_eq!(rows_of(&done, "plain"), 1);
    assert_eq!(rows_of(&done, "reasoning"), 1, "ChatML knows no reasoning and leaves it where it is");
    assert_eq!(rows_of(&done, "other tokens"), 3);
    let (done, _) = answered("opens_and_strips");
    assert_eq!(rows_of(&done, "reasoning"), 3, "earlier reasoning is stripped");
    let (done, _) = answered("hybrid");
    assert_eq!(rows_of(&done, "plain"), 1);
}

#[test]
fn a_cut_answer_has_no_end_and_what_it_means_is_known() {
    for name in TEMPLATES {
        let (done, _) = answered(name);
        let of = |id: &str| done.iter().find(|d| d.id == id).unwrap();
        assert!(of("cut at once").cut && of("reasoning").cut && !of("plain").cut);
        let eos = tokenizer().eos_ids().to_vec();
        assert!(!eos.contains(of("cut at once").rows[0].ids.last().unwrap()), "{name}");
        assert_eq!(of("only the end").mark, Some(crate::AnswerMark::Empty));
    }
}

#[test]
fn the_stop_token_is_the_one_that_the_template_writes() {
    let tokenizer = tokenizer();
    for name in TEMPLATES {
        let template = template(name, &tokenizer);
        let prompter =
            Prompter { tokenizer: &tokenizer, template: &template, max_new_tokens: 64, max_context: 4096 };
        assert_eq!(prompter.stop_id(), tokenizer.token_to_id("<|im_end|>"), "{name}");
    }
}

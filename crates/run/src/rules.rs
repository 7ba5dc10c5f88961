//! Rules of thumb for a run: what to write into a run file, and what bodes ill in one. Pure functions; every number
//! here comes from a measurement in docs/LOG.md, and is said with it.

use draftsmith_formats::run::{Method, Products};
use serde::Serialize;

/// A kind of draft that is proposed, and where.
pub struct KindRule {
    /// The kind.
    pub method: &'static str,
    /// From this many answered tokens on.
    pub from_tokens: u64,
    /// What speaks for it.
    pub because: &'static str,
}

/// The kind that the rules were measured with.
const EAGLE3: &str = "eagle3";

/// The kinds that are proposed; the last one that fits wins. A kind comes in here with the measurement that speaks for it.
pub const KINDS: [KindRule; 1] = [KindRule {
    method: EAGLE3,
    from_tokens: 0,
    because: "EAGLE-3: the kind whose drafts paid with under a million answered tokens (accept length 1.84 after 240 \
              steps, 1.96 after 3,600); DSpark stood at 1.52 after 330 steps",
}];

/// The kind for a number of answered tokens.
pub fn kind(tokens: u64) -> &'static KindRule {
    KINDS.iter().rfind(|rule| tokens >= rule.from_tokens).unwrap_or(&KINDS[0])
}

/// Unrolled steps of EAGLE-3's training-time test: 5 and 7 cost 0.03 and 0.06 of accept length at 400 steps.
pub const TTT_LENGTH: u32 = 3;
/// Share of greedy answers, as in the recipe of the draft that ships.
pub const GREEDY_SHARE: f64 = 0.8;
/// Passes over the answers: 3.7 in the draft that ships; after 8 passes a draft knew its training rows (0.62) far better
/// than others (0.4).
pub const PASSES: f64 = 4.0;
/// More passes than this learn the rows by heart.
pub const MOST_PASSES: f64 = 6.0;
/// Fewer optimiser steps than this leave a draft close to noise: 240 gave an accept length of 1.84, 110 of DSpark 1.28.
pub const FEW_STEPS: u64 = 200;
/// Fewer conversations: 332 prompts carried 1.84.
pub const FEW_ROWS: u64 = 300;
/// Fewer trained tokens: the same draft had 40 thousand.
pub const FEW_TOKENS: u64 = 30_000;
/// Smaller shares of the trained tokens in the draft's vocabulary: 94.3 % did best, less was not tried.
pub const LOW_COVERAGE: f64 = 0.90;
/// Fewer held-out conversations cannot tell drafts apart: the interval over 24 is 0.15 wide on either side.
pub const FEW_HELD_OUT: u64 = 16;
/// Learning rates further off than this factor.
const LR_FACTOR: f64 = 3.0;
/// Slots of an optimiser step of all drafts that ship.
pub const TOKENS_PER_STEP: u32 = 1024;

/// Highest learning rate for a draft that starts at random and trains for some hundred to some thousand steps of
/// [`TOKENS_PER_STEP`]: 1.5e-3 at a width of 576 (ablations and the draft that ships), 1e-3 at 896. Wider ones are not
/// measured; the rule goes on falling.
pub fn lr(width: usize) -> f64 {
    match width {
        0..=640 => 1.5e-3,
        641..=1024 => 1e-3,
        1025..=2048 => 7e-4,
        _ => 5e-4,
    }
}

/// How large products of training are computed where nothing else is asked for: of numbers rounded to bf16 where the CPU multiplies
/// such in vectors or tiles. 500 steps of the draft for Qwen2.5-Coder-0.5B came to an accept length of 1.82 that way and of 1.84 in
/// f32, and a step took 0.79 of the time.
pub fn products(has_bf16: bool) -> Products {
    if has_bf16 { Products::Bf16 } else { Products::F32 }
}

/// Slots of a step, of a pack and of the longest row: the least that holds 19 of 20 rows, and so little that the steps
/// do not run out.
pub fn tokens_per_step(longest_rows: u32, tokens: u64, passes: f64) -> u32 {
    let needed = longest_rows.next_power_of_two().clamp(256, 4096);
    let steps = |slots: u32| tokens as f64 * passes / f64::from(slots);
    let mut slots = needed.max(TOKENS_PER_STEP);
    while slots > needed && steps(slots) < 2.0 * FEW_STEPS as f64 {
        slots /= 2;
    }
    slots
}

/// Seconds that stages take, per token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Paces {
    /// A generated token, the prompts' share included.
    pub answer_s: f64,
    /// A token of a row, captured.
    pub capture_s: f64,
    /// A slot in the first pass over the rows.
    pub new_slot_s: f64,
    /// A slot in later passes.
    pub old_slot_s: f64,
    /// Tokens of a row per generated token.
    pub row_tokens: f64,
}

/// How hours are spent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Tokens to be generated.
    pub answer_tokens: u64,
    /// Passes over them.
    pub passes: f64,
    /// Seconds that are left over because there are no more prompts.
    pub left_s: f64,
}

/// Splits seconds among answers, capture and training: [`PASSES`] passes over as many answers as that leaves time for;
/// where the prompts end first, more passes, but none that would be learnt by heart.
pub fn budget(seconds: f64, most_answers: u64, paces: &Paces) -> Budget {
    let row_s = |passes: f64| {
        let training = paces.new_slot_s + (passes - 1.0).max(0.0) * paces.old_slot_s;
        paces.answer_s + paces.row_tokens * (paces.capture_s + training)
    };
    let seconds = seconds.max(0.0);
    let affordable = (seconds / row_s(PASSES).max(1e-12)) as u64;
    if affordable <= most_answers {
        return Budget { answer_tokens: affordable, passes: PASSES, left_s: 0.0 };
    }
    let all = most_answers as f64;
    let pass_s = (all * paces.row_tokens * paces.old_slot_s).max(1e-12);
    let passes = (PASSES + (seconds - all * row_s(PASSES)) / pass_s).clamp(PASSES, MOST_PASSES);
    Budget { answer_tokens: most_answers, passes, left_s: (seconds - all * row_s(passes)).max(0.0) }
}

/// What is known of a run; what is not known warns of nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// Conversations that are trained on.
    pub rows: Option<u64>,
    /// Conversations that there are, whether they are trained on or not.
    pub given: Option<u64>,
    /// Most tokens of answers that the run file allows, if it limits them.
    pub max_answers: Option<u64>,
    /// Tokens of them with a loss.
    pub trained_tokens: Option<u64>,
    /// Optimiser steps.
    pub steps: Option<u64>,
    /// Passes over the data.
    pub passes: Option<f64>,
    /// Most optimiser steps that the run file allows, if it limits them.
    pub max_steps: Option<u64>,
    /// Slots of a step.
    pub tokens_per_step: u32,
    /// Share of trained tokens that the draft's vocabulary has.
    pub coverage: Option<f64>,
    /// Highest learning rate.
    pub lr: f64,
    /// Kind of draft.
    pub method: Option<Method>,
    /// Weights begin as noise.
    pub random: bool,
    /// Width of the target.
    pub width: Option<usize>,
    /// The target writes the answers.
    pub own_answers: bool,
    /// Conversations that drafts are chosen by; `None` if they are not.
    pub held_out: Option<u64>,
}

/// Something that bodes ill. The run goes on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Warning {
    /// What is in short supply: `data`, `time`, `steps`, `vocabulary`, `learning rate`, `passes`, `answers`, `validation`.
    pub about: &'static str,
    /// The fact.
    pub message: String,
    /// What to change.
    pub advice: String,
    /// The same as `key=value`, where it can be said so.
    pub set: Vec<String>,
}

impl Warning {
    /// Both in one line.
    pub fn line(&self) -> String {
        format!("{}: {}; {}", self.about, self.message, self.advice)
    }
}

/// What of a run is bound to disappoint, worst first.
pub fn warnings(facts: &Facts) -> Vec<Warning> {
    let mut found = Vec::new();
    let mut warn = |about, message: String, advice: String, set: &[String]| {
        found.push(Warning { about, message, advice, set: set.to_vec() });
    };
    let few_rows = facts.rows.filter(|rows| *rows < FEW_ROWS);
    let few_tokens = facts.trained_tokens.filter(|tokens| *tokens < FEW_TOKENS);
    // There are more conversations, and the limit of answers left them out.
    let left_out = facts.max_answers.zip(facts.given.zip(few_rows).filter(|(given, rows)| given > rows));
    match (few_rows, few_tokens) {
        _ if left_out.is_some() => {
            let (most, (given, rows)) = left_out.expect("it is some");
            let factor = given.min(FEW_ROWS) as f64 / rows.max(1) as f64;
            let longer = |value: u64| (value as f64 * factor).ceil() as u64;
            let mut set = vec![format!("regenerate.max_tokens={}", longer(most))];
            let steps = facts.max_steps.map(|steps| longer(steps).max(FEW_STEPS));
            set.extend(steps.map(|steps| format!("train.max_steps={steps}")));
            warn(
                "time",
                format!(
                    "{rows} of {given} conversations are few: drafts that paid had {FEW_ROWS} and more, and the rest is \
                     left out for time"
                ),
                format!("give it more (`make --hours`), or set {}", set.join(" and ")),
                &set,
            );
        }
        (Some(rows), _) => warn(
            "data",
            format!("{rows} conversations are few: drafts that paid had {FEW_ROWS} and more"),
            format!("give more in `data.sources`, {FEW_ROWS} at least"),
            &[],
        ),
        (None, Some(tokens)) => warn(
            "data",
            format!("{tokens} trained tokens are few: drafts that paid had {FEW_TOKENS} and more"),
            "give more conversations in `data.sources`, or raise `regenerate.max_tokens` and \
             `regenerate.max_new_tokens`"
                .to_string(),
            &[],
        ),
        (None, None) => {}
    }
    if let Some(steps) = facts.steps.filter(|steps| *steps < FEW_STEPS) {
        let (advice, set) = more_steps(facts, steps);
        warn("steps", format!("{steps} optimiser steps are few, {FEW_STEPS} are wanted"), advice, &set);
    }
    // As they are told, in tenths: the last step of six passes may go beyond them.
    if let Some(passes) = facts.passes.filter(|passes| (passes * 10.0).round() > MOST_PASSES * 10.0) {
        warn(
            "passes",
            format!("{passes:.1} passes over the data learn the rows by heart"),
            format!("lower `train.epochs` to {MOST_PASSES:.0} at most, or give more conversations"),
            &[format!("train.epochs={MOST_PASSES:.0}")],
        );
    }
    if let Some(coverage) = facts.coverage.filter(|coverage| *coverage < LOW_COVERAGE) {
        warn(
            "vocabulary",
            format!("the draft can propose only {:.1} % of the trained tokens", 100.0 * coverage),
            "double `draft.vocab_size`, or leave the sizes to `draft.size = \"auto\"`".to_string(),
            &[],
        );
    }
    if !facts.own_answers {
        warn(
            "answers",
            "the answers are not the target's own, which cost 0.11 to 0.15 of accept length".to_string(),
            "set `regenerate.enabled = true`".to_string(),
            &["regenerate.enabled=true".to_string()],
        );
    }
    // Kinds differ, and weights that start from the target are moved less: only what was measured is held up.
    if let (Some(width), Some(method), true) = (facts.width, &facts.method, facts.random)
        && method.name() == EAGLE3
    {
        let wanted = lr(width);
        if facts.lr > wanted * LR_FACTOR || facts.lr < wanted / LR_FACTOR {
            warn(
                "learning rate",
                format!("`train.lr` is {:e}, far from the {wanted:e} that did well at this width", facts.lr),
                format!("set `train.lr = {wanted:e}`"),
                &[format!("train.lr={wanted:e}")],
            );
        }
    }
    match facts.held_out {
        Some(rows) if rows < FEW_HELD_OUT => warn(
            "validation",
            format!("drafts are chosen by {rows} held-out conversations, which cannot tell them apart"),
            format!("set `data.validation_rows` and `validate.prompts` to {FEW_HELD_OUT} at least"),
            &[],
        ),
        _ => {}
    }
    found
}

/// How a run comes to [`FEW_STEPS`], in words and as overrides.
fn more_steps(facts: &Facts, steps: u64) -> (String, Vec<String>) {
    if facts.max_steps.is_some_and(|most| most <= steps) {
        return (
            format!("raise `train.max_steps` to {FEW_STEPS}"),
            vec![format!("train.max_steps={FEW_STEPS}")],
        );
    }
    let factor = FEW_STEPS as f64 / steps.max(1) as f64;
    let passes = facts.passes.unwrap_or(1.0).max(1.0);
    let epochs = (passes * factor).ceil();
    if epochs <= MOST_PASSES {
        return (format!("set `train.epochs = {epochs:.0}`"), vec![format!("train.epochs={epochs:.0}")]);
    }
    // What passes cannot give, smaller steps do, down to the least that was tried.
    let slots = (f64::from(facts.tokens_per_step) * MOST_PASSES / epochs) as u32;
    let slots = slots.next_power_of_two() / 2;
    match slots >= 256 {
        true => (
            format!(
                "set `train.epochs = {MOST_PASSES:.0}` and `train.tokens_per_step` and `train.pack_length` to {slots} \
                 (`data.max_length` at most that)"
            ),
            vec![
                format!("train.epochs={MOST_PASSES:.0}"),
                format!("train.tokens_per_step={slots}"),
                format!("train.pack_length={slots}"),
                format!("data.max_length={slots}"),
            ],
        ),
        false => (
            "give more conversations: neither more passes nor smaller steps make up for them".to_string(),
            Vec::new(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run that bodes well.
    fn facts() -> Facts {
        Facts {
            rows: Some(4000),
            given: None,
            max_answers: Some(700_000),
            trained_tokens: Some(700_000),
            steps: Some(3600),
            passes: Some(3.7),
            max_steps: Some(3600),
            tokens_per_step: 1024,
            coverage: Some(0.943),
            lr: 1.5e-3,
            method: Some(Method::of(EAGLE3)),
            random: true,
            width: Some(576),
            own_answers: true,
            held_out: Some(24),
        }
    }

    #[track_caller]
    fn check(facts: &Facts, about: &[&str], advice: &str) {
        let found = warnings(facts);
        assert_eq!(found.iter().map(|w| w.about).collect::<Vec<_>>(), about, "{found:#?}");
        assert!(found.iter().any(|w| w.advice.contains(advice)) || about.is_empty(), "{found:#?}");
    }

    #[test]
    fn what_shipped_warns_of_nothing() {
        check(&facts(), &[], "");
        check(&Facts { rows: None, steps: None, coverage: None, held_out: None, ..facts() }, &[], "");
    }

    #[test]
    fn conversations_that_are_left_out_for_time_are_no_lack_of_conversations() {
        let left_out =
            Facts { rows: Some(50), given: Some(556), max_steps: Some(40), steps: Some(40), ..facts() };
        check(&left_out, &["time", "steps"], "regenerate.max_tokens=4200000 and train.max_steps=240");
        check(&Facts { given: Some(50), rows: Some(50), ..facts() }, &["data"], "data.sources");
        check(&Facts { max_answers: None, ..left_out }, &["data", "steps"], "data.sources");
    }

    #[test]
    fn each_shortage_is_said_with_what_to_change() {
        // Default settings on 40 rows: one step.
        let forty = Facts {
            rows: Some(40),
            trained_tokens: Some(4000),
            steps: Some(1),
            passes: Some(1.0),
            max_steps: None,
            tokens_per_step: 4096,
            ..facts()
        };
        check(&forty, &["data", "steps"], "`data.sources`");
        check(&Facts { trained_tokens: Some(20_000), ..facts() }, &["data"], "regenerate.max_tokens");
        check(
            &Facts { steps: Some(60), max_steps: Some(60), ..facts() },
            &["steps"],
            "`train.max_steps` to 200",
        );
        check(
            &Facts { steps: Some(100), passes: Some(2.0), max_steps: None, ..facts() },
            &["steps"],
            "train.epochs = 4",
        );
        check(
            &Facts { steps: Some(60), passes: Some(4.0), max_steps: None, ..facts() },
            &["steps"],
            "`train.pack_length` to 256",
        );
        check(&Facts { passes: Some(8.0), ..facts() }, &["passes"], "`train.epochs` to 6");
        // What `make` proposes at most, rounded up to whole steps.
        check(&Facts { passes: Some(MOST_PASSES + 0.01), ..facts() }, &[], "");
        check(&Facts { coverage: Some(0.7), ..facts() }, &["vocabulary"], "draft.vocab_size");
        check(&Facts { own_answers: false, ..facts() }, &["answers"], "regenerate.enabled");
        check(&Facts { lr: 1e-4, ..facts() }, &["learning rate"], "train.lr = 1.5e-3");
        check(&Facts { lr: 1e-2, ..facts() }, &["learning rate"], "train.lr = 1.5e-3");
        check(&Facts { held_out: Some(4), ..facts() }, &["validation"], "data.validation_rows");
    }

    #[test]
    fn only_measured_learning_rates_are_held_up() {
        check(&Facts { lr: 1e-4, random: false, ..facts() }, &[], "");
        check(&Facts { lr: 1e-4, method: Some(Method::of("dspark")), ..facts() }, &[], "");
    }

    /// SmolLM2 on two cores, as the recipe's run measured it.
    fn paces() -> Paces {
        Paces {
            answer_s: 1.0 / 678.0,
            capture_s: 1.0 / 2159.0,
            new_slot_s: 1.0 / 1900.0,
            old_slot_s: 1.0 / 2150.0,
            row_tokens: 1.11,
        }
    }

    #[test]
    fn hours_become_answers_and_passes_as_in_the_run_that_shipped() {
        // 55 minutes of it gave 900 thousand answered tokens and 3.7 passes.
        let budget = budget(55.0 * 60.0, u64::MAX, &paces());
        assert!((780_000..950_000).contains(&budget.answer_tokens) && budget.passes == PASSES, "{budget:?}");
    }

    #[test]
    fn where_prompts_end_passes_grow_and_then_time_is_left() {
        let few = budget(600.0, 34_000, &paces());
        assert_eq!((few.answer_tokens, few.passes), (34_000, MOST_PASSES));
        assert!(few.left_s > 300.0, "{few:?}");
        let some = budget(170.0, 40_000, &paces());
        assert!(some.passes > PASSES && some.passes < MOST_PASSES && some.left_s < 1.0, "{some:?}");
        assert_eq!(budget(-5.0, 10, &paces()).answer_tokens, 0);
    }

    #[test]
    fn steps_are_small_where_data_is_little_and_hold_its_rows() {
        assert_eq!(tokens_per_step(400, 1_000_000, 4.0), 1024);
        assert_eq!(tokens_per_step(400, 38_000, 4.0), 512);
        assert_eq!(tokens_per_step(200, 20_000, 4.0), 256);
        assert_eq!(tokens_per_step(1500, 1_000_000, 4.0), 2048);
        assert_eq!(tokens_per_step(900, 10_000, 4.0), 1024);
    }

    #[test]
    fn every_number_of_tokens_has_a_kind() {
        for tokens in [0, 100_000, u64::MAX] {
            assert_eq!(kind(tokens).method, EAGLE3);
        }
    }
}

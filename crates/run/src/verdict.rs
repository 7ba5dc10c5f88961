//! Whether a draft is worth using here, what limited it, and the next step: the last word of a run.
//!
//! A pure function of what was measured. Nothing that measured slower than the target alone is ever recommended.

use std::path::{Path, PathBuf};

use draftsmith_bench::{Record, headline, workload_name};
use serde::{Deserialize, Serialize};

use crate::rules::Warning;

/// Rows from which an interval says something.
const ROWS: usize = 8;

/// The answer in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Worth {
    /// Faster, and the interval says so.
    Yes,
    /// Faster on average, but it could be chance or the machine.
    Unsure,
    /// Not faster.
    No,
    /// Nothing was measured.
    Unmeasured,
    /// Texts differ: no speed makes up for that.
    Differs,
}

/// The last word of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Is it worth using here?
    pub worth: Worth,
    /// The answer in a sentence, with the numbers.
    pub says: String,
    /// The setting that it speaks of, `auto`, `chain 3`.
    pub setting: Option<String>,
    /// Over target-only decoding.
    pub speedup: Option<f64>,
    /// Its 95 % interval.
    pub speedup_ci95: Option<[f64; 2]>,
    /// The sets that were measured.
    pub workloads: Vec<String>,
    /// What limited it, worst first.
    pub limits: Vec<String>,
    /// The next step, as a command.
    pub next: String,
    /// What the next step is for.
    pub next_is_for: String,
}

impl Verdict {
    /// As the end of a run shows it.
    pub fn text(&self) -> String {
        let mut text = format!("verdict     {}\n", self.says);
        for limit in &self.limits {
            text.push_str(&format!("limited by  {limit}\n"));
        }
        text.push_str(&format!("next        {}\n            {}\n", self.next_is_for, self.next));
        text
    }

    /// In one paragraph, for card and report.
    pub fn paragraph(&self) -> String {
        let limits = match self.limits.as_slice() {
            [] => String::new(),
            limits => format!(" Limited by {}.", limits.join("; ")),
        };
        format!("{}.{limits}", self.says)
    }
}

/// The words of a verdict that was written down.
pub fn text_of(verdict: &serde_json::Value) -> String {
    serde_json::from_value::<Verdict>(verdict.clone())
        .map_or_else(|_| String::new(), |verdict| verdict.text())
}

/// What the best setting reached.
#[derive(Clone, Debug, PartialEq)]
pub struct Best {
    /// Its name.
    pub setting: String,
    /// Over target-only decoding.
    pub speedup: f64,
    /// Its 95 % interval.
    pub interval: Option<[f64; 2]>,
    /// Tokens per verify step.
    pub accept_len: Option<f64>,
    /// Prompts.
    pub rows: usize,
    /// Every text is the target's.
    pub identical: bool,
    /// What speaks against the times: others at work, a clock that drifted.
    pub disturbed: Option<String>,
}

impl Best {
    /// The fastest setting of the records; `None` if none has a speedup.
    pub fn of(records: &[Record]) -> Option<Best> {
        let (setting, summary) = headline(records)?;
        let speedup = summary.speedup?;
        let disturbs = |kind: &str| matches!(kind, "machine_busy" | "clock_drift" | "too_many_threads");
        Some(Best {
            setting,
            speedup: speedup.value,
            interval: speedup.interval.map(|i| [i.low, i.high]),
            accept_len: summary.accept_len.map(|e| e.value),
            rows: summary.rows,
            // Of whatever setting: a text that differs is a fault of ours.
            identical: records
                .iter()
                .all(|r| r.samples.iter().all(|s| s.identical || r.settings.verify.is_some())),
            disturbed: summary.doubts.iter().find(|d| disturbs(d.kind())).map(|d| d.message()),
        })
    }
}

/// What commands are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Names {
    /// The bundle.
    pub bundle: PathBuf,
    /// The run file, with the overrides behind it.
    pub run: String,
    /// The first reference of the target.
    pub target: String,
    /// A name for a run with more data, which no run file here has.
    pub anew: String,
    /// Files of prompts that were measured.
    pub workloads: Vec<PathBuf>,
    /// `key=value` that make a run go further where nothing else is wrong with it.
    pub further: Vec<String>,
}

fn word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=~".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// Judges a draft by its best setting; `warnings` are those that the run began with, or would.
pub fn verdict(best: Option<&Best>, warnings: &[Warning], names: &Names) -> Verdict {
    let bundle = word(&names.bundle);
    let files: Vec<String> =
        names.workloads.iter().map(|path| format!("--workload {}", word(path))).collect();
    let sets: Vec<String> = names.workloads.iter().map(|path| workload_name(path)).collect();
    let mut limits: Vec<String> = Vec::new();
    let Some(best) = best else {
        limits.extend(warnings.iter().map(Warning::line));
        return Verdict {
            worth: Worth::Unmeasured,
            says: "not known: nothing was measured".to_string(),
            setting: None,
            speedup: None,
            speedup_ci95: None,
            workloads: Vec::new(),
            limits,
            next: format!(
                "draftsmith bench --bundle {bundle} --auto --workload recipes/data/eval/gsm8k.jsonl --limit 20"
            ),
            next_is_for: "measure it".to_string(),
        };
    };
    let worth = match best.interval {
        _ if !best.identical => Worth::Differs,
        _ if best.speedup < 1.0 => Worth::No,
        Some([low, _]) if low >= 1.0 && best.disturbed.is_none() && best.rows >= ROWS => Worth::Yes,
        _ => Worth::Unsure,
    };
    let interval = best.interval.map_or_else(String::new, |[low, high]| format!(" [{low:.2}, {high:.2}]"));
    let measured = format!(
        "{:.2}x{interval} over the target alone with {}, {} prompts of {}",
        best.speedup,
        best.setting,
        best.rows,
        sets.join(", ")
    );
    let says = match worth {
        Worth::Yes => format!("worth using here: {measured}"),
        Worth::Unsure => {
            let why = match best.interval {
                _ if best.disturbed.is_some() => "others were at work while it was measured",
                _ if best.rows < ROWS => "too few prompts were measured",
                _ => "it could be chance",
            };
            format!("not shown to be worth it, for {why}: {measured}")
        }
        Worth::No => format!("not worth using here, decode without it: at best {measured}"),
        Worth::Differs => format!("not to be used: texts differ from those of the target alone ({measured})"),
        Worth::Unmeasured => unreachable!("there is a measurement"),
    };
    limits.extend(best.disturbed.iter().map(|doubt| format!("the machine: {doubt}")));
    if best.rows < ROWS {
        limits.push(format!("few prompts: {} were measured, {ROWS} at least are wanted", best.rows));
    }
    limits.extend(warnings.iter().map(Warning::line));
    if limits.is_empty()
        && worth != Worth::Yes
        && let Some(accept_len) = best.accept_len.filter(|_| best.speedup > 0.0)
    {
        limits.push(format!(
            "the accept length: a verify step commits {accept_len:.2} tokens and takes as long as {:.2} plain steps",
            accept_len / best.speedup
        ));
    }
    let measure = format!("draftsmith bench tune --bundle {bundle} {} --limit 20 --write", files.join(" "));
    // The worst shortage speaks first: of two values for a key it has the say.
    let mut set: Vec<&str> = Vec::new();
    for one in warnings.iter().flat_map(|w| &w.set) {
        let key = one.split('=').next();
        if !set.iter().any(|other| other.split('=').next() == key) {
            set.push(one);
        }
    }
    let data = warnings.iter().any(|w| w.about == "data");
    let (next_is_for, next) = match worth {
        Worth::Differs => (
            "find where they part, and report it".to_string(),
            format!(
                "draftsmith bench identity --target {} --bundle {bundle} {}",
                names.target,
                files.join(" ")
            ),
        ),
        Worth::Yes => ("use it".to_string(), format!("draftsmith serve --bundle {bundle}")),
        _ if data => (
            "train it on more conversations of the kind that it will be used for".to_string(),
            format!("draftsmith make {} --data MORE.jsonl --name {}", names.target, names.anew),
        ),
        _ if !set.is_empty() => {
            ("train it as its size asks for".to_string(), format!("{} {}", names.run, set.join(" ")))
        }
        _ if best.disturbed.is_some() || (worth == Worth::Unsure && best.rows < 20) => {
            ("measure again, on an idle machine and more prompts".to_string(), measure)
        }
        _ if names.further.is_empty() => {
            ("measure again, on an idle machine and more prompts".to_string(), measure)
        }
        _ => (
            "train it for longer, on more answers".to_string(),
            format!("{} {}", names.run, names.further.join(" ")),
        ),
    };
    Verdict {
        worth,
        says,
        setting: Some(best.setting.clone()),
        speedup: Some(best.speedup),
        speedup_ci95: best.interval,
        workloads: sets,
        limits,
        next,
        next_is_for,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn best() -> Best {
        Best {
            setting: "auto".to_string(),
            speedup: 1.27,
            interval: Some([1.2, 1.34]),
            accept_len: Some(1.84),
            rows: 20,
            identical: true,
            disturbed: None,
        }
    }

    fn names() -> Names {
        Names {
            bundle: PathBuf::from("runs/a/bundle"),
            run: "draftsmith run a.toml".to_string(),
            target: "hf:ORG/NAME".to_string(),
            anew: "a-more".to_string(),
            workloads: vec![PathBuf::from("w/own prompts.jsonl")],
            further: vec!["train.epochs=8".to_string()],
        }
    }

    fn few_steps() -> Warning {
        Warning {
            about: "steps",
            message: "1 optimiser steps are few".to_string(),
            advice: "set `train.epochs = 4`".to_string(),
            set: vec!["train.epochs=4".to_string()],
        }
    }

    #[track_caller]
    fn check(best: Option<&Best>, warnings: &[Warning], worth: Worth, limit: &str, next: &str) {
        let verdict = verdict(best, warnings, &names());
        assert_eq!(verdict.worth, worth, "{verdict:#?}");
        assert!(verdict.limits.iter().any(|l| l.contains(limit)) || limit.is_empty(), "{verdict:#?}");
        assert_eq!(limit.is_empty(), verdict.limits.is_empty(), "{verdict:#?}");
        assert!(verdict.next.contains(next), "{verdict:#?}");
        // Whatever is not shown to pay is not recommended.
        if worth != Worth::Yes {
            assert!(!verdict.next.contains("serve"), "{verdict:#?}");
            assert!(!verdict.says.starts_with("worth"), "{verdict:#?}");
        }
    }

    #[test]
    fn every_ending_has_its_word_its_limit_and_its_next_step() {
        let of = |change: fn(&mut Best)| {
            let mut best = best();
            change(&mut best);
            best
        };
        check(Some(&best()), &[], Worth::Yes, "", "draftsmith serve --bundle runs/a/bundle");
        let wide = of(|b| b.interval = Some([0.9, 1.6]));
        check(Some(&wide), &[], Worth::Unsure, "accept length", "train.epochs=8");
        let few = of(|b| b.rows = 4);
        check(Some(&few), &[], Worth::Unsure, "few prompts", "bench tune");
        let busy = of(|b| b.disturbed = Some("others used 40 %".to_string()));
        check(Some(&busy), &[], Worth::Unsure, "the machine", "--workload 'w/own prompts.jsonl'");
        let slow = of(|b| (b.speedup, b.interval) = (0.31, Some([0.3, 0.32])));
        check(Some(&slow), &[], Worth::No, "takes as long as 5.94 plain steps", "train.epochs=8");
        check(
            Some(&slow),
            &[few_steps()],
            Worth::No,
            "optimiser steps",
            "draftsmith run a.toml train.epochs=4",
        );
        let data = Warning { about: "data", set: Vec::new(), ..few_steps() };
        check(
            Some(&slow),
            &[data, few_steps()],
            Worth::No,
            "optimiser",
            "draftsmith make hf:ORG/NAME --data MORE.jsonl --name a-more",
        );
        let unanswered = Warning {
            about: "time",
            set: vec!["regenerate.max_tokens=9".to_string(), "train.epochs=3".to_string()],
            ..few_steps()
        };
        check(
            Some(&slow),
            &[unanswered, few_steps()],
            Worth::No,
            "time",
            "draftsmith run a.toml regenerate.max_tokens=9 train.epochs=3",
        );
        let differs = of(|b| b.identical = false);
        check(Some(&differs), &[], Worth::Differs, "accept length", "bench identity --target hf:ORG/NAME");
        check(None, &[few_steps()], Worth::Unmeasured, "optimiser steps", "draftsmith bench --bundle");
    }

    #[test]
    fn the_words_hold_interval_set_and_setting() {
        let text = verdict(Some(&best()), &[few_steps()], &names()).text();
        assert!(text.contains("worth using here: 1.27x [1.20, 1.34]"), "{text}");
        assert!(text.contains("with auto, 20 prompts of own prompts"), "{text}");
        assert!(text.contains("limited by  steps: 1 optimiser steps are few; set"), "{text}");
    }
}

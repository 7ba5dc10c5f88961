//! The log of a training as curves: what its lines say, for as long as it is being written.
//!
//! A line that cannot be read is counted and left out. The last one may be half there: whoever trains is writing it.

use std::path::Path;

use draftsmith_formats::atomic;
use draftsmith_formats::run::Stage;
use serde::Serialize;
use serde_json::Value;

use crate::state::RunFolder;

/// The log's name, in the folder of stage `train`.
const LOG: &str = "log.jsonl";

/// Some optimiser steps, as the log has them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepPoint {
    /// Optimiser steps done.
    pub step: u64,
    /// Mean over the steps since the line before; `None` where none had a trained slot.
    pub loss: Option<f64>,
    /// Share of right guesses per position of a proposal; `None` where a position was not trained.
    pub acc: Vec<Option<f64>>,
    /// Learning rate.
    pub lr: Option<f64>,
    /// Trained tokens per second.
    pub tokens_per_s: Option<f64>,
}

/// One measurement of the draft.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ValidationPoint {
    /// Optimiser steps done.
    pub step: u64,
    /// Committed tokens per verify step.
    pub accept_len: f64,
    /// Lower end of the 95 % interval.
    pub low: Option<f64>,
    /// Upper end of the 95 % interval.
    pub high: Option<f64>,
    /// Verify steps that it was measured over.
    pub verify_steps: Option<u64>,
    /// Steps whose drafts were averaged; empty: the draft as it was trained.
    pub mean_of: Vec<u64>,
    /// Better than all before.
    pub best: bool,
}

/// What a log says.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Curve {
    /// Steps of the whole training, once a line has said so.
    pub total_steps: Option<u64>,
    /// In the order of the log.
    pub steps: Vec<StepPoint>,
    /// In the order of the log.
    pub validations: Vec<ValidationPoint>,
    /// Whole lines that say nothing known. The one that is being written does not count.
    pub unread_lines: u64,
}

impl Curve {
    /// The log of the training in a folder of a run; `None` before there is one.
    pub fn of(folder: &RunFolder) -> Option<Curve> {
        Curve::read(&folder.stage_dir(Stage::Train).join(LOG))
    }

    fn read(path: &Path) -> Option<Curve> {
        let bytes = atomic::read(path).ok()?;
        let mut curve = Curve::default();
        for line in bytes.split_inclusive(|b| *b == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
            let known = serde_json::from_slice(line).is_ok_and(|value| curve.take(&value).is_some());
            curve.unread_lines += u64::from(!known && line.ends_with(b"\n"));
        }
        Some(curve)
    }

    /// Takes in a line; `None` if it is no event that is known.
    fn take(&mut self, line: &Value) -> Option<()> {
        let step = line["step"].as_u64()?;
        let number = |key: &str| line[key].as_f64();
        match line["event"].as_str()? {
            "step" => {
                let acc = line["acc"].as_array().into_iter().flatten().map(Value::as_f64);
                self.total_steps = line["total_steps"].as_u64().or(self.total_steps);
                self.steps.push(StepPoint {
                    step,
                    loss: number("loss"),
                    acc: acc.collect(),
                    lr: number("lr"),
                    tokens_per_s: number("tokens_per_s"),
                });
            }
            "validation" => {
                let mean_of = line["mean_of"].as_array().into_iter().flatten().filter_map(Value::as_u64);
                self.validations.push(ValidationPoint {
                    step,
                    accept_len: number("accept_len")?,
                    low: number("low"),
                    high: number("high"),
                    verify_steps: line["verify_steps"].as_u64(),
                    mean_of: mean_of.collect(),
                    best: line["best"] == true,
                });
            }
            _ => return None,
        }
        Some(())
    }

    /// The best accept length that was measured.
    pub fn best_accept_len(&self) -> Option<f64> {
        self.validations.iter().map(|point| point.accept_len).max_by(f64::total_cmp)
    }

    /// At most so many lines of steps: every `n`th and the last. Returns `n`.
    pub fn thin(&mut self, most: usize) -> usize {
        let every = self.steps.len().div_ceil(most.max(1)).max(1);
        let last = self.steps.len().saturating_sub(1);
        let mut i = 0;
        // Counted from the last one, so that the newest is always there.
        self.steps.retain(|_| {
            i += 1;
            (last + 1 - i).is_multiple_of(every)
        });
        every
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(text: &[u8]) -> Curve {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(LOG);
        std::fs::write(&path, text).unwrap();
        Curve::read(&path).unwrap()
    }

    #[test]
    fn broken_lines_are_counted_and_the_one_that_is_being_written_waits() {
        let good = br#"{"event":"step","step":1,"total_steps":9,"loss":2.5,"lr":0.1,"acc":[0.5,null]}
{"event":"validation","step":1,"mean_of":[],"accept_len":1.5,"low":1.25,"high":1.75,"verify_steps":4,"best":true}
"#;
        let whole = curve(good);
        assert_eq!(whole.steps.len(), 1);
        assert_eq!((whole.steps[0].loss, &whole.steps[0].acc), (Some(2.5), &vec![Some(0.5), None]));
        assert_eq!((whole.total_steps, whole.unread_lines), (Some(9), 0));
        let point = &whole.validations[0];
        assert_eq!(
            (point.accept_len, point.low, point.high, point.best),
            (1.5, Some(1.25), Some(1.75), true)
        );
        let broken: &[&[u8]] = &[
            b"{\"event\":\"step\",\"st\n",
            b"\xff\xfe\x00\n",
            b"[1]\n",
            b"{\"event\":\"step\"}\n",
            b"{\"event\":\"validation\",\"step\":2}\n",
            b"{\"event\":\"other\",\"step\":2}\n",
            b"\n",
            good,
            b"{\"event\":\"step\",\"step\":2,\"lo",
        ];
        let found = curve(&broken.concat());
        assert_eq!(found, Curve { unread_lines: 6, ..whole });
        assert_eq!(curve(b""), Curve::default());
        let missing = Curve::read(Path::new("nowhere/log.jsonl"));
        assert_eq!(missing, None);
    }

    #[test]
    fn a_step_without_a_trained_slot_has_no_loss() {
        let found = curve(b"{\"event\":\"step\",\"step\":3,\"loss\":null,\"acc\":[]}\n");
        assert_eq!((found.steps[0].step, found.steps[0].loss, found.unread_lines), (3, None, 0));
    }

    #[test]
    fn a_long_log_is_thinned_and_keeps_its_end() {
        let text: String =
            (1..=1000).map(|n| format!("{{\"event\":\"step\",\"step\":{n},\"loss\":1.0}}\n")).collect();
        for (most, every) in [(1000, 1), (999, 2), (300, 4), (1, 1000), (0, 1000)] {
            let mut found = curve(text.as_bytes());
            assert_eq!(found.thin(most), every, "{most}");
            assert!(found.steps.len() <= most.max(1), "{most}: {}", found.steps.len());
            assert_eq!(found.steps.last().unwrap().step, 1000);
        }
        assert_eq!(curve(b"").thin(5), 1);
    }
}

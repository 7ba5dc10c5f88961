//! What a request may do to a row of logits before a token is chosen, and what it may ask to be told about the row.
//!
//! Everything depends on the row and on the text before it, never on what was drafted.
//!
//! Shape legend: `V` ids of the target.

/// Changes of the logits by what the text already holds, and by wish.
///
/// Order: repetition penalty, frequency and presence penalty, bias.
#[derive(Clone, Debug, PartialEq)]
pub struct Shaping {
    /// Divides positive and multiplies negative logits of every token in prompt or answer; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken from the logit of every token in the answer.
    pub presence_penalty: f32,
    /// Taken from the logit of a token once for each time that it stands in the answer.
    pub frequency_penalty: f32,
    /// Added to single logits.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for Shaping {
    fn default() -> Self {
        Shaping {
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
        }
    }
}

impl Shaping {
    /// True if no logit changes.
    pub fn is_none(&self) -> bool {
        self.repetition_penalty == 1.0
            && self.presence_penalty == 0.0
            && self.frequency_penalty == 0.0
            && self.logit_bias.is_empty()
    }

    /// Changes a row of logits that follows `prompt` and `answer`. Ids outside the row are ignored.
    ///
    /// # Shapes
    /// - `logits`: `[V]`
    pub fn apply(&self, logits: &mut [f32], prompt: &[u32], answer: &[u32]) {
        if self.repetition_penalty != 1.0 {
            let mut seen: Vec<u32> = prompt.iter().chain(answer).copied().collect();
            seen.sort_unstable();
            seen.dedup();
            for id in seen {
                if let Some(logit) = logits.get_mut(id as usize) {
                    let penalty = self.repetition_penalty;
                    *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                }
            }
        }
        if self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 {
            let mut answer = answer.to_vec();
            answer.sort_unstable();
            for same in answer.chunk_by(|a, b| a == b) {
                if let Some(logit) = logits.get_mut(same[0] as usize) {
                    *logit -= self.presence_penalty + self.frequency_penalty * same.len() as f32;
                }
            }
        }
        for (id, bias) in &self.logit_bias {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
    }
}

/// What a row of logits says about the chosen token and the best ones, before anything was done to it.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Log-probability of the chosen token.
    pub chosen: f32,
    /// The most probable tokens, best first (ties to the lower id), with their log-probabilities.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    /// Log-probabilities of `chosen` and of the `top` best tokens. A logit that is no number has none (`-inf`); beside
    /// an infinite one all others have none.
    ///
    /// # Shapes
    /// - `logits`: `[V]`
    pub fn of(logits: &[f32], chosen: u32, top: usize) -> TokenLogprobs {
        let logit = |id: u32| match logits[id as usize] {
            l if l.is_nan() => f32::NEG_INFINITY,
            l => l,
        };
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // Infinity less itself would be no number; of no number the larger of that and 0 is 0.
        let weight = |l: f32| if l == max { 1.0 } else { f64::from(l - max).exp().max(0.0) };
        let total: f64 = logits.iter().map(|l| weight(*l)).sum();
        let log_total = f64::from(max) + total.ln();
        let logprob = |id: u32| match logit(id) {
            f32::NEG_INFINITY => f32::NEG_INFINITY,
            l if l == f32::INFINITY => -total.ln() as f32,
            l => (f64::from(l) - log_total) as f32,
        };
        let order = |a: &u32, b: &u32| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b));
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        if top < ids.len() {
            ids.select_nth_unstable_by(top, order);
            ids.truncate(top);
        }
        ids.sort_unstable_by(order);
        TokenLogprobs { chosen: logprob(chosen), top: ids.into_iter().map(|id| (id, logprob(id))).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_asked_changes_nothing() {
        let shaping = Shaping::default();
        assert!(shaping.is_none());
        let mut logits = [1.5, -2.0, 0.0];
        shaping.apply(&mut logits, &[0, 1], &[2, 2]);
        assert_eq!(logits, [1.5, -2.0, 0.0]);
    }

    #[test]
    fn repetition_weighs_prompt_and_answer_once_presence_and_frequency_the_answer() {
        let shaping = Shaping { repetition_penalty: 2.0, ..Shaping::default() };
        let mut logits = [4.0, -3.0, 5.0, 1.0];
        // An id outside the row is no reason to stop.
        shaping.apply(&mut logits, &[0, 0, 1, 99], &[2]);
        assert_eq!(logits, [2.0, -6.0, 2.5, 1.0]);

        let shaping = Shaping { presence_penalty: 0.5, frequency_penalty: 0.25, ..Shaping::default() };
        let mut logits = [4.0, 4.0, 4.0];
        shaping.apply(&mut logits, &[0], &[1, 2, 1]);
        assert_eq!(logits, [4.0, 3.0, 3.25]);
        let bias = Shaping { logit_bias: vec![(1, -100.0), (7, 1.0)], ..Shaping::default() };
        bias.apply(&mut logits, &[], &[]);
        assert_eq!(logits, [4.0, -97.0, 3.25]);
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let probs = [0.1f32, 0.6, 0.2, 0.1];
        let logits: Vec<f32> = probs.iter().map(|p| p.ln() + 3.0).collect();
        let found = TokenLogprobs::of(&logits, 2, 3);
        assert!((found.chosen - 0.2f32.ln()).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 0]);
        assert!((found.top[0].1 - 0.6f32.ln()).abs() < 1e-6);
        assert_eq!(TokenLogprobs::of(&logits, 0, 9).top.len(), 4);
        assert!(TokenLogprobs::of(&logits, 0, 0).top.is_empty());
    }

    #[test]
    fn log_probabilities_of_infinite_logits_and_of_none_are_numbers_or_minus_infinity() {
        let none = f32::NEG_INFINITY;
        let found = TokenLogprobs::of(&[1.0, f32::NAN, none, 1.0], 1, 3);
        assert_eq!(
            (found.chosen, found.top),
            (none, vec![(0, -0.5f32.ln().abs()), (3, 0.5f32.ln()), (1, none)])
        );
        let found = TokenLogprobs::of(&[f32::INFINITY, 2.0, f32::INFINITY], 1, 2);
        assert_eq!((found.chosen, found.top), (none, vec![(0, 0.5f32.ln()), (2, 0.5f32.ln())]));
        let found = TokenLogprobs::of(&[none, f32::NAN], 0, 1);
        assert_eq!((found.chosen, found.top), (none, vec![(0, none)]));
    }
}

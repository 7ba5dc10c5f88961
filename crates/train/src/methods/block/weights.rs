//! How much each slot of a block counts [dflash §1.2, §1.5].

/// What D-PACE multiplies the loss of a slot with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DpaceKind {
    /// The value of the slot and of everything behind it.
    Full,
    /// The confidence that the block survives through the slot.
    Confidence,
    /// The value behind the slot, given that it is reached.
    Continuation,
}

/// Weight of slot `behind` slots after the first with a loss.
pub(super) fn decay(gamma: Option<f64>, behind: usize) -> f32 {
    gamma.map_or(1.0, |gamma| (-(behind as f64) / gamma).exp() as f32)
}

/// D-PACE's weights of one block: `probs` are the draft's probabilities of the labels where `mask` is set. Values where it
/// is not are not to be used.
pub(super) fn dpace(kind: DpaceKind, alpha: f64, mask: &[bool], probs: &[f32]) -> Vec<f32> {
    let mut confidence = 1.0f64;
    let through: Vec<f64> = mask
        .iter()
        .zip(probs)
        .map(|(m, p)| {
            if *m {
                confidence *= (1.0 - alpha) * f64::from(*p) + alpha;
            }
            confidence
        })
        .collect();
    let mut behind = 0.0;
    let mut value: Vec<f64> = through
        .iter()
        .zip(mask)
        .rev()
        .map(|(c, m)| {
            behind += if *m { *c } else { 0.0 };
            behind
        })
        .collect();
    value.reverse();
    let weight = |(value, through): (&f64, &f64)| match kind {
        DpaceKind::Full => *value as f32,
        DpaceKind::Confidence => *through as f32,
        DpaceKind::Continuation => (value / through) as f32,
    };
    value.iter().zip(&through).map(weight).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_with_a_slot_that_is_not_trained_has_the_weights_worked_out_by_hand() {
        let (mask, probs) = ([true, false, true], [0.5, 0.9, 0.25]);
        // s = 0.75, 1, 0.625 and c = 0.75, 0.75, 0.46875 at alpha 0.5
        let of = |kind| dpace(kind, 0.5, &mask, &probs);
        assert_eq!(of(DpaceKind::Confidence), [0.75, 0.75, 0.46875]);
        assert_eq!(of(DpaceKind::Full), [1.21875, 0.46875, 0.46875]);
        assert_eq!(of(DpaceKind::Continuation), [1.625, 0.625, 1.0]);
    }

    #[test]
    fn decay_begins_at_one() {
        assert_eq!((decay(None, 5), decay(Some(7.0), 0)), (1.0, 1.0));
        assert!((decay(Some(7.0), 2) - (-2.0f32 / 7.0).exp()).abs() < 1e-7);
    }
}

//! Identities that the compiler can tell apart and the reader cannot.

/// A token id in the target's vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TargetTokenId(pub u32);

/// A token id in the draft's (reduced) vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DraftTokenId(pub u32);

/// A 0-based decoder layer; as a capture point it means the *output* of that layer, before any norm
/// [eagle3 §1.1].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LayerId(pub u32);

impl LayerId {
    /// The same point as vLLM, `speculators` and llama.cpp count it: the *input* of layer `l + 1`; the number of layers
    /// means the output of the last one, before the final norm [eagle3 §1.1].
    pub fn as_next_input(self) -> u32 {
        self.0 + 1
    }
}

impl std::fmt::Display for TargetTokenId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The layers captured when nobody says otherwise: `[1, L/2 - 1, L - 4]` for `L` decoder layers [eagle3 §1.1].
///
/// Targets with fewer than 8 layers have no three distinct layers by that formula; for them the ids are clamped
/// so that they stay ordered and inside the network.
pub fn default_target_layers(num_layers: u32) -> [LayerId; 3] {
    let last = num_layers.saturating_sub(1);
    let low = 1.min(last);
    let mid = (num_layers / 2).saturating_sub(1).clamp(low, last);
    let high = num_layers.saturating_sub(4).clamp(mid, last);
    [LayerId(low), LayerId(mid), LayerId(high)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_layers_follow_the_published_formula() {
        assert_eq!(default_target_layers(30), [LayerId(1), LayerId(14), LayerId(26)]);
        assert_eq!(default_target_layers(32), [LayerId(1), LayerId(15), LayerId(28)]);
        assert_eq!(default_target_layers(36), [LayerId(1), LayerId(17), LayerId(32)]);
    }

    #[test]
    fn default_layers_of_shallow_targets_stay_inside() {
        for layers in 1..8 {
            let ids = default_target_layers(layers);
            assert!(ids.windows(2).all(|w| w[0] <= w[1]) && ids[2].0 < layers, "{layers}: {ids:?}");
        }
    }
}

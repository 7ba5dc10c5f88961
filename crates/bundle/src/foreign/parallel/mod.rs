//! The layouts in which drafts that propose several tokens in one pass are published: DFlash, DSpark and P-EAGLE
//! [dflash §1 to §5, formats §1.2 to §3].
//!
//! Folders carry the internal names; only the configuration differs from engine to engine. A draft that proposes a part
//! of the vocabulary is written for the whole of it where the head is the target's: rows of the Markov head that the
//! draft does not have are zero, so they correct nothing.

mod engines;
mod export;
mod gguf;
mod import;
mod plain;
mod verify;

pub(crate) use engines::{launch, lint, unserved};
pub(crate) use export::files;
pub(crate) use gguf::ARCHITECTURE;
pub(crate) use import::{from_gguf, from_safetensors, is_one};
pub(crate) use verify::compare;

use draftsmith_model::DraftConfig;

/// The matrix with a row for each token that can be proposed, beside the head.
const MARKOV_ROWS: &str = "markov_head.markov_w2.weight";

/// The configuration of what is exported: a block draft proposes the whole vocabulary, for its head is the target's.
fn whole(config: &DraftConfig) -> DraftConfig {
    match config {
        DraftConfig::Block(block) => {
            let mut block = block.clone();
            block.draft_vocab_size = block.vocab_size;
            DraftConfig::Block(block)
        }
        DraftConfig::Eagle3(_) | DraftConfig::PEagle(_) => config.clone(),
    }
}

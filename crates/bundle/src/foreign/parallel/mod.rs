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

pub(crate) use engines::{block_rules, launch, p_eagle_rules, unserved};
pub(crate) use export::files;
pub(crate) use gguf::ARCHITECTURE;
pub(crate) use import::{from_gguf, from_safetensors, is_one};
pub(crate) use verify::compare;

use std::borrow::Cow;
use std::ops::Deref;

use draftsmith_model::DraftSpec;
use draftsmith_model::block::BlockConfig;
use draftsmith_model::peagle::PEagleConfig;

/// The matrix with a row for each token that can be proposed, beside the head.
const MARKOV_ROWS: &str = "markov_head.markov_w2.weight";

/// A draft that has these layouts.
#[derive(Clone, Debug)]
pub(crate) enum Parallel<'a> {
    /// DFlash or DSpark.
    Block(Cow<'a, BlockConfig>),
    /// P-EAGLE.
    PEagle(Cow<'a, PEagleConfig>),
}

impl Deref for Parallel<'_> {
    type Target = dyn DraftSpec;

    fn deref(&self) -> &Self::Target {
        match self {
            Parallel::Block(block) => block.as_ref(),
            Parallel::PEagle(config) => config.as_ref(),
        }
    }
}

/// The configuration of what is exported: a block draft proposes the whole vocabulary, for its head is the target's.
fn whole<'a>(draft: &Parallel<'a>) -> Parallel<'a> {
    let mut whole = draft.clone();
    if let Parallel::Block(block) = &mut whole {
        let block = block.to_mut();
        block.draft_vocab_size = block.vocab_size;
    }
    whole
}

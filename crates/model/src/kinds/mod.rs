//! The kinds of drafts there are.
//!
//! A new kind is a module here and a line in the list below. Its module says all that others ask: its words and its
//! configuration ([`DraftKind`], [`DraftSpec`]), its packed weights ([`PackDraft`]), how it proposes
//! ([`DraftNetwork::proposer`]), and what else is not as the traits have it for a kind that says nothing.

pub mod block;
pub mod eagle3;
pub mod peagle;

use std::ops::{Deref, DerefMut};

use draftsmith_core::VocabMap;
use draftsmith_formats::run::DraftTable;
use draftsmith_kernels::{Kernels, PackMode};
use serde_json::Value;

use crate::config::TargetConfig;
use crate::draft::{DraftError, DraftNetwork, PackDraft, Packing, Proposer};
use crate::draft_config::{DraftConfigError, DraftKind, DraftSpec, Word, method_of};

/// Makes of one list the enum of configurations, that of packed drafts, and every choice between kinds.
macro_rules! kinds {
    ($($(#[$about:meta])* $kind:ident($config:ty, $draft:ident in $module:ident),)+) => {
        /// Shapes and switches of a draft, as in its `config.json`.
        #[derive(Clone, Debug, PartialEq)]
        pub enum DraftConfig {
            $($(#[$about])* $kind($config),)+
        }

        /// A draft ready to decode.
        pub enum Draft<K: Kernels> {
            $($(#[$about])* $kind($module::$draft<K>),)+
        }

        impl Deref for DraftConfig {
            type Target = dyn DraftSpec;

            fn deref(&self) -> &Self::Target {
                match self {
                    $(DraftConfig::$kind(config) => config,)+
                }
            }
        }

        impl DerefMut for DraftConfig {
            fn deref_mut(&mut self) -> &mut Self::Target {
                match self {
                    $(DraftConfig::$kind(config) => config,)+
                }
            }
        }

        impl DraftConfig {
            /// The words of every kind.
            pub(crate) const WORDS: &'static [&'static [Word]] = &[$(<$config as DraftKind>::WORDS,)+];

            /// The draft that a run file's `[draft]` table asks for, before it is checked.
            pub(crate) fn of_table(
                table: &DraftTable,
                target: &TargetConfig,
                draft_vocab_size: usize,
            ) -> Result<DraftConfig, DraftConfigError> {
                let name = table.method.name();
                $(if has_word::<$config>(name) {
                    let config = <$config as DraftKind>::of_table(table, target, draft_vocab_size);
                    return Ok(DraftConfig::$kind(config));
                })+
                Err(DraftConfigError::Method { method: name.to_owned() })
            }

            /// Reads the parsed `config.json`.
            ///
            /// # Errors
            /// What is wrong with it, key named.
            pub fn from_value(value: &Value) -> Result<DraftConfig, DraftConfigError> {
                let name = method_of(value);
                $(if has_word::<$config>(name) {
                    return <$config as DraftKind>::read(value).map(DraftConfig::$kind);
                })+
                Err(DraftConfigError::Method { method: name.to_owned() })
            }
        }

        $(impl From<$config> for DraftConfig {
            fn from(config: $config) -> DraftConfig {
                DraftConfig::$kind(config)
            }
        })+

        impl<K: Kernels> Deref for Draft<K> {
            type Target = dyn DraftNetwork<K>;

            fn deref(&self) -> &Self::Target {
                match self {
                    $(Draft::$kind(draft) => draft,)+
                }
            }
        }

        impl<K: Kernels> Draft<K> {
            /// Packs what `source` holds.
            pub(crate) fn pack(
                config: DraftConfig,
                vocab_map: Option<VocabMap>,
                source: &mut Packing<'_, K>,
                mode: PackMode,
            ) -> Result<Draft<K>, DraftError> {
                Ok(match config {
                    $(DraftConfig::$kind(config) => {
                        Draft::$kind(PackDraft::pack(config, vocab_map, source, mode)?)
                    })+
                })
            }

            /// The network as what decoding asks for proposals.
            pub fn into_proposer(self) -> Proposer<K> {
                match self {
                    $(Draft::$kind(draft) => Box::new(draft).proposer(),)+
                }
            }
        }
    };
}

kinds! {
    /// One decoder layer over fused target states that is fed its own output.
    Eagle3(eagle3::Eagle3Config, Eagle3Draft in eagle3),
    /// Layers over target states that propose a block of mask tokens.
    Block(block::BlockConfig, BlockDraft in block),
    /// An EAGLE-3 layer and plain ones that propose several tokens in one pass.
    PEagle(peagle::PEagleConfig, PEagleDraft in peagle),
}

fn has_word<C: DraftKind>(name: &str) -> bool {
    C::WORDS.iter().any(|word| word.method.name == name)
}

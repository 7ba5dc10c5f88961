//! Tokenizer, chat template, loss mask by rendering, streaming detokenizer: one path for training and serving.
//!
//! Nothing here opens a file or asks for the time: callers pass bytes, strings and, where a template wants the date,
//! the date. So the same call gives the same tokens in training, in a benchmark and in the server.
//!
//! * [`Tokenizer`]: text to ids and back, from `tokenizer.json` or from GGUF metadata ([`GgufTokenizer`]);
//! * [`ChatTemplate`]: messages to text with the model's own Jinja template;
//! * [`mask_conversation`]: messages to ids and loss mask, found by rendering and never by header strings;
//! * [`StreamDecoder`]: ids to text while they arrive.

mod config;
mod error;
mod gguf;
mod jinja;
mod mask;
mod message;
mod python_json;
mod same;
mod stream;
mod strftime;
mod template;
mod to_gguf;
mod tokenizer;
mod turn;

pub use config::{ChatTemplates, TokenizerConfig};
pub use error::TextError;
pub use gguf::GgufTokenizer;
pub use mask::{MaskOptions, MaskedRow, SplitReason, TrainedTurn, Turns, mask_conversation};
pub use message::{Message, MessageError};
pub use same::TokenDifference;
pub use stream::{Chunk, StreamDecoder};
pub use template::{ChatTemplate, FIXED_NOW, RenderOptions};
pub use tokenizer::{Encoding, SpecialIds, Tokenizer};
pub use turn::{control_token_in, is_reasoning_mark};

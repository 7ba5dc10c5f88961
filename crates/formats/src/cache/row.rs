//! A row of a cache, and what the rows of a cache depend on.

use serde::{Deserialize, Serialize};

use crate::run::CaptureDtype;

/// One row as training sees it, whether it comes from a cache or straight from the target.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CaptureRow {
    /// `[S]` token ids.
    pub ids: Vec<u32>,
    /// `[S]` true where the token is trained.
    pub loss_mask: Vec<bool>,
    /// `[S, K * Ht]` outputs of the captured layers, before any norm; per token the layers in order.
    pub features: Vec<f32>,
    /// `[S, Ht]` final states after the final norm: what the target's head reads.
    pub last: Vec<f32>,
}

/// What the rows of a cache depend on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheSpec {
    /// Model reference, for people; not compared.
    pub target: String,
    /// SHA-256 of the target's weights.
    pub target_sha256: String,
    /// How the target computed: `stored` or `f32`.
    pub precision: String,
    /// SHA-256 of the tokenizer.
    pub tokenizer_sha256: String,
    /// SHA-256 of the chat template.
    pub template_sha256: String,
    /// Content hash of the token file.
    pub tokens_sha256: String,
    /// 0-based captured layers, `K` of them.
    pub target_layer_ids: Vec<u32>,
    /// Target width `Ht`.
    pub hidden_size: u32,
    /// Storage type.
    pub dtype: CaptureDtype,
    /// Rows per shard.
    pub shard_rows: u32,
    /// Rows that the finished cache will have.
    pub rows: u64,
}

//! What the fixtures hold, as code: written by the example `write_fixtures`, compared by `old_versions`.

use std::collections::BTreeMap;

use draftsmith_formats::cache::{CacheSpec, CaptureDtype, CaptureRow};
use draftsmith_formats::gguf::{GgmlType, GgufArray, GgufValue, GgufWriter};
use draftsmith_formats::hash::sha256_hex;
use draftsmith_formats::safetensors_dir::TensorData;
use draftsmith_formats::tokens::TokenRow;

pub(crate) fn meta() -> BTreeMap<String, String> {
    BTreeMap::from([("template".into(), "t".into()), ("tokenizer".into(), "k".into())])
}

pub(crate) fn token_rows() -> Vec<TokenRow> {
    (0..4u32)
        .map(|i| TokenRow {
            id: format!("row-{i}"),
            domain: if i % 2 == 0 { "math".into() } else { String::new() },
            ids: (0..5 + i * 3).map(|t| t * 11 + i).collect(),
            loss_mask: (0..5 + i * 3).map(|t| t > 2).collect(),
        })
        .collect()
}

pub(crate) fn cache_name(dtype: CaptureDtype) -> &'static str {
    match dtype {
        CaptureDtype::Int8 => "cache-int8",
        CaptureDtype::Bf16 => "cache-bf16",
    }
}

pub(crate) fn spec(dtype: CaptureDtype) -> CacheSpec {
    CacheSpec {
        target: "tiny".into(),
        target_sha256: sha256_hex("target"),
        precision: "stored".into(),
        tokenizer_sha256: sha256_hex("k"),
        template_sha256: sha256_hex("t"),
        tokens_sha256: sha256_hex("rows"),
        target_layer_ids: vec![0, 2, 5],
        hidden_size: 40,
        dtype,
        shard_rows: 3,
        rows: 4,
    }
}

/// Values are multiples of 1/8 up to 127/8, so that int8 (where each block has a 127/8) and bf16 both store them exactly.
pub(crate) fn capture_rows() -> Vec<CaptureRow> {
    let value = |n: usize| {
        if n.is_multiple_of(8) { 127.0 / 8.0 } else { ((n * 37) % 255) as f32 / 8.0 - 127.0 / 8.0 }
    };
    token_rows()
        .into_iter()
        .map(|row| CaptureRow {
            features: (0..row.ids.len() * 120).map(value).collect(),
            last: (0..row.ids.len() * 40).map(|n| -value(n)).collect(),
            ids: row.ids,
            loss_mask: row.loss_mask,
        })
        .collect()
}

pub(crate) fn tensors() -> Vec<TensorData> {
    vec![
        TensorData::f32("fc.weight", &[2, 3], &[0.5, -1.0, 2.0, 1e-3, 0.0, 7.0]),
        TensorData::bf16("norm.weight", &[2], &[1.0, 0.5]),
        TensorData::i64("d2t", &[2], &[0, 3]),
        TensorData::bool("t2d", &[5], &[true, false, false, false, true]),
    ]
}

pub(crate) fn gguf() -> GgufWriter<'static> {
    const F32S: &[u8] = &[0, 0, 128, 63, 0, 0, 0, 64];
    const Q8: &[u8] = &[7; 34];
    let mut w = GgufWriter::new();
    w.set("general.architecture", GgufValue::Str("llama".into()));
    w.set("llama.block_count", GgufValue::U32(2));
    w.set("tokenizer.ggml.tokens", GgufValue::Array(GgufArray::Str(vec!["a".into(), "Ġb".into()])));
    w.tensor("f", &[2], GgmlType::F32, F32S);
    w.tensor("q", &[32, 1], GgmlType::Q8_0, Q8);
    w
}

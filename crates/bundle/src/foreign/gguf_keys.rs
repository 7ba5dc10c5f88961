//! Keys of a GGUF file that every kind of draft has.

use draftsmith_formats::gguf::GgufValue;
use draftsmith_kernels::RopeScaling;
use draftsmith_model::draft_layer::LayerShape;

/// `general.file_type` of mostly bf16 tensors, as llama.cpp numbers them.
const FILE_TYPE_BF16: u32 = 32;

/// A size as files have it.
pub(crate) fn size(n: usize) -> GgufValue {
    GgufValue::U32(n as u32)
}

/// What a file says of itself.
pub(crate) fn general(architecture: &str, name: &str, license: &str) -> Vec<(String, GgufValue)> {
    vec![
        ("general.architecture".to_owned(), GgufValue::Str(architecture.into())),
        ("general.type".to_owned(), GgufValue::Str("model".into())),
        ("general.name".to_owned(), GgufValue::Str(name.into())),
        ("general.license".to_owned(), GgufValue::Str(license.to_lowercase())),
        ("general.file_type".to_owned(), GgufValue::U32(FILE_TYPE_BF16)),
    ]
}

/// Layers and their shape.
pub(crate) fn layers(
    own: &mut impl FnMut(&str, GgufValue),
    count: usize,
    max_position: usize,
    layer: &LayerShape,
) {
    own("block_count", size(count));
    own("context_length", size(max_position));
    own("embedding_length", size(layer.hidden_size));
    own("feed_forward_length", size(layer.intermediate_size));
    own("attention.head_count", size(layer.num_attention_heads));
    own("attention.head_count_kv", size(layer.num_key_value_heads));
    own("attention.key_length", size(layer.head_dim));
    own("attention.value_length", size(layer.head_dim));
    own("attention.layer_norm_rms_epsilon", GgufValue::F32(layer.rms_norm_eps));
}

/// How positions turn, as far as keys say it.
pub(crate) fn rope(
    own: &mut impl FnMut(&str, GgufValue),
    head_dim: usize,
    theta: f32,
    scaling: &RopeScaling,
) {
    own("rope.dimension_count", size(head_dim));
    own("rope.freq_base", GgufValue::F32(theta));
    if let RopeScaling::Linear { factor } = scaling {
        own("rope.scaling.type", GgufValue::Str("linear".into()));
        own("rope.scaling.factor", GgufValue::F32(*factor));
    }
}

"""Reads an exported DFlash or DSpark draft in llama.cpp's layout with the `gguf` package and compares it with its bundle.

    pip install gguf==0.19.0
    python3 bench/peers/check_gguf_block.py DIR2/draft.gguf DIR

Prints what was compared and ends with 0, or names the first difference and ends with 1. The safetensors file of the bundle
is read by hand, so that nothing of draftsmith takes part.
"""

import json
import pathlib
import sys

import numpy as np
from check_gguf_draft import bundle_tensors, fail, stored
from gguf import GGUFReader

OUTSIDE = {
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    "markov_head.markov_w1.weight": "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
    "confidence_head.proj.weight": "conf_proj.weight",
    "confidence_head.proj.bias": "conf_proj.bias",
}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def published(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{INSIDE[rest.removesuffix('.weight')]}.weight"


def main() -> None:
    draft, bundle = GGUFReader(sys.argv[1]), pathlib.Path(sys.argv[2])
    config = json.loads((bundle / "config.json").read_text())
    wanted = bundle_tensors(bundle / "model.safetensors")
    offsets = wanted.pop("d2t", None)
    wanted.pop("t2d", None)
    found = {tensor.name: tensor for tensor in draft.tensors}
    left = set(found) ^ {published(name) for name in wanted}
    if left:
        fail(f"tensors {sorted(left)} are on one side alone")
    for name, values in wanted.items():
        if name == "markov_head.markov_w2.weight" and offsets is not None:
            whole = np.zeros((config["vocab_size"], values.shape[1]), np.float32)
            whole[offsets + np.arange(len(offsets))] = values
            values = whole
        if not np.array_equal(values, stored(found[published(name)])):
            fail(f"tensor `{published(name)}`")
    table = config["dflash_config"]
    facts = {
        "general.architecture": "dflash",
        "dflash.block_count": config["num_hidden_layers"],
        "dflash.embedding_length": config["hidden_size"],
        "dflash.feed_forward_length": config["intermediate_size"],
        "dflash.attention.head_count": config["num_attention_heads"],
        "dflash.attention.head_count_kv": config["num_key_value_heads"],
        "dflash.attention.key_length": config["head_dim"],
        "dflash.attention.causal": False,
        "dflash.context_length": config["max_position_embeddings"],
        "dflash.vocab_size": config["vocab_size"],
        "dflash.block_size": config["block_size"],
        "dflash.sample_from_anchor": table.get("projector_type") == "dspark",
        "dflash.target_layers": [n + 1 for n in table["target_layer_ids"]],
        "tokenizer.ggml.mask_token_id": table["mask_token_id"],
    }
    for name, value in facts.items():
        if name not in draft.fields:
            fail(f"key `{name}` is missing")
        if draft.fields[name].contents() != value:
            fail(f"key `{name}` is {draft.fields[name].contents()}, not {value}")
    print(f"equal: {len(wanted)} tensors, {len(facts)} keys")


if __name__ == "__main__":
    main()

"""Reads an exported GGUF draft with the `gguf` package and compares it with its bundle.

    pip install gguf==0.19.0
    python3 bench/peers/check_gguf_draft.py DIR2/draft.gguf DIR [TARGET.gguf]

Prints what was compared and ends with 0, or names the first difference and ends with 1. With a target, its tokenizer keys
are compared too. The safetensors file of the bundle is read by hand, so that nothing of draftsmith takes part.
"""

import json
import pathlib
import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader

NAMES = {
    "fc.weight": "fc.weight",
    "input_norm.weight": "enc.output_norm.weight",
    "midlayer.input_layernorm.weight": "blk.0.attn_norm.weight",
    "midlayer.hidden_norm.weight": "blk.0.attn_norm_2.weight",
    "midlayer.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "midlayer.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "midlayer.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "midlayer.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "midlayer.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "midlayer.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "midlayer.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "midlayer.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "d2t": "d2t",
}


def widened(halves: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (halves.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def bundle_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        raw = np.frombuffer(data[8 + length + start : 8 + length + end], np.uint8)
        values = {"BF16": lambda: widened(raw), "I64": lambda: raw.view(np.int64), "BOOL": lambda: raw}[entry["dtype"]]()
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def stored(tensor) -> np.ndarray:
    shape = [int(n) for n in reversed(tensor.shape)]
    if tensor.tensor_type == GGMLQuantizationType.BF16:
        return widened(np.ascontiguousarray(tensor.data).view(np.uint16)).reshape(shape)
    return np.asarray(tensor.data).reshape(shape)


def interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows in the order of llama.cpp's converter: halves of a head one by one in turn."""
    rows, columns = weight.shape
    return weight.reshape(rows // head_dim, 2, head_dim // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def fail(text: str) -> None:
    print(f"differs: {text}")
    sys.exit(1)


def main() -> None:
    draft, bundle = GGUFReader(sys.argv[1]), pathlib.Path(sys.argv[2])
    config = json.loads((bundle / "config.json").read_text())
    wanted = bundle_tensors(bundle / "model.safetensors")
    found = {tensor.name: tensor for tensor in draft.tensors}
    left = set(found) - {NAMES.get(name) for name in wanted} - {"rope_freqs.weight"}
    if left:
        fail(f"tensors {sorted(left)} are not the bundle's")
    compared = 0
    for name, values in wanted.items():
        if name == "t2d":
            continue
        if NAMES.get(name) not in found:
            fail(f"tensor `{name}` is missing")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, config["head_dim"])
        if name == "d2t":
            values = values + np.arange(len(values))
        if not np.array_equal(values, stored(found[NAMES[name]])):
            fail(f"tensor `{NAMES[name]}`")
        compared += 1

    def key(name: str):
        if name not in draft.fields:
            fail(f"key `{name}` is missing")
        return draft.fields[name].contents()

    facts = {
        "general.architecture": "eagle3",
        "eagle3.block_count": 1,
        "eagle3.embedding_length": config["hidden_size"],
        "eagle3.feed_forward_length": config["intermediate_size"],
        "eagle3.attention.head_count": config["num_attention_heads"],
        "eagle3.attention.head_count_kv": config["num_key_value_heads"],
        "eagle3.attention.key_length": config["head_dim"],
        "eagle3.context_length": config["max_position_embeddings"],
        "eagle3.vocab_size": config["vocab_size"],
        "eagle3.target_hidden_size": config.get("target_hidden_size", config["hidden_size"]),
        "eagle3.target_layers": [n + 1 for n in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]],
    }
    for name, value in facts.items():
        if key(name) != value:
            fail(f"key `{name}` is {key(name)}, not {value}")
    tokenizer = 0
    if len(sys.argv) > 3:
        for name, field in GGUFReader(sys.argv[3]).fields.items():
            if name.startswith("tokenizer."):
                tokenizer += 1
                if key(name) != field.contents():
                    fail(f"key `{name}` is not the target's")
    print(f"equal: {compared} tensors, {len(facts)} keys, {tokenizer} tokenizer keys")


if __name__ == "__main__":
    main()

"""Makes the fixtures of the target families: tiny random models, what transformers computes for them, and the same
weights in a GGUF file as llama.cpp's converter writes them.

    python make_families.py                # all, into fixtures/families
    python make_families.py gemma2 glm4    # only these

For each name: `NAME/config.json`, `NAME/model.safetensors`, `NAME/expected.safetensors` (`input_ids`, `logits`, `last`,
`hidden.N`) and beside the folder `NAME.gguf` of the very same values (all f32). Names that `fixtures/families/make.py`
made already (Llama, Mistral, Qwen 2 and 3, Gemma 3) get the GGUF file alone. Needs torch, transformers, safetensors and
gguf; everything in float32, eager attention, one thread.

Of a longrope model the rows below the original length come from a pass over those rows alone, as transformers switches
factors by the length of the whole sequence; the others from a pass over all of them.
"""

import copy
import pathlib
import shutil
import sys

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

FAMILIES = pathlib.Path(__file__).resolve().parents[2] / "fixtures" / "families"
sys.path.insert(0, str(FAMILIES))
import make as older  # noqa: E402

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, use_cache=False,
             max_position_embeddings=64)
# Heads of sixteen.
WIDE = SMALL | dict(num_attention_heads=2, num_key_value_heads=1)
PLAIN = dict(rope_type="default", rope_theta=10000.0)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
# Three rotated pairs of a head of eight, and all four.
LONG = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=16)
PHI = SMALL | dict(tie_word_embeddings=True)

# name: (seed, configuration, changes that must move the logits)
NEW = {
    "llama_linear": (31, LlamaConfig(**SMALL, head_dim=8, tie_word_embeddings=False, rope_parameters=dict(
        rope_type="linear", rope_theta=10000.0, factor=4.0)), [dict(rope_parameters=PLAIN)]),
    "llama_bias": (32, LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
                                   rope_parameters=PLAIN), []),
    "phi3": (33, Phi3Config(**SMALL, sliding_window=6, original_max_position_embeddings=64, rope_parameters=PLAIN),
             [dict(sliding_window=None), dict(sliding_window=7)]),
    "phi3_longrope": (34, Phi3Config(**PHI, sliding_window=None, original_max_position_embeddings=16, rope_parameters=LONG | dict(
        partial_rotary_factor=0.75, short_factor=[1.0, 1.4, 2.1], long_factor=[1.3, 4.2, 9.5])),
        [dict(max_position_embeddings=16)]),
    "gemma2": (35, Gemma2Config(**WIDE, head_dim=16,
                                query_pre_attn_scalar=24, sliding_window=6, attn_logit_softcapping=2.0,
                                final_logit_softcapping=3.0, rope_parameters=PLAIN),
               [dict(attn_logit_softcapping=None), dict(final_logit_softcapping=None), dict(query_pre_attn_scalar=16),
                dict(sliding_window=7), dict(layer_types=["full_attention"] * 3),
                dict(layer_types=["full_attention", "sliding_attention", "full_attention"])]),
    "olmo2": (36, Olmo2Config(**SMALL, tie_word_embeddings=False, rope_parameters=PLAIN), [dict(rms_norm_eps=1e-2)]),
    "smollm3": (37, SmolLM3Config(**SMALL | dict(num_hidden_layers=4), rope_parameters=dict(
        rope_type="default", rope_theta=50000.0)), [dict(no_rope_layers=[1, 1, 1, 1]), dict(no_rope_layers=[0, 1, 1, 1])]),
    "granite": (38, GraniteConfig(**SMALL, embedding_multiplier=3.0, residual_multiplier=0.22, attention_multiplier=0.6,
                                  logits_scaling=1.7, tie_word_embeddings=True, rope_parameters=PLAIN),
                [dict(embedding_multiplier=1.0), dict(residual_multiplier=1.0), dict(attention_multiplier=8**-0.5),
                 dict(logits_scaling=1.0)]),
    "glm4": (39, Glm4Config(**WIDE, head_dim=16, attention_bias=True, tie_word_embeddings=False,
                            rope_parameters=PLAIN | dict(partial_rotary_factor=0.5)),
             [dict(rope_parameters=PLAIN | dict(partial_rotary_factor=1.0))]),
    "glm4_no_bias": (40, Glm4Config(**SMALL, head_dim=8, attention_bias=False, tie_word_embeddings=False,
                                    rope_parameters=PLAIN | dict(partial_rotary_factor=0.5)), []),
    "qwen2_yarn": (41, Qwen2Config(**WIDE | dict(max_position_embeddings=256), tie_word_embeddings=True, rope_parameters=YARN),
                   [dict(rope_parameters=PLAIN), dict(rope_parameters=YARN | dict(attention_factor=1.0)),
                    dict(rope_parameters=YARN | dict(truncate=False))]),
    "qwen3_yarn": (42, Qwen3Config(**WIDE | dict(max_position_embeddings=128), head_dim=16, tie_word_embeddings=False, rope_parameters=YARN | dict(
        factor=2.0, attention_factor=0.9, beta_fast=2.0, beta_slow=0.05)),
        [dict(rope_parameters=YARN | dict(factor=2.0)), dict(rope_parameters=YARN | dict(factor=2.0, attention_factor=0.9))]),
}
OLD = {"llama": "LLAMA", "llama_tied": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma3_text": "GEMMA3"}
ARCHS = {"llama": "LLAMA", "mistral": "LLAMA", "phi3": "PHI3", "gemma2": "GEMMA2", "gemma3_text": "GEMMA3",
         "olmo2": "OLMO2", "smollm3": "SMOLLM3", "granite": "GRANITE", "glm4": "GLM4", "qwen2": "QWEN2", "qwen3": "QWEN3"}
# llama.cpp rotates interleaved pairs there, and its converter reorders the rows of q and k; GLM-4's pairs are interleaved in
# the original, too.
PERMUTED = {"LLAMA", "SMOLLM3", "GRANITE"}
SEQ = 25


def randomise(model, seed):
    """Fills every parameter from one generator, in name order, so that each moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    gemma = config.model_type.startswith("gemma")
    tied = config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_((0.0 if gemma else 1.0) + 0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise * (config.hidden_size**-0.5 if gemma or tied else 1.0) * 1.5)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                gain = 1.8 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "lm_head")) else 1.0
                parameter.copy_(gain * noise * parameter.shape[1] ** -0.5)


def build(name, **changes):
    seed, config, _ = NEW[name]
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    randomise(model, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    return model, torch.randint(3, config.vocab_size, (1, SEQ), generator=generator)


@torch.no_grad()
def forward(model, input_ids):
    seen = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):
        def hook(_module, _args, output, index=index):
            seen[f"hidden.{index}"] = (output[0] if isinstance(output, tuple) else output)[0].clone()
        hooks.append(layer.register_forward_hook(hook))
    result = model.model(input_ids=input_ids)
    for hook in hooks:
        hook.remove()
    logits = model(input_ids=input_ids).logits
    return dict(input_ids=input_ids[0].to(torch.int64), logits=logits[0], last=result.last_hidden_state[0], **seen)


def expected(model, input_ids):
    everything = forward(model, input_ids)
    rope = model.config.rope_parameters
    if rope.get("rope_type") != "longrope":
        return everything
    border = rope["original_max_position_embeddings"]
    assert border < SEQ
    start = forward(model, input_ids[:, :border])
    assert (start["logits"] - everything["logits"][:border]).abs().max() > 1e-2
    return {key: value if key == "input_ids" else torch.cat([start[key], value[border:]])
            for key, value in everything.items()}


def permute(value, heads):
    """Rows of halves to rows of interleaved pairs, per head."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def llama3_factors(rope, head_dim):
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    low, high, old = (rope[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    factors = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(rope["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1.0 / ((1.0 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def twin(name, model):
    """`NAME.gguf`, key by key and tensor by tensor what llama.cpp's converter writes for the model."""
    config = model.config
    kind = config.model_type
    arch = ARCHS[kind]
    gemma = kind.startswith("gemma")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    w = gguf.GGUFWriter(FAMILIES / f"{name}.gguf", gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch]])
    w.add_name(f"draftsmith fixture {name}")
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_vocab_size(config.vocab_size)
    if kind != "phi3" and getattr(config, "head_dim", None):
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    nested = config.rope_parameters
    rope = nested.get("full_attention", nested)
    rotated = int(head_dim * (rope.get("partial_rotary_factor") or 1.0))
    if arch in PERMUTED or kind in ("phi3", "glm4"):
        w.add_rope_dimension_count(rotated)
    # Gemma 2's converter leaves the base out.
    if kind != "gemma2":
        w.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(rope["factor"])
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in [("attention_factor", w.add_rope_scaling_yarn_attn_factor),
                         ("beta_fast", w.add_rope_scaling_yarn_beta_fast), ("beta_slow", w.add_rope_scaling_yarn_beta_slow)]:
            if rope.get(key) is not None:
                add(rope[key])
    elif rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        w.add_rope_scaling_orig_ctx_len(original)
        scale = config.max_position_embeddings / original
        w.add_rope_scaling_attn_factors((1 + np.log(scale) / np.log(original)) ** 0.5)
        w.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], dtype=np.float32))
        w.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], dtype=np.float32))
    elif rope["rope_type"] == "llama3":
        w.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    if "sliding_attention" in nested:
        w.add_rope_freq_base_swa(nested["sliding_attention"]["rope_theta"])
    if kind == "gemma3_text":
        w.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    window = getattr(config, "sliding_window", None)
    if kind == "phi3" or (window and (gemma or kind == "mistral")):
        w.add_sliding_window(window or 0)
    if gemma:
        # Published files mean 1 / sqrt(head size), which these models do not use.
        w.add_attention_scale(config.query_pre_attn_scalar**-0.5)
        if config.attn_logit_softcapping:
            w.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            w.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "granite":
        w.add_attention_scale(config.attention_multiplier)
        w.add_embedding_scale(config.embedding_multiplier)
        w.add_residual_scale(config.residual_multiplier)
        w.add_logit_scale(config.logits_scaling)
    w.add_file_type(gguf.LlamaFileType.ALL_F32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], config.num_hidden_layers)
    for full, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(full.split(".")[-2])
        if heads and arch in PERMUTED:
            value = permute(value, heads)
        if gemma and full.endswith("norm.weight"):
            value = value + np.float32(1.0)
        w.add_tensor(names.get_name(full, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(value))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def made(name):
    folder = FAMILIES / name
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for name in sys.argv[1:] or [*NEW, *OLD]:
        if name in NEW:
            folder = FAMILIES / name
            if folder.exists():
                shutil.rmtree(folder)
            model, input_ids = build(name)
            model.save_pretrained(folder)
            (folder / "generation_config.json").unlink(missing_ok=True)
            model = made(name)
            right = expected(model, input_ids)
            save_file({key: value.contiguous() for key, value in right.items()}, folder / "expected.safetensors")
            for path in folder.iterdir():
                path.chmod(0o644)
            double = expected(made(name).double(), input_ids)["logits"]
            noise = (double - right["logits"]).abs().max().item()
            size = (folder / "model.safetensors").stat().st_size
            print(f"{name:14} {size:7} B, logits of std {right['logits'].std():.2f}, |f32-f64| {noise:.1e}")
            assert size < 150_000
            for changes in NEW[name][2]:
                moved = (expected(*build(name, **changes))["logits"] - right["logits"]).abs().max().item()
                print(f"    {str(changes)[:90]:90} moves a logit by {moved:.3f}")
                assert moved > 2e-3, changes
        twin(name, made(name))


if __name__ == "__main__":
    main()

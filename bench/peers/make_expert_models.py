"""Makes the fixtures of mixtures of experts: tiny random models and what transformers computes for them.

    python bench/peers/make_expert_models.py            # writes fixtures/experts/
    python bench/peers/make_expert_models.py gpt_oss    # only these

Needs transformers, torch and gguf. Per model a folder with `config.json`, `model.safetensors` as the family's
checkpoints are stored, `model.gguf` under llama.cpp's names, and `expected.safetensors`: `input_ids`, `logits`, `last`
and `hidden.N` in float32 from the weights as stored. Random weights, scaled so that every part moves the logits:
router scores are spread, biases and sinks are not zero, activations reach their limits, and the smallest gap between a
chosen expert and the next one is large against rounding.
"""

import copy
import json
import pathlib
import shutil
import sys

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Q
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig

OUT = pathlib.Path(__file__).resolve().parents[2] / "fixtures" / "experts"
COMMON = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, use_cache=False)
SEQ = 24
# Values of the sixteen codes of 4-bit floats.
FP4 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])


def qwen(**changes):
    config = dict(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=256, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0), tie_word_embeddings=False, **COMMON)
    config.update(changes)
    return Qwen3MoeConfig(**config)


def gpt_oss(**changes):
    config = dict(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_local_experts=8,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=6,
        max_position_embeddings=256, rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=8.0, beta_fast=8.0, beta_slow=1.0,
                             truncate=False, original_max_position_embeddings=32),
        tie_word_embeddings=False, **COMMON)
    config.update(changes)
    return GptOssConfig(**config)


# name: (seed, config, dtype as stored)
MODELS = {
    "qwen3_moe": (31, qwen(), torch.bfloat16),
    "qwen3_moe_shares": (37, qwen(norm_topk_prob=False, num_experts_per_tok=3,
                                        moe_intermediate_size=16), torch.bfloat16),
    "qwen3_moe_mixed": (33, qwen(num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3], num_experts=5, vocab_size=48,
                                 moe_intermediate_size=16, tie_word_embeddings=True, intermediate_size=24,
                                 num_attention_heads=2, num_key_value_heads=1), torch.float32),
    "gpt_oss": (34, gpt_oss(num_local_experts=6, vocab_size=48), torch.bfloat16),
    "gpt_oss_plain_rope": (36, gpt_oss(num_hidden_layers=2, rope_parameters=dict(
        rope_type="default", rope_theta=10000.0)), torch.bfloat16),
    "gpt_oss_mxfp4": (46, gpt_oss(intermediate_size=32, rope_parameters=dict(
        rope_type="default", rope_theta=10000.0)), "mxfp4"),
}
# What a reader may get wrong: (model, what, changed configuration). Each must move the logits.
MISTAKES = [
    ("qwen3_moe", "weights not normalised", dict(norm_topk_prob=False)),
    ("qwen3_moe", "one expert more", dict(num_experts_per_tok=3)),
    ("qwen3_moe_shares", "weights normalised", dict(norm_topk_prob=True)),
    ("gpt_oss", "no window", dict(layer_types=["full_attention"] * 3)),
    ("gpt_oss", "window one longer", dict(sliding_window=7)),
    ("gpt_oss", "layers the other way round", dict(layer_types=["full_attention", "sliding_attention"] * 2)),
    ("gpt_oss", "no limit", dict(swiglu_limit=1e9)),
    ("gpt_oss", "alpha 1", dict(swiglu_alpha=1.0)),
    ("gpt_oss", "rope plain", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
]


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise * (model.config.hidden_size**-0.5 if model.config.tie_word_embeddings else 1.0) * 1.5)
            elif name.endswith("sinks"):
                parameter.copy_(1.5 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "router" in name or name.endswith("mlp.gate.weight"):
                parameter.copy_(2.0 * noise * parameter.shape[-1] ** -0.5)
            else:
                # gpt-oss keeps inputs in the middle dimension of its experts.
                fan_in = parameter.shape[1] if model.config.model_type == "gpt_oss" and "experts" in name else parameter.shape[-1]
                # Large enough for the limit of gpt-oss.
                gain = 4.0 if "gate_up" in name and model.config.model_type == "gpt_oss" else 1.8 if any(
                    part in name for part in ("q_proj", "k_proj", "lm_head")) else 1.0
                parameter.copy_(gain * noise * fan_in**-0.5)


def to_mxfp4(weight):
    """`[E, O, I]` to blocks `[E, O, I / 32, 16]` and scales `[E, O, I / 32]`, and the values that they stand for."""
    experts, outputs, inputs = weight.shape
    groups = weight.reshape(experts, outputs, inputs // 32, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp_min(1e-20))) - 2
    scaled = groups / torch.exp2(exponent)[..., None]
    codes = (scaled[..., None] - FP4).abs().argmin(-1).to(torch.uint8)
    values = (FP4[codes.long()] * torch.exp2(exponent)[..., None]).reshape(weight.shape)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks, (exponent + 127).to(torch.uint8), values


def build(name, **changes):
    seed, config, dtype = MODELS[name]
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    model.config._experts_implementation = "eager"
    randomise(model, seed)
    stored = {}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if dtype == "mxfp4" and key.endswith(("gate_up_proj", "down_proj")) and "experts" in key:
                blocks, scales, values = to_mxfp4(parameter.transpose(1, 2))
                stored[key + "_blocks"], stored[key + "_scales"] = blocks, scales
                parameter.copy_(values.transpose(1, 2))
            else:
                parameter.copy_(parameter.to(torch.bfloat16 if dtype == "mxfp4" else dtype))
    ids = torch.randint(3, config.vocab_size, (1, SEQ), generator=torch.Generator().manual_seed(1000 + seed))
    return model, ids, stored


@torch.no_grad()
def forward(model, ids):
    seen, gaps, hooks = {}, [], []
    for index, layer in enumerate(model.model.layers):
        def hook(_module, _args, output, index=index):
            seen[f"hidden.{index}"] = (output[0] if isinstance(output, tuple) else output)[0].clone()
        hooks.append(layer.register_forward_hook(hook))
        router = getattr(layer.mlp, "router", None) or getattr(layer.mlp, "gate", None)
        if router is not None and hasattr(router, "top_k"):
            def routed(module, _args, output):
                best = output[0].sort(-1, descending=True).values
                gaps.append((best[:, module.top_k - 1] - best[:, module.top_k]).min().item())
            hooks.append(router.register_forward_hook(routed))
    result = model.model(input_ids=ids)
    logits = model.lm_head(result.last_hidden_state)
    for hook in hooks:
        hook.remove()
    return dict(input_ids=ids[0], logits=logits[0], last=result.last_hidden_state[0], **seen), min(gaps)


class Writer:
    """GGUF tensors in their stored type."""

    def __init__(self, path, arch, dtype):
        self.gguf, self.arch, self.dtype = gguf.GGUFWriter(path, arch), arch, dtype

    def put(self, name, tensor, plain=False):
        tensor = tensor.detach().float()
        if plain or tensor.dim() == 1 or self.dtype == torch.float32:
            return self.gguf.add_tensor(name, tensor.numpy().astype(np.float32))
        data = gguf.quants.quantize(tensor.numpy(), Q.BF16)
        self.gguf.add_tensor(name, data, raw_dtype=Q.BF16)

    def mxfp4(self, name, blocks, scales):
        """Blocks of a checkpoint hold neighbours in a byte, those of GGUF values 16 apart."""
        low, high = blocks & 15, blocks >> 4
        codes = torch.stack([low, high], -1).reshape(*blocks.shape[:-1], 32)
        packed = codes[..., :16] | codes[..., 16:] << 4
        data = torch.cat([scales[..., None], packed], -1).reshape(*blocks.shape[:2], -1)
        self.gguf.add_tensor(name, data.numpy(), raw_dtype=Q.MXFP4)

    def close(self):
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def write_gguf(folder, model, stored, dtype):
    config, parameters = model.config, dict(model.named_parameters())
    oss = config.model_type == "gpt_oss"
    w = Writer(folder / "model.gguf", "gpt-oss" if oss else "qwen3moe", dtype)
    g = w.gguf
    g.add_block_count(config.num_hidden_layers)
    g.add_context_length(config.max_position_embeddings)
    g.add_embedding_length(config.hidden_size)
    g.add_feed_forward_length(config.intermediate_size)
    g.add_expert_feed_forward_length(config.intermediate_size if oss else config.moe_intermediate_size)
    g.add_expert_count(config.num_local_experts if oss else config.num_experts)
    g.add_expert_used_count(config.num_experts_per_tok)
    if not oss and not config.norm_topk_prob:
        g.add_expert_weights_norm(False)
    g.add_head_count(config.num_attention_heads)
    g.add_head_count_kv(config.num_key_value_heads)
    g.add_key_length(config.head_dim)
    g.add_value_length(config.head_dim)
    g.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    g.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        g.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        g.add_rope_scaling_factor(rope["factor"])
        g.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        g.add_float32(f"{w.arch}.rope.scaling.yarn_beta_fast", rope["beta_fast"])
        g.add_float32(f"{w.arch}.rope.scaling.yarn_beta_slow", rope["beta_slow"])
    if oss:
        g.add_sliding_window(config.sliding_window)
    g.add_bos_token_id(1)
    g.add_eos_token_id(2)
    w.put("token_embd.weight", parameters["model.embed_tokens.weight"])
    w.put("output_norm.weight", parameters["model.norm.weight"])
    if not config.tie_word_embeddings:
        w.put("output.weight", parameters["lm_head.weight"])
    norm = "post_attention_norm.weight" if oss else "ffn_norm.weight"
    names = {
        "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": norm,
        "self_attn.q_norm.weight": "attn_q_norm.weight", "self_attn.k_norm.weight": "attn_k_norm.weight",
        "self_attn.sinks": "attn_sinks.weight", "mlp.gate_proj.weight": "ffn_gate.weight",
        "mlp.up_proj.weight": "ffn_up.weight", "mlp.down_proj.weight": "ffn_down.weight",
    }
    for part, short in dict(q_proj="attn_q", k_proj="attn_k", v_proj="attn_v", o_proj="attn_output").items():
        for kind in ("weight", "bias"):
            names[f"self_attn.{part}.{kind}"] = f"{short}.{kind}"
    for kind in ("weight", "bias"):
        names[f"mlp.router.{kind}"] = names[f"mlp.gate.{kind}"] = f"ffn_gate_inp.{kind}"
    for key, parameter in parameters.items():
        if not key.startswith("model.layers."):
            continue
        layer, name = key.removeprefix("model.layers.").split(".", 1)
        put = lambda short, tensor: w.put(f"blk.{layer}.{short}", tensor.contiguous())
        if name in names:
            w.put(f"blk.{layer}.{names[name]}", parameter, plain="ffn_gate_inp" in names[name])
        elif name == "mlp.experts.gate_up_proj":
            if key + "_blocks" in stored:
                for short, from_ in (("gate", 0), ("up", 1)):
                    w.mxfp4(f"blk.{layer}.ffn_{short}_exps.weight", stored[key + "_blocks"][:, from_::2].contiguous(),
                            stored[key + "_scales"][:, from_::2].contiguous())
            elif oss:
                put("ffn_gate_exps.weight", parameter.transpose(1, 2)[:, 0::2])
                put("ffn_up_exps.weight", parameter.transpose(1, 2)[:, 1::2])
            else:
                gate, up = parameter.chunk(2, 1)
                put("ffn_gate_exps.weight", gate)
                put("ffn_up_exps.weight", up)
        elif name == "mlp.experts.down_proj":
            if key + "_blocks" in stored:
                w.mxfp4(f"blk.{layer}.ffn_down_exps.weight", stored[key + "_blocks"], stored[key + "_scales"])
            else:
                put("ffn_down_exps.weight", parameter.transpose(1, 2) if oss else parameter)
        elif name == "mlp.experts.gate_up_proj_bias":
            w.put(f"blk.{layer}.ffn_gate_exps.bias", parameter[:, 0::2].contiguous(), plain=True)
            w.put(f"blk.{layer}.ffn_up_exps.bias", parameter[:, 1::2].contiguous(), plain=True)
        elif name == "mlp.experts.down_proj_bias":
            w.put(f"blk.{layer}.ffn_down_exps.bias", parameter, plain=True)
        else:
            raise ValueError(name)
    w.close()


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    wanted = sys.argv[1:] or list(MODELS)
    for name in wanted:
        dtype = MODELS[name][2]
        folder = OUT / name
        shutil.rmtree(folder, ignore_errors=True)
        model, ids, stored = build(name)
        float_type = torch.bfloat16 if dtype == "mxfp4" else dtype
        expected, gap = forward(model, ids)
        # Saving turns the experts into the tensors of checkpoints, and changes the model.
        write_gguf(folder_made(folder), model, stored, dtype)
        saved = copy.deepcopy(model).to(float_type)
        saved.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        if stored:
            tensors = load_file(folder / "model.safetensors")
            for key in [key.removesuffix("_blocks") for key in stored if key.endswith("_blocks")]:
                del tensors[key]
            tensors.update({key: value.contiguous() for key, value in stored.items()})
            save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"] = dict(quant_method="mxfp4", modules_to_not_convert=[
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"])
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        else:
            again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
            assert torch.allclose(forward(again, ids)[0]["logits"], expected["logits"], atol=1e-5), name
        save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")
        for path in folder.iterdir():
            path.chmod(0o644)
        logits = expected["logits"]
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{name:20} {size:7} B  logits std {logits.std():.2f}  smallest gap of the router {gap:.1e}")
        assert gap > 2e-3, "another seed"
        for _, what, changes in [m for m in MISTAKES if m[0] == name]:
            moved = (forward(*build(name, **changes)[:2])[0]["logits"] - logits).abs().max().item()
            print(f"  {what:28} moves a logit by {moved:.3f}")
            assert moved > 1e-2, what


def folder_made(folder):
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main()

"""Makes fixtures/quantised: tiny random models in every quantised form of a safetensors folder that is read, what the
programs that define these forms take their weights for, and the logits that transformers computes from those weights.

    python make_quantised.py            # writes fixtures/quantised/NAME/ for every case
    python make_quantised.py awq_g32    # only these

Needs torch, transformers, numpy, safetensors, and for the values of reference (they are not run by any test):
`compressed-tensors` installed, and the wheels of `autoawq` 0.2.7.post3 and `auto-gptq` 0.7.1 unpacked somewhere on
PYTHONPATH; of the latter two single files without further needs are loaded.

Numbers, scales and zeros are drawn at random and packed here, so that every nibble and every zero occurs; the programs
only unpack. Scales are handed to them in float32, so that what they compute is the exact value and not one rounded to
the type of the scales. Everything after is float32 with eager attention on one thread.

Shape legend: O, I outputs and inputs of a layer, G groups of a row, S tokens, V vocabulary.
"""

import hashlib
import importlib.util
import json
import pathlib
import shutil
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

OUT = pathlib.Path(__file__).resolve().parents[2] / "fixtures" / "quantised"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def part_of(package, path):
    """A module of an unpacked wheel, without what its package imports."""
    for place in sys.path:
        file = pathlib.Path(place) / package / path
        if file.is_file():
            spec = importlib.util.spec_from_file_location(file.stem, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise SystemExit(f"{package}/{path} is not on PYTHONPATH")


def words(numbers, bits):
    """Numbers [.., N] as words [.., N * bits / 32], the first in the lowest bits."""
    per = 32 // bits
    grouped = numbers.astype(np.uint32).reshape(*numbers.shape[:-1], -1, per)
    return (grouped << (np.arange(per, dtype=np.uint32) * bits)).sum(-1, dtype=np.uint32).astype(np.uint32).view(np.int32)


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


class Draw:
    """Random numbers of one case."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def scales(self, shape, size, dtype):
        values = size * self.rng.uniform(0.5, 1.5, shape)
        return torch.tensor(values, dtype=torch.float32).to(dtype)

    def numbers(self, shape, top):
        return self.rng.integers(0, top, shape)


def awq(draw, o, i, group, dtype=torch.float16):
    from_wheel = part_of("awq", "utils/packing_utils.py")
    q, z = draw.numbers((i, o), 16), draw.numbers((i // group, o), 16)
    scales = draw.scales((i // group, o), 0.02, dtype)
    turned = lambda x: tensor(words(x.reshape(x.shape[0], -1, 8)[..., ORDER].reshape(x.shape), 4))
    parts = {"qweight": turned(q), "qzeros": turned(z), "scales": scales}
    values = from_wheel.dequantize_gemm(parts["qweight"], parts["qzeros"], scales.float(), 4, group)
    return parts, values.t().contiguous()


def gptq(draw, o, i, group, bits=4, sym=True, act=False, v2=False, bias=False):
    group = i if group == -1 else group
    top = 2**bits
    q = draw.numbers((i, o), top)
    z = np.full((i // group, o), top // 2) if sym else draw.numbers((i // group, o), top)
    scales = draw.scales((i // group, o), 0.02 if bits == 4 else 0.0015, torch.float16)
    g_idx = np.arange(i) // group
    if act:
        draw.rng.shuffle(g_idx)
    stored = z if v2 else (z - 1) % top
    parts = {
        "qweight": tensor(words(q.T, bits).T),
        "qzeros": tensor(words(stored, bits)),
        "scales": scales,
        "g_idx": torch.tensor(g_idx, dtype=torch.int32),
    }
    if bias:
        parts["bias"] = torch.zeros(o, dtype=torch.float16)
    # What AutoGPTQ multiplies with; of its version 1 only, so the zeros are put into that. Its layers differ in a zero of 0,
    # which that version stores as the largest number: this one takes it for 2^bits, the older one and the kernels of
    # exllama for 0, as it was when the numbers were made.
    cls = part_of("auto_gptq", "nn_modules/qlinear/qlinear_cuda.py").QuantLinear
    layer = cls(bits, group, i, o, False, weight_dtype=torch.float32)
    layer.qweight, layer.g_idx, layer.scales = parts["qweight"], parts["g_idx"], scales.float()
    layer.qzeros = tensor(words((z - 1) % top, bits))
    layer.autogptq_cuda_available = False
    with torch.no_grad():
        values = layer(torch.eye(i)).numpy()
    exact = scales.float().numpy()[g_idx] * (q - z[g_idx]).astype(np.float32)
    assert ((values == exact) | (z[g_idx] == 0)).all(), "AutoGPTQ takes these numbers for something else"
    return parts, tensor(exact.T)


def float8(draw, o, i):
    """All numbers of the type, but most of them of middling size."""
    bits = draw.numbers((o, i), 256)
    bits = np.where(bits & 0x7F == 0x7F, 0x30, bits)
    small = draw.rng.uniform(size=(o, i)) < 0.95
    bits = np.where(small, (bits & 0x87) | 0x30, bits).astype(np.uint8)
    return tensor(bits).view(torch.float8_e4m3fn)


def fp8(draw, o, i, block=None, dtype=torch.float32, shape=()):
    weight = float8(draw, o, i)
    if block is None:
        scale = draw.scales(shape, 0.05, dtype)
        return {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, weight.float() * scale.float()
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    scale = draw.scales((-(-o // block), -(-i // block)), 0.05, dtype)
    values = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    return {"weight": weight, "weight_scale_inv": scale}, values.reshape(o, i)


def compressed(draw, o, i, dtype=torch.bfloat16, act=False, tiny=False, plain=False, **args):
    """Numbers that compressed-tensors unpacks again."""
    from compressed_tensors.compressors import (
        FloatQuantizationCompressor,
        IntQuantizationCompressor,
        PackedQuantizationCompressor,
    )
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    bits, strategy, symmetric = args["num_bits"], args["strategy"], args.get("symmetric", True)
    form = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    groups = i // args["group_size"] if strategy == "group" else 1
    shape = (o, groups)
    if strategy == "block":
        shape = tuple(-(-n // b) for n, b in zip((o, i), args["block_structure"]))
    if strategy == "tensor":
        shape = (1,)
    size = 0.02 if bits == 4 else 0.05 if args["type"] == "float" else 0.0015
    scale = draw.scales(shape, size, dtype)
    if tiny:
        scale[0] = 1e-8
    parts = {"weight_scale": scale}
    if args["type"] == "float":
        parts["weight"] = float8(draw, o, i)
        values = FloatQuantizationCompressor.decompress(parts | {"weight_scale": scale.float()}, form)["weight"]
        return parts, values.float()
    half = 2 ** (bits - 1)
    q = torch.tensor(draw.numbers((o, i), 2 * half) - half, dtype=torch.int8)
    zero = None if symmetric else torch.tensor(draw.numbers(shape, 2 * half) - half, dtype=torch.int8)
    if not plain:
        parts |= {"weight_packed": pack_to_int32(q, bits), "weight_shape": torch.tensor([o, i])}
        if zero is not None:
            parts["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0).contiguous()
        of, unpack = np.arange(i) // (i // groups), PackedQuantizationCompressor
    else:
        parts["weight"] = q
        if zero is not None:
            parts["weight_zero_point"] = zero
        of, unpack = np.arange(i) // (i // groups), IntQuantizationCompressor
    if act:
        draw.rng.shuffle(of)
        parts["weight_g_idx"] = torch.tensor(of, dtype=torch.int32)
        # Which its own decompression leaves to the kernels: groups are told by the list.
        zeros = 0 if zero is None else zero.float()[:, of]
        return parts, (q.float() - zeros) * scale.float()[:, of]
    values = unpack.decompress(parts | {"weight_scale": scale.float()}, form)["weight"]
    zeros = torch.zeros(shape) if zero is None else zero.float()
    exact = (q.float() - zeros[:, of]) * scale.float()[:, of]
    assert (values == exact).all(), "compressed-tensors takes these numbers for something else"
    return parts, values


COMMON = dict(vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
              head_dim=32, bos_token_id=1, eos_token_id=2, pad_token_id=0, use_cache=False,
              max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False)
CLASSES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def groups(**weights):
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}}


def ct(make=compressed, act=False, tiny=(), dtype=torch.bfloat16, **args):
    def layer(draw, name, o, i):
        return make(draw, o, i, act=act, tiny=name in tiny, dtype=dtype, **args)

    return layer


INT4 = dict(num_bits=4, type="int")
CASES = {
    "awq_g32": dict(
        seed=1, family="llama", width=256, dtype=torch.float16,
        quant=dict(quant_method="awq", bits=4, group_size=32, version="gemm", zero_point=True,
                   modules_to_not_convert=None),
        layer=lambda draw, name, o, i: awq(draw, o, i, 32)),
    "awq_g64": dict(
        seed=2, family="qwen2", width=128, dtype=torch.float16,
        quant=dict(quant_method="awq", bits=4, group_size=64, version="GEMM", zero_point=True,
                   modules_to_not_convert=["mlp.down_proj"]),
        plain=["mlp.down_proj"],
        layer=lambda draw, name, o, i: awq(draw, o, i, 64)),
    "awq_g128": dict(
        seed=3, family="qwen3", width=256, dtype=torch.float16,
        # As the tool itself writes it.
        beside="quant_config.json", quant=dict(w_bit=4, q_group_size=128, version="GEMM", zero_point=True),
        layer=lambda draw, name, o, i: awq(draw, o, i, 128)),
    "gptq_g64_sym": dict(
        seed=4, family="llama", width=128, dtype=torch.float16,
        quant=dict(quant_method="gptq", bits=4, group_size=64, sym=True, desc_act=False),
        # A bias of zeros on every layer, as older tools wrote it.
        layer=lambda draw, name, o, i: gptq(draw, o, i, 64, bias=True)),
    "gptq_g32_act": dict(
        seed=5, family="qwen2", width=256, dtype=torch.float16,
        quant=dict(quant_method="gptq", bits=4, group_size=32, sym=False, desc_act=True, checkpoint_format="gptq"),
        layer=lambda draw, name, o, i: gptq(draw, o, i, 32, sym=False, act=True)),
    "gptq_v2_g128": dict(
        seed=6, family="llama", width=256, dtype=torch.float16,
        quant=dict(quant_method="gptq", bits=4, group_size=128, sym=False, desc_act=False, checkpoint_format="gptq_v2"),
        layer=lambda draw, name, o, i: gptq(draw, o, i, 128, sym=False, v2=True)),
    "gptq_channel_head": dict(
        seed=7, family="llama", width=128, dtype=torch.float16, head=True,
        quant=dict(quant_method="gptq", bits=4, group_size=-1, sym=True, desc_act=False, lm_head=True),
        layer=lambda draw, name, o, i: gptq(draw, o, i, -1)),
    "gptq_int8": dict(
        seed=8, family="llama", width=128, dtype=torch.float16, beside="quantize_config.json",
        quant=dict(bits=8, group_size=128, sym=False, desc_act=True),
        layer=lambda draw, name, o, i: gptq(draw, o, i, 128, bits=8, sym=False, act=True)),
    "fp8_block": dict(
        seed=9, family="qwen3", width=256, dtype=torch.bfloat16,
        quant=dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128]),
        layer=lambda draw, name, o, i: fp8(draw, o, i, 128, torch.bfloat16)),
    "fp8_tensor": dict(
        seed=10, family="llama", width=128, dtype=torch.bfloat16,
        quant=dict(quant_method="fp8", activation_scheme="static", ignored_layers=["lm_head"]),
        extra={"model.layers.0.self_attn.k_scale": torch.tensor(0.25), "model.layers.0.self_attn.v_scale": torch.tensor(0.5)},
        layer=lambda draw, name, o, i: fp8(draw, o, i)),
    "ct_fp8_channel": dict(
        seed=11, family="llama", width=128, dtype=torch.bfloat16,
        quant=dict(quant_method="compressed-tensors", format="float-quantized", ignore=["re:.*lm_head", "re:.*down_proj$"],
                   config_groups=groups(num_bits=8, type="float", strategy="channel", symmetric=True)),
        plain=["mlp.down_proj"],
        layer=ct(num_bits=8, type="float", strategy="channel")),
    "ct_fp8_block": dict(
        seed=12, family="llama", width=192, dtype=torch.bfloat16,
        quant=dict(quant_method="compressed-tensors", format="float-quantized", ignore=["lm_head"],
                   config_groups=groups(num_bits=8, type="float", strategy="block", block_structure=[128, 128])),
        layer=ct(num_bits=8, type="float", strategy="block", block_structure=[128, 128], dtype=torch.float32)),
    "ct_int4_group_asym": dict(
        seed=13, family="llama", width=256, dtype=torch.bfloat16,
        quant=dict(quant_method="compressed-tensors", format="pack-quantized", ignore=["lm_head"],
                   config_groups=groups(strategy="group", group_size=32, symmetric=False, **INT4)),
        layer=ct(strategy="group", group_size=32, symmetric=False, **INT4)),
    "ct_int4_group_act": dict(
        seed=14, family="qwen2", width=256, dtype=torch.bfloat16,
        quant=dict(quant_method="compressed-tensors", format="pack-quantized", ignore=["lm_head"],
                   config_groups=groups(strategy="group", group_size=64, actorder="group", **INT4)),
        layer=ct(strategy="group", group_size=64, act=True, **INT4)),
    "ct_int4_channel": dict(
        seed=15, family="llama", width=128, dtype=torch.bfloat16,
        quant=dict(quant_method="compressed-tensors", format="pack-quantized", ignore=["lm_head"],
                   config_groups=groups(strategy="channel", **INT4)),
        # A scale that no f16 can be.
        layer=ct(strategy="channel", tiny=("mlp.up_proj",), **INT4)),
    "ct_int8_mixed": dict(
        seed=16, family="llama", width=128, dtype=torch.bfloat16,
        quant=dict(quant_method="compressed-tensors", format="mixed-precision", ignore=["lm_head"], config_groups={
            "group_0": {"targets": ["Linear"], "weights": dict(num_bits=8, type="int", strategy="channel", symmetric=False),
                        "format": "int-quantized"},
            "group_1": {"targets": ["re:.*mlp.(gate|up)_proj"], "format": "pack-quantized",
                        "weights": dict(num_bits=4, type="int", strategy="group", group_size=128, symmetric=True)},
            "group_2": {"targets": ["model.layers.0.mlp.down_proj"], "format": "pack-quantized",
                        "weights": dict(num_bits=8, type="int", strategy="group", group_size=64, symmetric=True)}}),
        layer=lambda draw, name, o, i: (
            compressed(draw, o, i, strategy="group", group_size=128, **INT4) if name in ("mlp.gate_proj", "mlp.up_proj")
            else compressed(draw, o, i, num_bits=8, type="int", strategy="group", group_size=64) if name == "mlp.down_proj"
            else compressed(draw, o, i, plain=True, num_bits=8, type="int", strategy="channel", symmetric=False))),
}


def make(name):
    case = CASES[name]
    torch.manual_seed(case["seed"])
    draw = Draw(case["seed"])
    config = CLASSES[case["family"]](intermediate_size=case["width"], **COMMON)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stored, hashes = dict(case.get("extra", {})), {}
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("norm.weight"):
                value.copy_(torch.rand_like(value) + 0.5)
            elif key.endswith(".bias"):
                value.copy_(torch.randn_like(value) * 0.3)
            elif "embed" in key or "lm_head" in key:
                value.copy_(torch.randn_like(value) * 0.5)
            else:
                value.copy_(torch.randn_like(value) * 0.1)
            value.copy_(value.to(case["dtype"]).float())
        for key, value in model.state_dict().items():
            layer = key.removesuffix(".weight")
            short = layer.split(".", 3)[-1]
            wanted = "_proj" in key and key.endswith("weight") or case.get("head") and layer == "lm_head"
            if not wanted or short in case.get("plain", []):
                stored.setdefault(key, value.to(case["dtype"]).clone())
                continue
            parts, values = case["layer"](draw, short, *value.shape)
            value.copy_(values)
            hashes[layer] = hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()
            for part, content in parts.items():
                # A bias that the model has is its own.
                if part != "bias" or f"{layer}.bias" not in model.state_dict():
                    stored[f"{layer}.{part}"] = content.contiguous()
        ids = torch.tensor(draw.numbers((1, 24), 64))
        out = model(ids)
        expected = {"input_ids": ids[0], "logits": out.logits[0].contiguous()}
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    written = {k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"}
    written |= dict(architectures=[type(model).__name__], model_type=case["family"],
                    torch_dtype=str(case["dtype"]).removeprefix("torch."))
    if "beside" in case:
        (folder / case["beside"]).write_text(json.dumps(case["quant"], indent=1) + "\n")
    else:
        written["quantization_config"] = case["quant"]
    (folder / "config.json").write_text(json.dumps(written, indent=1) + "\n")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, folder / "expected.safetensors")
    (folder / "values.json").write_text(json.dumps(hashes, indent=1) + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: {size} bytes, logits {out.logits.std():.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or CASES:
        make(chosen)

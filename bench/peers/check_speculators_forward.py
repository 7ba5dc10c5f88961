"""Lets the `speculators` library's own networks answer a bundle's probe, from the bundle's export in that layout.

    pip install torch speculators==0.9.0
    python3 bench/peers/check_speculators_forward.py EXPORT BUNDLE

EXPORT is what `draftsmith bundle export BUNDLE --format speculators` wrote. The library builds its network from the
configuration and takes the weights; it is then asked what `probe.safetensors` asks: features of the target, tokens, and how
many slots behind the last token. Compared are the answers that the bundle's network gave when it was made: for DFlash and
DSpark the last slot's output (and, for DSpark, the Markov head's vector), for P-EAGLE the logits. Prints the largest
difference as a share of the largest number; ends with 1 above 0.002, the limit of `bundle check`, too.
"""

import json
import os
import sys

# The library would ask the hub for the target's configuration, which nothing here needs.
os.environ["HF_HUB_OFFLINE"] = "1"

import speculators.models.peagle.core as peagle  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from speculators.config import SpeculatorModelConfig  # noqa: E402
from speculators.model import SpeculatorModel  # noqa: E402

LIMIT = 2e-3


class Answered(Exception):
    """Stops a forward, with what was to be seen."""


def stop_before(_module, arguments):
    raise Answered(arguments[0])


def stop_behind(_module, _arguments, output):
    raise Answered(output)


def network(folder):
    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.registered_model_class_from_config(config)(config)
    missing, unexpected = model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
    ignored = {*model._keys_to_ignore_on_save, *model._keys_to_ignore_on_load_missing}
    wrong = [name for name in missing if name not in ignored] + list(unexpected)
    if wrong:
        sys.exit(f"{folder}: {wrong} are on one side alone")
    return model.float().eval()


class Rows(torch.nn.Module):
    """An embedding of which only the rows at hand are known: the target's are no part of an export."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows[None]

    def forward(self, ids):
        if ids.shape[1] != self.rows.shape[1]:
            sys.exit(f"the network embeds {ids.shape[1]} slots, the probe has {self.rows.shape[1]}")
        return self.rows


def of_block(model, features, ids, embeddings, slots, depth):
    """`[H]` or `[H + M]`: a block of `1 + depth` slots behind `slots` features."""
    block = model.block_size = 1 + depth
    model.embed_tokens = Rows(embeddings[slots - 1 :])
    # An anchor has a whole block behind it in a row of training.
    length = slots + 1 + block
    states = torch.zeros(1, length, features.shape[1])
    states[0, :slots] = features
    tokens = torch.zeros(1, length, dtype=torch.long)
    tokens[0, slots : slots + block] = ids[slots - 1 :]
    mask = torch.zeros(1, length)
    mask[0, slots] = 1
    last = torch.zeros(1, length, model.lm_head.in_features)
    hook = model.lm_head.register_forward_pre_hook(stop_before)
    try:
        model._backbone_forward(
            states, tokens, mask, last, document_ids=torch.zeros(1, length, dtype=torch.long), max_anchors=1
        )
    except Answered as answered:
        (hidden,) = answered.args
    finally:
        hook.remove()
    answer = hidden[0, -1]
    if getattr(model, "markov_head", None) is None:
        return answer
    return torch.cat([answer, model.markov_head.prev_embeddings(ids[-1])])


def of_p_eagle(model, features, ids, slots, depth):
    """`[Vd]`: logits of the last of `depth` entries of the mask token behind `slots` features."""
    anchors = torch.cat([torch.arange(slots), torch.full((depth,), slots - 1)])
    depths = torch.cat([torch.zeros(slots, dtype=torch.long), torch.arange(1, depth + 1)])
    peagle.generate_cod_sample_indices = lambda **_: (anchors, depths)
    length = slots + depth
    states = torch.zeros(1, length, features.shape[1])
    states[0, :slots] = features
    tokens = torch.zeros(1, length, dtype=torch.long)
    tokens[0, :slots] = ids[:slots]
    last = torch.zeros(1, length, model.lm_head.in_features)
    hook = model.lm_head.register_forward_hook(stop_behind)
    try:
        model(states, tokens, torch.zeros(1, length, dtype=torch.long), verifier_last_hidden_states=last)
    except Answered as answered:
        (logits,) = answered.args
    finally:
        hook.remove()
    return logits[0, -1]


@torch.no_grad()
def main():
    export, bundle = sys.argv[1:]
    model = network(export)
    probes = load_file(f"{bundle}/probe.safetensors")
    with open(f"{export}/config.json", encoding="utf-8") as file:
        kind = json.load(file)["speculators_model_type"]
    worst, count = 0.0, 0
    while f"{count}.token_ids" in probes:
        of = {name: probes[f"{count}.{name}"] for name in ("token_ids", "features", "embeddings", "logits")}
        slots, depth = len(of["features"]), int(probes[f"{count}.depth"][0])
        if kind == "peagle":
            answer = of_p_eagle(model, of["features"], of["token_ids"], slots, depth)
        else:
            answer = of_block(model, of["features"], of["token_ids"], of["embeddings"], slots, depth)
        stored = of["logits"]
        if answer.shape != stored.shape:
            sys.exit(f"probe {count}: {list(answer.shape)} numbers, {list(stored.shape)} are stored")
        worst = max(worst, float((answer - stored).abs().max() / stored.abs().max()))
        count += 1
    verdict = "the same answers" if worst <= LIMIT else "other answers"
    print(f"{type(model).__name__}: {verdict}, {count} probes, largest difference {worst:.1e} (limit {LIMIT:.0e})")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()

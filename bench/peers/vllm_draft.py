"""Serves a draft in vLLM, on a CPU if need be, and says how much of it is accepted.

Usage: vllm_draft.py TARGET DRAFT CONFIG WORKLOAD ROWS MAX_NEW_TOKENS

TARGET is a Hugging Face folder, DRAFT an exported draft folder, CONFIG a JSON object that goes into vLLM's
`speculative_config` beside `model` (`{"method": "eagle3", "num_speculative_tokens": 5}`), WORKLOAD a JSONL file with `turns`
in each row, of which the first turn of the first ROWS rows is asked. Prompts are rendered by the target's own chat template.
Decodes greedily without and with the draft, each in an engine of its own, and prints one JSON object: accept length (tokens
of a target step, the target's own included), accepted share by position, and how many texts are the same.
"""

import gc
import json
import sys

if len(sys.argv) != 7:
    sys.exit(__doc__)
target, draft, config, workload, rows, max_new_tokens = sys.argv[1:]

from transformers import AutoTokenizer  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

tokenizer = AutoTokenizer.from_pretrained(target)
with open(workload, encoding="utf-8") as lines:
    asked = [json.loads(line) for line, _ in zip(lines, range(int(rows)))]


def prompt(row):
    turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    turns.append({"role": "user", "content": row["turns"][0]})
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return {"prompt_token_ids": tokenizer(rendered, add_special_tokens=False)["input_ids"]}


def decode(speculative):
    engine = LLM(
        model=target,
        dtype="bfloat16",
        max_model_len=2048,
        enforce_eager=True,
        gpu_memory_utilization=0.4,
        disable_log_stats=False,
        speculative_config=speculative,
    )
    sampling = SamplingParams(temperature=0, max_tokens=int(max_new_tokens))
    texts = [answer.outputs[0].token_ids for answer in engine.generate([prompt(row) for row in asked], sampling, use_tqdm=False)]
    counted = {}
    for metric in engine.get_metrics():
        if metric.name.startswith("vllm:spec_decode"):
            counted[metric.name] = getattr(metric, "values", None) or getattr(metric, "value", None)
    del engine
    gc.collect()
    return texts, counted


def main():
    plain, _ = decode(None)
    drafted, counted = decode({**json.loads(config), "model": draft})
    steps = counted["vllm:spec_decode_num_drafts"]
    accepted = counted["vllm:spec_decode_num_accepted_tokens"]
    by_position = counted.get("vllm:spec_decode_num_accepted_tokens_per_pos") or []
    print(
        json.dumps(
            {
                "prompts": len(asked),
                "tokens": sum(len(ids) for ids in drafted),
                "steps": steps,
                "accept_length": 1 + accepted / steps,
                "accepted_by_position": [n / steps for n in by_position],
                "equal_texts": sum(a == b for a, b in zip(plain, drafted)),
            }
        )
    )


# The engine starts processes that read this file anew.
if __name__ == "__main__":
    main()

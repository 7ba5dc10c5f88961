"""Serves a bundle's draft in vLLM and here, and compares what is accepted.

Usage: check_vllm.py DRAFTSMITH VENV BUNDLE TARGET.gguf WORKLOAD ROWS [MAX_NEW_TOKENS] [DEPTH] [FORMAT]

DRAFTSMITH is the program, VENV the folder of `install-vllm-cpu.sh`, FORMAT the layout (`vllm`, the default, or
`speculators`). The target is expanded to bfloat16 (`gguf_to_hf.py`), the draft exported with `bundle export` and started as
the export itself says, DEPTH apart, and the first ROWS prompts of WORKLOAD are decoded greedily by both (`vllm_draft.py`,
`draftsmith bench`). A block draft that proposes a part of the vocabulary is exported for the whole, so the draft measured
here is then the export, imported. DSpark runs in Triton's interpreter (`vllm_block_cpu.py`).

Prints one JSON object. Ends with 1 if vLLM's texts with the draft differ from those without it, or if the accept lengths are
more than five per cent apart.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

if len(sys.argv) not in (7, 8, 9, 10):
    sys.exit(__doc__)
program, venv, bundle, target, workload, rows = sys.argv[1:7]
max_new_tokens = sys.argv[7] if len(sys.argv) > 7 else "96"
layout = sys.argv[9] if len(sys.argv) > 9 else "vllm"
here = os.path.dirname(os.path.abspath(__file__))
python = os.path.join(venv, "bin", "python")


def run(*command, env=None):
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"FAILED {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def read(*path):
    with open(os.path.join(*path), encoding="utf-8") as file:
        return json.load(file)


def settings(exported, folder):
    """What the printed command hands to vLLM beside the folder; of a `speculators` folder, what vLLM takes from it."""
    told = [re.search(r"--speculative-config '(\{.*\})'", launch["command"]) for launch in exported["launch"]]
    for found in filter(None, told):
        config = json.loads(found.group(1))
        config.pop("model")
        return config
    written = read(folder, "config.json")
    config = {"method": written["speculators_model_type"]}
    if config["method"] == "peagle":
        config = {"method": "eagle3", "parallel_drafting": True}
    methods = written["speculators_config"]["proposal_methods"]
    return {**config, "num_speculative_tokens": methods[0]["speculative_tokens"]}


with tempfile.TemporaryDirectory() as scratch:
    hf, draft, back, record, shim = (
        os.path.join(scratch, name) for name in ("target", "draft", "back", "bench.json", "shim")
    )
    run(python, os.path.join(here, "gguf_to_hf.py"), target, hf)
    exported = json.loads(run(program, "bundle", "export", bundle, "--format", layout, "--out", draft, "--json"))
    config = settings(exported, draft)
    own = read(bundle, "config.json")
    spark = own["architectures"][0] == "Qwen3DSparkModel"
    if len(sys.argv) > 8:
        config["num_speculative_tokens"] = int(sys.argv[8])
    os.mkdir(shim)
    with open(os.path.join(shim, "sitecustomize.py"), "w", encoding="utf-8") as custom:
        for name in ["vllm_cpu_shim.py", "vllm_block_cpu.py"][: 1 + spark]:
            with open(os.path.join(here, name), encoding="utf-8") as part:
                custom.write(part.read() + "\n")
    # One process, so that a crash is told; threads that wait give way to others.
    environment = {**os.environ, "PYTHONPATH": shim, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_WAIT_POLICY": "passive", **environment}
    peer_script = os.path.join(here, "vllm_draft.py")
    printed = run(python, peer_script, hf, draft, json.dumps(config), workload, rows, max_new_tokens, env=environment)
    there = json.loads(printed.strip().splitlines()[-1])
    measured = bundle
    if "dflash_config" in own and (own.get("draft_vocab_size") or own["vocab_size"]) < own["vocab_size"]:
        run(program, "bundle", "verify-export", draft, "--bundle", bundle, "--quiet")
        run(program, "bundle", "import", draft, "--target", target, "--out", back, "--quiet")
        measured = back
    run(
        *(program, "bench", "--bundle", measured, "--target", target, "--workload", workload, "--limit", rows),
        *("--max-new-tokens", max_new_tokens, "--depth", str(config["num_speculative_tokens"])),
        *("--json", record, "--quiet"),
    )
    here_record = read(record)

ratio = there["accept_length"] / here_record["accept_len"]
print(
    json.dumps(
        {
            "layout": layout,
            "setting": config,
            "prompts": there["prompts"],
            "accept_length": {"vllm": there["accept_length"], "draftsmith": here_record["accept_len"], "ratio": ratio},
            "accepted_by_position": {
                "vllm": there["accepted_by_position"],
                "draftsmith": here_record["accept_rate_at"],
            },
            "vllm_texts_equal": there["equal_texts"],
        },
        indent=1,
    )
)
failed = there["equal_texts"] != there["prompts"] or abs(ratio - 1) > 0.05
sys.exit(1 if failed else 0)

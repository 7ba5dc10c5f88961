"""Decodes on request with llama-cpp-python, for `draftsmith bench decode`.

Reads one JSON object per line and answers each with one:

    {"model": PATH, "threads": T, "context": N}        loads; answers {"version": "…"}
    {"prompt_ids": [ids], "new_tokens": N}             decodes greedily, past any end of text; answers
                                                       {"token_ids": [ids], "prefill_ns": n, "decode_ns": n}

`decode_ns` runs from the first token to the last, as on our side.
"""

import json
import sys
import time

import llama_cpp

llama = None
for line in sys.stdin:
    request = json.loads(line)
    if "model" in request:
        llama = llama_cpp.Llama(
            model_path=request["model"],
            n_ctx=request["context"],
            n_batch=512,
            n_threads=request["threads"],
            n_threads_batch=request["threads"],
            verbose=False,
        )
        answer = {"version": llama_cpp.__version__}
    else:
        began = time.perf_counter_ns()
        first = began
        ids = []
        # A fresh cache: nothing of the prompt before is reused.
        llama.reset()
        for token in llama.generate(request["prompt_ids"], temp=0.0, reset=True):
            ids.append(int(token))
            if len(ids) == 1:
                first = time.perf_counter_ns()
            if len(ids) == request["new_tokens"]:
                break
        end = time.perf_counter_ns()
        answer = {"token_ids": ids, "prefill_ns": first - began, "decode_ns": end - first}
    print(json.dumps(answer), flush=True)

"""Decodes on request with llama-cpp-python, for `draftsmith bench decode`.

Reads one JSON object per line and answers each with one:

    {"model": PATH, "threads": T, "context": N}        loads; answers {"version": "…", "load_ns": n}
    {"prompt_ids": [ids], "new_tokens": N}             decodes greedily, past any end of text; answers
                                                       {"token_ids": [ids], "prefill_ns": n, "decode_ns": n}
    {"step": m, "context": N}                          one pass of m tokens behind N others, all asked for logits;
                                                       answers {"step_ns": n}
    {"memory": true}                                   answers {"peak_bytes": n}

`decode_ns` runs from the first token to the last, as on our side.
"""

import json
import resource
import sys
import time

import llama_cpp

llama = None
# Positions that the cache holds of `made_up` tokens, for passes.
held = 0


def made_up(start, count):
    return [(i * 7919 + 13) % llama.n_vocab() for i in range(start, start + count)]


def one_pass(start, tokens):
    """Decodes tokens behind the first `start` positions, each with its logits."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = start + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        began = time.perf_counter_ns()
        if llama_cpp.llama_decode(llama.ctx, batch) != 0:
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(llama.ctx)
        return time.perf_counter_ns() - began
    finally:
        llama_cpp.llama_batch_free(batch)


def step(context, rows):
    global held
    memory = llama_cpp.llama_get_memory(llama.ctx)
    if held < context:
        llama_cpp.llama_memory_clear(memory, True)
        for start in range(0, context, 256):
            one_pass(start, made_up(start, min(256, context - start)))
    llama_cpp.llama_memory_seq_rm(memory, 0, context, -1)
    held = context
    return one_pass(context, made_up(context, rows))


for line in sys.stdin:
    request = json.loads(line)
    if "model" in request:
        began = time.perf_counter_ns()
        llama = llama_cpp.Llama(
            model_path=request["model"],
            n_ctx=request["context"],
            n_batch=512,
            n_threads=request["threads"],
            n_threads_batch=request["threads"],
            verbose=False,
        )
        answer = {"version": llama_cpp.__version__, "load_ns": time.perf_counter_ns() - began}
    elif "step" in request:
        answer = {"step_ns": step(request["context"], request["step"])}
    elif "memory" in request:
        # Kilobytes, on macOS bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        answer = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    else:
        began = time.perf_counter_ns()
        first = began
        ids = []
        # A fresh cache: nothing of the prompt before is reused.
        held = 0
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

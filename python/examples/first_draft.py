"""A draft of one's own, from Python, cell by cell (editors show `# %%` as cells of a notebook).

    python first_draft.py fixtures/tiny-target      # in the repository: half a minute
"""

# %% What for, and what is asked
import json
import sys
import urllib.request
from pathlib import Path

import draftsmith

target = Path(sys.argv[1] if len(sys.argv) > 1 else "fixtures/tiny-target").resolve()
prompts = (target / "prompts-train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:120]
Path("prompts.jsonl").write_text("".join(prompts), encoding="utf-8")
Path("run.toml").write_text(
    f"""
[target]
source = '{target}'
[data]
sources = [{{ path = "prompts.jsonl" }}]
validation_rows = 16
max_length = 512
[regenerate]
max_new_tokens = 64
[draft]
vocab_size = 256
[train]
lr = 2e-3
epochs = 2
tokens_per_step = 1024
[validate]
prompts = 8
[bundle]
name = "first"
license = "CC0-1.0"
""",
    encoding="utf-8",
)

# %% Conversations, answers of the target, states, training, bundle: interrupt it, and the same call goes on
made = draftsmith.run("run.toml")
assert made.train is not None and made.bundle is not None
print(f"{made.train.steps} steps, accept length {made.train.accept_len:.2f} on held-out prompts")

# %% What it gains here, with what weakens the number
measured = draftsmith.bench(bundle=made.bundle.path, workload=target / "eval.jsonl", limit=8, max_new_tokens=32)
print(f"speedup {measured.speedup:.2f}, 95 % interval {measured.speedup_ci95}")
for doubt in measured.doubts:
    print(f"doubt: {doubt.message}; {doubt.advice}")

# %% An answer, with the proof that it is the target's own
question = "Why is the sky blue?"
answer = draftsmith.generate(question, target=target, bundle=made.bundle.path, max_new_tokens=32, prove=True)
print(answer.text)

# %% A server for the length of a `with`: any OpenAI client takes `server.base_url`
with draftsmith.serve(bundle=made.bundle.path) as server:
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 32, "temperature": 0, "model": server.model}
    request = urllib.request.Request(
        f"{server.base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        served = json.load(response)["choices"][0]["message"]["content"]

assert served == answer.text
print("the same text with and without the draft, from the command and from the server")

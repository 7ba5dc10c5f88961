#!/usr/bin/env bash
# A draft for a model of your own, from nothing to a served one: the commands of docs/YOUR_OWN_MODEL.md.
#
#     TARGET=hf:Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:qwen2.5-coder-0.5b-instruct-q4_k_m.gguf DATA=chats.jsonl HOURS=1 \
#         docs/your-own-model.sh
#
# Everything is made in the current folder; stopped at any moment, the same call goes on. DRAFTSMITH is the program (default: the
# one in the path), NAME the run's name (default: the target's), LIMIT how many held-out prompts are measured (default: 8), EXPORT
# a folder for the draft as vLLM reads it (default: none is made).
set -euo pipefail

program="${DRAFTSMITH:-draftsmith}"
target="${TARGET:?the model: hf:ORG/NAME, hf:ORG/NAME:FILE.gguf, or a path}"
data="${DATA:?conversations of the kind that the draft is for: a JSONL or Parquet file}"
hours="${HOURS:-1}"
limit="${LIMIT:-8}"

show() {
    printf '\n$ draftsmith' >&2
    printf ' %q' "$@" >&2
    printf '\n' >&2
}
step() {
    show "$@"
    "$program" "$@"
}

# What this machine has, and what is missing.
step doctor

# A run file by rules, the bill, and the run: answers of the target, its hidden states, the draft, a bundle, a measurement, a verdict.
made="$(step make "$target" --data "$data" --hours "$hours" ${NAME:+--name "$NAME"} --json)"
run="$(python3 -c 'import json, sys; print(json.load(sys.stdin)["run"])' <<<"$made")"
bundle="$run/bundle"
# Prompts that `make` held out.
workload="$(basename "$run")-own.jsonl"

# The fastest way to use the draft on this machine, written into the bundle.
step bench tune --bundle "$bundle" --workload "$workload" --sequences 1 --limit "$limit" --write

# One text per prompt: with and without the draft, alone and in batches, on one thread and on two.
step bench identity --bundle "$bundle" --workload "$workload" --limit "$limit" --new-tokens 32

# Served, asked over HTTP, and stopped.
ready="$(mktemp)"
show serve --bundle "$bundle" --port 0 --json
"$program" serve --bundle "$bundle" --port 0 --json >"$ready" &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -f "$ready"' EXIT
until [ -s "$ready" ]; do
    kill -0 "$server"
    sleep 0.2
done
python3 - "$ready" <<'END'
import json, sys, urllib.request

url = json.load(open(sys.argv[1]))["url"]
question = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 32}
request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"})
answer = json.load(urllib.request.urlopen(request, timeout=120))
print(answer["choices"][0]["message"]["content"])
print(answer["usage"])
END
kill -TERM "$server"
wait "$server"

# For an engine of others.
[ -z "${EXPORT:-}" ] || step bundle export "$bundle" --format vllm --out "$EXPORT"

#!/usr/bin/env bash
# A draft for a model of one's own, from nothing to a served one: the commands of docs/YOUR_OWN_MODEL.md.
#
#     TARGET=hf:Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:qwen2.5-coder-0.5b-instruct-q4_k_m.gguf DATA=chats.jsonl HOURS=1 docs/your-own-model.sh
#
# All that is made lies in the current folder. Stopped at any moment, the same call goes on. DRAFTSMITH names the program (default: that
# of the path), NAME the run (default: the target's), EXPORT a folder for the draft as vLLM reads it (default: none is made).
set -euo pipefail

program="${DRAFTSMITH:-draftsmith}"
target="${TARGET:?the model: hf:ORG/NAME, hf:ORG/NAME:FILE.gguf, or a path}"
data="${DATA:?conversations of the kind that the draft is for: a JSONL or Parquet file}"
hours="${HOURS:-1}"

step() {
    printf '\n$ draftsmith' >&2
    printf ' %q' "$@" >&2
    printf '\n' >&2
    "$program" "$@"
}

# What this machine has.
step doctor

# The run file, the bill, and the run: answers of the target, its hidden states, the draft, a bundle, a measurement, a verdict.
made="$(step make "$target" --data "$data" --hours "$hours" ${NAME:+--name "$NAME"} --json)"
run="$(python3 -c 'import json, sys; print(json.load(sys.stdin)["run"])' <<<"$made")"
bundle="$run/bundle"
# `make` held these prompts out for measuring.
held_out="$(basename "$run")-own.jsonl"

# The fastest way to draft on this machine, written into the bundle.
step bench tune --bundle "$bundle" --workload "$held_out" --sequences 1 --limit "${LIMIT:-8}" --write

# One text per prompt: alone, in batches, with any plan, with any number of threads.
step bench identity --bundle "$bundle" --workload "$held_out" --limit "${LIMIT:-8}" --new-tokens 32

# Served, asked over HTTP, and stopped.
told="$(mktemp)"
step serve --bundle "$bundle" --port 0 >"$told" &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -f "$told"' EXIT
until grep -q '^ready: ' "$told"; do
    kill -0 "$server"
    sleep 0.2
done
url="$(sed -n 's/^ready: //p' "$told" | python3 -c 'import json, sys; print(json.load(sys.stdin)["url"])')"
python3 - "$url" <<'END'
import json, sys, urllib.request

question = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 32}
request = urllib.request.Request(
    f"{sys.argv[1]}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
)
answer = json.load(urllib.request.urlopen(request, timeout=120))
print(answer["choices"][0]["message"]["content"])
print(answer["usage"])
END
kill -TERM "$server"
wait "$server"

# For an engine of others.
[ -z "${EXPORT:-}" ] || step bundle export "$bundle" --format vllm --out "$EXPORT"

#!/usr/bin/env bash
# Lets a real server, llama-cpp-python's, answer 200 short conversations through a proxy that fails a quarter of all
# requests, and checks that no row is lost or doubled. Then has some of them answered once more, without faults and one
# request at a time, and tells how many greedy answers are the same: llama.cpp's sums depend on what is in its cache.
#
# Usage: bench/peers/regenerate-through-faults.sh MODEL.gguf [PYTHON] [FOLDER]
#   PYTHON   interpreter with llama-cpp-python and its server (default: runs/peers/llama-cpp-python/bin/python)
#   FOLDER   where runs go (default: runs/faults)
# DRAFTSMITH names the binary (default: target/release/draftsmith), API how prompts are sent (text or chat).
set -euo pipefail

model=$1
python=${2:-runs/peers/llama-cpp-python/bin/python}
folder=${3:-runs/faults}
draftsmith=${DRAFTSMITH:-target/release/draftsmith}
api=${API:-text}
here=$(dirname "$0")
server_port=8951
proxy_port=8952
mkdir -p "$folder"

# Its default lets every new request break off the one before.
"$python" -m llama_cpp.server --model "$model" --host 127.0.0.1 --port $server_port --n_ctx 2048 --n_threads 2 \
    --interrupt_requests false --model_alias smollm2 >"$folder/server.log" 2>&1 &
server=$!
"$python" "$here/faulty_proxy.py" $proxy_port $server_port 0.25 >"$folder/proxy.json" 2>"$folder/proxy.log" &
proxy=$!
trap 'kill $server $proxy 2>/dev/null || true' EXIT
for _ in $(seq 120); do
    "$python" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$server_port/v1/models')" 2>/dev/null && break
    sleep 1
done

regenerate() { # NAME PORT [KEY=VALUE …]
    "$draftsmith" regenerate recipes/smollm2-135m-eagle3.toml run.dir="$folder/$1" \
        target.source="$model" 'data.sources=[{ path = "fixtures/tiny-target/prompts-train.jsonl" }]' \
        data.validation=fixtures/tiny-target/prompts-valid.jsonl \
        regenerate.max_new_tokens=32 regenerate.temperature=0 \
        regenerate.server.url="http://127.0.0.1:$2/v1" regenerate.server.api="$api" \
        regenerate.server.extra='{ repeat_penalty = 1.0, top_k = 0, min_p = 0.0 }' "${@:3}"
}

rm -rf "$folder/faults" "$folder/calm"
time regenerate faults $proxy_port regenerate.max_rows=200 regenerate.batch_size=4 regenerate.server.timeout_s=10
kill $proxy
wait $proxy || true
cat "$folder/proxy.json"
time regenerate calm $server_port regenerate.max_rows=10 regenerate.batch_size=1

"$python" - "$folder" <<'PY'
import json, sys

def read(path):
    return [json.loads(line) for line in open(f"{sys.argv[1]}/{path}")]

wanted = [row["id"] for row in read("faults/data/validation.jsonl") + read("faults/data/conversations.jsonl")[:200]]
lines = read("faults/regenerate/answers.jsonl")
faults = {line["id"]: line["messages"] for line in lines}
lost = [id for id in wanted if not faults.get(id)]
doubled = len(lines) - len(faults)
calm = read("calm/regenerate/answers.jsonl")
same = sum(line["messages"] == faults.get(line["id"]) for line in calm)
print(f"{len(wanted)} rows wanted, {len(lost)} lost, {doubled} doubled; {same} of {len(calm)} the same without faults")
sys.exit(bool(lost or doubled))
PY

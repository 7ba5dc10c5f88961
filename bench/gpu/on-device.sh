#!/usr/bin/env bash
# What a machine with an NVIDIA GPU is asked, in stages that each write their result at once:
#
#     bench/gpu/on-device.sh OUT [STAGE...]        stages: doctor tests smoke decode speed (all of them, in this order)
#     bench/gpu/on-device.sh OUT scale TARGET MINUTES
#
# `scale` makes a draft for a target (a GGUF file or a folder) until the time is over: answers for two fifths of it, then
# training on states that the target computes as they are asked for, with validation. PROMPTS names the conversations (JSONL,
# by default those of the tiny target), SETTINGS more keys of the run file. What comes out
# lies in OUT/scale.tar.gz.*, pieces of at most 16 MiB: `cat scale.tar.gz.* | tar xz`. `speed` times answers and capture of
# TARGET, too, if that variable is set.
#
# `decode` is decoding with and without a draft on the card: a proof of one answer, texts alone and in a batch, by every way to
# draft (`bench identity`, greedy and drawn), rates of plain and drafted decoding and of a batch (`bench decode`, once more with
# DRAFTSMITH_CUDA_GRAPHS=off), accept length and speedup with a record (`bench`), and where the draft pays (`bench tune`). TARGET
# and BUNDLE name target and draft (by default the tiny ones), WORKLOAD the prompts, PROMPT_ROWS and NEW_TOKENS how many and how long.
# Records lie in OUT/decode-report.
#
# It needs no network and no Rust: ON_DEVICE names the program, which is brought along
# (`cargo build --release -p draftsmith-train --example on_device`, then `strip`; by default where that leaves it). `scale`, `decode`
# and the answers of `speed` need the program itself, in DRAFTSMITH.
# cuBLASLt is taken from the system or from PyTorch's wheels; PyTorch itself is asked for the stage `speed` only.
#
# SHIM=1 tries everything on a machine without a GPU: the kernels run on the host (DRAFTSMITH built with `--features
# cuda-shim`), shapes are tiny, and PyTorch, if it is there, runs on the CPU. Stages that take longer than LIMIT seconds (120) are stopped; what they wrote stays.
set -uo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
out="${1:?the folder for results}"
shift
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(doctor tests smoke decode speed)
program="${ON_DEVICE:-$here/../../target/release/examples/on_device}"
draftsmith="${DRAFTSMITH:-$here/../../target/release/draftsmith}"
python="${DRAFTSMITH_PYTHON:-python3}"
limit="${LIMIT:-120}"
shim=()
[ -z "${SHIM:-}" ] || shim=(--shim)
mkdir -p "$out"
out="$(cd "$out" && pwd)"
[ -z "${SHIM:-}" ] || export DRAFTSMITH_CUDA_SHIM="$out"
needs() {
    if [ ! -x "$1" ]; then
        echo "error: $1 is not there: build it, or name it in $2" >&2
        exit 2
    fi
}
case "${stages[*]}" in
scale* | decode) ;;
*) needs "$program" ON_DEVICE ;;
esac

# Runs a command under the limit; its lines go to the file of the stage and to the terminal.
ask() {
    local file="$1"
    shift
    timeout "$limit" "$@" 2>>"$out/stderr.txt" | tee -a "$out/$file.jsonl"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || echo "{\"stage\": \"$file\", \"ok\": false, \"exit\": $code}" | tee -a "$out/$file.jsonl"
    return "$code"
}

shape_of() {
    case "$1" in
    tiny) echo '"hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2, "head_dim": 8, "draft_vocab": 48, "slots": 40, "ttt_length": 3' ;;
    smollm2) echo '"hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64, "draft_vocab": 8192, "slots": 2048, "ttt_length": 7' ;;
    llama8b) echo '"hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128, "draft_vocab": 32000, "slots": 2048, "ttt_length": 7' ;;
    esac
}

# PyTorch's side of a shape: compiled, bf16, six steps of which the first compiles.
torch_speed() {
    local shape="$1" device="$2"
    {
        echo "{\"shape\": {$(shape_of "$shape"), \"rope_theta\": 100000.0, \"eps\": 1e-5}, \"threads\": 2, \"compile\": $([ "$device" = cuda ] && echo true || echo false), \"lr\": 1e-4, \"device\": \"$device\"}"
        for _ in 1 2 3 4 5 6 7 8; do echo '{"step": true}'; done
    } >"$out/torch-$shape.in"
    ask "speed-torch-$shape" "$python" "$here/../peers/torch_step.py" <"$out/torch-$shape.in"
    rm -f "$out/torch-$shape.in"
}

# A path that is there from wherever it is read; anything else (`hf:…`) as it is.
place() { if [ -e "$1" ]; then realpath "$1"; else printf '%s' "$1"; fi; }

# A run file for a target: answers, states as they are asked for, training, validation.
run_file() {
    cat <<END
[run]
name = "scale"
dir = "$out/run"
seed = 7
device = "cuda"
[target]
source = "$(place "$1")"
[data]
sources = [{ path = "$(place "${PROMPTS:-$here/../../fixtures/tiny-target/prompts-train.jsonl}")" }]
max_length = ${LENGTH:-1024}
[regenerate]
enabled = true
batch_size = ${BATCH:-1024}
[capture]
mode = "online"
[train]
checkpoint_every = ${EVERY:-100}
[validate]
every = ${EVERY:-100}
[bundle]
name = "scale"
license = "Apache-2.0"
END
}

# Generated tokens that are kept so far.
answered() {
    cat "$out"/run/regenerate/answers.jsonl 2>/dev/null | grep -o '"generated_tokens":[0-9]*' | cut -d: -f2 |
        awk '{ n += $1 } END { print n + 0 }'
}

# SETTINGS as words: a key that has a space must come from the run file.
settings() { printf '%s' "${SETTINGS:-}"; }

# One stage of a run, stopped at a safe point when its seconds are over; a line with how long it took.
timed() {
    local what="$1" seconds="$2" began ended code tokens
    shift 2
    began=$(date +%s)
    timeout -s INT -k 60 "$seconds" "$draftsmith" "$@" >>"$out/scale.txt" 2>&1
    code=$?
    ended=$(date +%s)
    tokens=$(answered)
    echo "{\"stage\": \"scale\", \"what\": \"$what\", \"exit\": $code, \"seconds\": $((ended - began)), \"answered_tokens\": $tokens}" |
        tee -a "$out/scale.jsonl"
    return "$code"
}

scale() {
    local target="$1" seconds=$(($2 * 60)) began tokens left kept whole=""
    needs "$draftsmith" DRAFTSMITH
    began=$(date +%s)
    run_file "$target" >"$out/scale.toml"
    # shellcheck disable=SC2046
    set -- "$out/scale.toml" $(settings)
    timed answers $((seconds * 2 / 5)) regenerate "$@" && whole=1
    tokens=$(answered)
    if [ "$tokens" -eq 0 ]; then
        echo '{"stage": "scale", "ok": false, "error": "no answer in two fifths of the time: see scale.txt"}' | tee -a "$out/scale.jsonl"
        return 1
    fi
    # What is there is enough: the stage ends with most of these, and training begins. Held-out rows are counted among them, and the
    # first rows that are not done yet, which were under way, would have to be answered again.
    left=$((seconds - ($(date +%s) - began)))
    [ -n "$whole" ] || set -- "$@" "regenerate.max_tokens=$((tokens * 9 / 10))"
    timed training "$left" train "$@"
    kept=(scale.toml scale.jsonl scale.txt)
    for path in run/run.toml run/state run/regenerate/answers.jsonl run/train/log.jsonl run/train/best run/train/last; do
        [ ! -e "$out/$path" ] || kept+=("$path")
    done
    rm -f "$out"/scale.tar.gz.*
    tar -C "$out" -cz "${kept[@]}" | split -b 16777216 - "$out/scale.tar.gz."
    [ -e "$out/run/train/log.jsonl" ]
}

# Answers and capture of a target: the time of a small stage is taken off that of a large one, so that loading counts out.
target_speed() {
    local target="$1" rows more
    needs "$draftsmith" DRAFTSMITH
    run_file "$target" >"$out/speed.toml"
    for what in regenerate capture; do
        for rows in ${ROWS:-64 2048}; do
            more=("run.dir=$out/speed-$what-$rows" regenerate.max_new_tokens="${NEW_TOKENS:-256}" capture.mode=cache)
            case "$what" in
            regenerate) more+=("regenerate.max_rows=$rows") ;;
            capture) more+=("data.sources.0.max_rows=$rows" regenerate.enabled=false) ;;
            esac
            # shellcheck disable=SC2046
            ask "speed-$what" "$draftsmith" "$what" --json "$out/speed.toml" "${more[@]}" $(settings) || return 1
            rm -rf "$out/speed-$what-$rows"
        done
    done
}

# Decoding with and without a draft, each command with its own limit of time; what the ones before wrote stays.
decode() {
    local fixtures="$here/../../fixtures" rows="${PROMPT_ROWS:-20}" tokens="${NEW_TOKENS:-128}" batch="${BATCH:-32}" bad=0 more=()
    local sequences=1,8,32 prefill=512 own
    needs "$draftsmith" DRAFTSMITH
    if [ -n "${SHIM:-}" ]; then
        rows="${PROMPT_ROWS:-1}" tokens="${NEW_TOKENS:-3}" batch=2 sequences=1 prefill=16
    fi
    own=(--device cuda --target "${TARGET:-$fixtures/tiny-target}" --bundle "${BUNDLE:-$fixtures/tiny-drafts/eagle3}")
    more=(--workload "${WORKLOAD:-$fixtures/tiny-target/eval.jsonl}" --limit "$rows")
    ask decode "$draftsmith" generate "${own[@]}" --prompt "${PROMPT:-Calculate 22 + 20.}" --depth 3 --max-new-tokens "$tokens" \
        --prove --json || bad=1
    ask decode "$draftsmith" bench identity "${own[@]}" "${more[@]}" --new-tokens "$tokens" --json || bad=1
    ask decode "$draftsmith" bench identity "${own[@]}" "${more[@]}" --new-tokens "$tokens" --temperature 0.8 --top-p 0.95 \
        --json || bad=1
    ask decode "$draftsmith" bench "${own[@]}" "${more[@]}" --depth 3 --max-new-tokens "$tokens" \
        --report "$out/decode-report" --json || bad=1
    # With kernels started as graphs, and one by one.
    local graphs
    for graphs in '' off; do
        ask decode env DRAFTSMITH_CUDA_GRAPHS="$graphs" "$draftsmith" bench decode "${own[@]}" "${more[@]}" --new-tokens "$tokens" \
            --batch "$batch" --prefill-tokens "$prefill" --json || bad=1
    done
    ask decode "$draftsmith" bench tune "${own[@]}" "${more[@]}" --max-new-tokens "$tokens" --sequences "$sequences" --json || bad=1
    return "$bad"
}

failed=0
if [ "${stages[0]}" = scale ]; then
    if [ ${#stages[@]} -ne 3 ]; then
        echo "error: scale takes a target and minutes" >&2
        exit 2
    fi
    scale "${stages[1]}" "${stages[2]}" || failed=1
    exit "$failed"
fi
for stage in "${stages[@]}"; do
    case "$stage" in
    decode) decode || failed=1 ;;
    doctor | tests | smoke) ask "$stage" "$program" "$stage" "${shim[@]}" || failed=1 ;;
    speed)
        if [ -n "${SHIM:-}" ]; then
            ask speed "$program" speed --shim || failed=1
            if "$python" -c 'import torch' 2>/dev/null; then torch_speed tiny cpu || failed=1; fi
        else
            # Sides in turn, so that both see the card as it is at that time.
            for shape in smollm2 llama8b; do
                ask speed "$program" speed "$shape" || failed=1
                torch_speed "$shape" cuda || failed=1
            done
        fi
        [ -z "${TARGET:-}" ] || target_speed "$TARGET" || failed=1
        ;;
    *)
        echo "error: no stage $stage: doctor, tests, smoke, decode, speed, scale" >&2
        exit 2
        ;;
    esac
done
exit "$failed"

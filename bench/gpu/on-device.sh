#!/usr/bin/env bash
# What a machine with an NVIDIA GPU is asked, in stages that each write their result at once:
#
#     bench/gpu/on-device.sh OUT [STAGE...]        stages: doctor tests smoke speed (all of them, in this order)
#
# It needs no network and no Rust: ON_DEVICE names the program, which is brought along
# (`cargo build --release -p draftsmith-train --example on_device`, then `strip`; by default where that leaves it).
# cuBLASLt is taken from the system or from PyTorch's wheels; PyTorch itself is asked for the stage `speed` only.
#
# SHIM=1 tries everything on a machine without a GPU: the kernels run on the host, shapes are tiny, and PyTorch, if it is
# there, runs on the CPU. Stages that take longer than LIMIT seconds (120) are stopped; what they wrote stays.
set -uo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
out="${1:?the folder for results}"
shift
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(doctor tests smoke speed)
program="${ON_DEVICE:-$here/../../target/release/examples/on_device}"
python="${DRAFTSMITH_PYTHON:-python3}"
limit="${LIMIT:-120}"
shim=()
[ -z "${SHIM:-}" ] || shim=(--shim)
mkdir -p "$out"
if [ ! -x "$program" ]; then
    echo "error: $program is not there: build it, or name it in ON_DEVICE" >&2
    exit 2
fi

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

failed=0
for stage in "${stages[@]}"; do
    case "$stage" in
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
        ;;
    *)
        echo "error: no stage $stage: doctor, tests, smoke, speed" >&2
        exit 2
        ;;
    esac
done
exit "$failed"

#!/usr/bin/env python3
"""How fast two processes with one thread each train, beside one process with two threads.

Rows are captured once; then both sides train on copies of them, in turn, each time from the first step. A step's time is the
difference of what the log says after it and after the one before; the first step of a process is not counted. Both must come
to the same weights, bit for bit, and the traffic of a step must be that of the formula in docs/RANKS.md.

Usage: two_ranks.py --draftsmith BINARY --target FILE [--launch env|mpirun] [--repetitions N] [--steps N] [--around COMMAND] [--out FILE]
Run it from the root of the repository. Ranks are started by their environment and meet over TCP, or by `mpirun`, which takes a program
that was built with the feature `mpi`. `--around` is put before each measured command, for example to keep the machine quiet. One JSON
object goes to stdout or to FILE.
"""

import argparse
import hashlib
import json
import os
import pathlib
import platform
import shlex
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile

RUN = """
[run]
name = "two-ranks"
seed = 7
[target]
source = {target}
[data]
sources = [{{ path = {data}, max_rows = {rows} }}]
max_length = 512
[regenerate]
enabled = false
[draft]
vocab_size = 8192
[train]
epochs = 4
pack_length = {pack}
tokens_per_step = {step}
max_steps = {steps}
log_every = 1
checkpoint_every = 1000
[validate]
every = 0
[bundle]
license = "Apache-2.0"
"""


def start(command, **variables):
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **variables})


def end(command, process):
    out, err = process.communicate()
    if process.returncode != 0:
        sys.exit(f"{shlex.join(command)}\n{out}{err}")


def run(command):
    end(command, start(command))


def run_two(command):
    """Two ranks that find each other by their environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(command, RANK=rank, **place) for rank in "01"]
    for process in ranks:
        end(command, process)


def steps_of(folder):
    """Seconds and slots of each step but the first, with what the ranks did for it."""
    lines = [json.loads(line) for line in (folder / "train/log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["event"] == "step"]
    ends = [line["total_slots"] / line["tokens_per_s"] for line in lines]
    return [
        {"seconds": ends[i] - ends[i - 1], "slots": lines[i]["slots"], "ranks": lines[i].get("ranks")}
        for i in range(1, len(lines))
    ]


def trained_parameters(folder):
    """Values of the trained weights, from the header of a checkpoint, and the hash of its file."""
    (file,) = (folder / "train/checkpoints").glob("step-*/tensors.safetensors")
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    count = 0
    for name, tensor in header.items():
        if name.startswith("w."):
            size = 1
            for n in tensor["shape"]:
                size *= n
            count += size
    return count, hashlib.sha256(content).hexdigest()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--draftsmith", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--launch", choices=["env", "mpirun"], default="env")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pack", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--around", default="")
    parser.add_argument("--out")
    args = parser.parse_args()
    program = str(pathlib.Path(args.draftsmith).resolve())
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]
    launched = run_two if args.launch == "env" else lambda command: run(mpirun + command)
    sides = {
        "one process, two threads": (["run.threads=2"], run),
        "two processes, one thread each": (["run.threads=1"], launched),
    }
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        run_file = home / "two-ranks.toml"
        step = args.pack * args.micro_batches
        slots = step * args.steps
        run_file.write_text(
            RUN.format(
                target=json.dumps(str(pathlib.Path(args.target).resolve())),
                data=json.dumps(str(pathlib.Path("fixtures/tiny-target/prompts-train.jsonl").resolve())),
                rows=slots // 50,
                pack=args.pack,
                step=step,
                steps=args.steps,
            )
        )
        captured = home / "captured"
        run([program, "capture", str(run_file), f"run.dir={captured}"])
        raw, hashes, parameters = {name: [] for name in sides}, set(), 0
        for repetition in range(args.repetitions):
            order = list(sides.items())
            for name, (overrides, launcher) in order if repetition % 2 == 0 else reversed(order):
                folder = home / "train"
                shutil.copytree(captured, folder)
                command = [program, "train", str(run_file), f"run.dir={folder}", *overrides]
                launcher(shlex.split(args.around) + command)
                parameters, digest = trained_parameters(folder)
                hashes.add(digest)
                raw[name].append(steps_of(folder))
                shutil.rmtree(folder)
                median = statistics.median(s["seconds"] for s in raw[name][-1])
                print(f"{repetition}: {name}: {median:.3f} s a step", file=sys.stderr)
    rate = {
        name: [sum(s["slots"] for s in steps) / sum(s["seconds"] for s in steps) for steps in repetitions]
        for name, repetitions in raw.items()
    }
    one, two = rate.values()
    ratios = [b / a for a, b in zip(one, two)]
    of_ranks = [s["ranks"] for steps in raw["two processes, one thread each"] for s in steps]
    sent = sorted({ranks["sent_bytes"] for ranks in of_ranks})
    # Rank 0 sends what others own of its gradient, and what it owns of the sum: 4 bytes, twice, half of them.
    formula = 4 * 2 * (2 - 1) * parameters // 2
    record = {
        "command": f"bench/peers/two_ranks.py --launch {args.launch} --repetitions {args.repetitions} --steps {args.steps}",
        "machine": {"cpu": cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "target": pathlib.Path(args.target).name,
        "pack_length": args.pack,
        "micro_batches": args.micro_batches,
        "steps": args.steps,
        "trained_parameters": parameters,
        "same_weights": len(hashes) == 1,
        "tokens_per_s": rate,
        "ratio": {
            "of": "two processes over one, tokens/s, by repetition",
            "values": ratios,
            "median": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        },
        "traffic": {"sent_bytes_a_step": sent, "formula_bytes": formula},
        "one_process_step_s": statistics.median(
            s["seconds"] for steps in raw["one process, two threads"] for s in steps
        ),
        "sum_s_a_step": statistics.median(ranks["sum_s"] for ranks in of_ranks),
        "wait_s_a_step": statistics.median(ranks["wait_s"] for ranks in of_ranks),
        "step_s": {name: [[s["seconds"] for s in steps] for steps in all_of] for name, all_of in raw.items()},
    }
    text = json.dumps(record, indent=2) + "\n"
    if args.out:
        pathlib.Path(args.out).write_text(text)
    else:
        print(text, end="")
    if not record["same_weights"]:
        sys.exit("the sides came to different weights")


def cpu():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()

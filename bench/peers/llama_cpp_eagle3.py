"""Accept length of an exported EAGLE-3, DFlash or DSpark draft in llama.cpp, as a peer measures it.

llama-cpp-python carries llama.cpp's library with the architectures `eagle3` and `dflash`, but no command that speculates. Its
source package has one: `examples/speculative-simple`. This script compiles that file against the installed library
(seconds) and decodes a workload with it, greedy, a chain of fixed depth.

    bench/peers/install-llama-cpp-python.sh
    draftsmith bundle export DIR --format gguf --target MODEL.gguf --out draft-gguf
    python3 bench/peers/llama_cpp_eagle3.py --venv runs/peers/llama-cpp-python --target MODEL.gguf \
        --draft draft-gguf/draft.gguf --kind eagle3 --workload recipes/data/eval/gsm8k.jsonl --limit 40

With `--draftsmith target/release/draftsmith --bundle DIR` the draft is exported from DIR (no `--draft`), the same prompts are
decoded here, too, and the script ends with 1 if the accept lengths are more than five per cent apart. A block draft that
proposes a part of the vocabulary is exported for the whole, so the draft measured here is then the export, imported.

The prompt is SmolLM2's chat template around the first turn of each row. Prints one JSON object. Accept length: tokens
committed by verify steps / verify steps, the target's own token included; llama.cpp counts what follows an end of text
inside an accepted proposal, draftsmith does not.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile

VERSION = "0.3.36"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PROMPT = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def library_folder(venv: pathlib.Path) -> pathlib.Path:
    found = sorted(venv.glob("lib/python3*/site-packages/lib/libllama-common.so"))
    if not found:
        sys.exit(f"{venv} has no libllama-common.so: run bench/peers/install-llama-cpp-python.sh first")
    return found[0].parent


def compiled(venv: pathlib.Path, work: pathlib.Path) -> pathlib.Path:
    """The speculating command, compiled once."""
    program = work / "speculative-simple"
    if program.exists():
        return program
    work.mkdir(parents=True, exist_ok=True)
    package = f"llama-cpp-python=={VERSION}"
    pip = [venv / "bin" / "pip", "download", package, "--no-binary", "llama-cpp-python", "--no-deps", "-d", work]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    with tarfile.open(work / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
        archive.extractall(work, filter="data")
    source = work / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    libraries = library_folder(venv)
    includes = [f"-I{source / folder}" for folder in ("common", "include", "ggml/include", "vendor")]
    links = [f"-L{libraries}", "-lllama-common", "-lllama", "-lggml", "-lggml-base"]
    example = source / "examples" / "speculative-simple" / "speculative-simple.cpp"
    subprocess.run(["c++", "-O2", "-std=c++17", *includes, example, *links, "-o", program], check=True)
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=pathlib.Path, required=True, help="where llama-cpp-python is installed")
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", help="an exported draft")
    parser.add_argument("--kind", choices=("eagle3", "dflash", "dspark"), help="of the draft; said by a bundle")
    parser.add_argument("--draftsmith", help="the program; with --bundle: export, and decode here, too")
    parser.add_argument("--bundle", type=pathlib.Path)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--depth", type=int, help="tokens per proposal (default: 5, or a block)")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/peers/llama-cpp-draft"))
    args = parser.parse_args()
    if (args.draft is None) == (args.bundle is None) or (args.bundle is None) != (args.draftsmith is None):
        parser.error("give --draft, or --bundle and --draftsmith")
    if args.bundle is None:
        args.depth = args.depth or 5
        print(json.dumps(measured(args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(compared(args, scratch))


def draftsmith(args: argparse.Namespace, *command: object) -> None:
    done = subprocess.run([args.draftsmith, *map(str, command), "--quiet"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"draftsmith {command[0]} {command[1]} failed:\n{done.stdout}{done.stderr}")


def compared(args: argparse.Namespace, scratch: str) -> int:
    """Both sides; 1 if they are too far apart."""
    out, back, record = (pathlib.Path(scratch) / name for name in ("out", "back", "record.json"))
    own = json.loads((args.bundle / "config.json").read_text())
    spark = own["architectures"][0] == "Qwen3DSparkModel"
    args.kind = "eagle3" if "dflash_config" not in own else "dspark" if spark else "dflash"
    args.depth = args.depth or (5 if args.kind == "eagle3" else own["block_size"] - (not spark))
    draftsmith(args, "bundle", "export", args.bundle, "--format", "gguf", "--target", args.target, "--out", out)
    bundle = args.bundle
    if args.kind != "eagle3" and (own.get("draft_vocab_size") or own["vocab_size"]) < own["vocab_size"]:
        draftsmith(args, "bundle", "verify-export", out, "--bundle", args.bundle)
        draftsmith(args, "bundle", "import", out, "--target", args.target, "--out", back)
        bundle = back
    args.draft = out / "draft.gguf"
    there = measured(args)
    bench = ["bench", "--bundle", bundle, "--target", args.target, "--workload", args.workload, "--limit", args.limit]
    bench += ["--max-new-tokens", args.new_tokens, "--depth", args.depth, "--threads", args.threads, "--json", record]
    draftsmith(args, *bench)
    here = json.loads(record.read_text())["accept_len"]
    ratio = there["accept_len"] / here
    lengths = {"llama.cpp": there["accept_len"], "draftsmith": here, "ratio": ratio}
    print(json.dumps({"kind": args.kind, "depth": args.depth, "prompts": len(there["rows"]), "accept_length": lengths}))
    return int(abs(ratio - 1) > 0.05)


def measured(args: argparse.Namespace) -> dict:
    """llama.cpp's side."""
    kind = args.kind or "eagle3"
    program = compiled(args.venv, args.work)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library_folder(args.venv))}
    with open(args.workload, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: args.limit]
    committed = accepted = 0
    results = []
    for row in rows:
        prompt = args.work / f"prompt-{os.getpid()}.txt"
        prompt.write_text(PROMPT.format(system=SYSTEM, user=row["turns"][0]), encoding="utf-8")
        command = [program, "-m", args.target, "-md", args.draft, "--spec-type", f"draft-{kind}"]
        command += ["--spec-draft-n-max", str(args.depth), "--spec-draft-p-min", "0", "--temp", "0"]
        # Read as bytes: as text, the line feed at the end of the prompt would be dropped.
        command += ["-n", str(args.new_tokens), "-t", str(args.threads), "-c", "2048", "-bf", str(prompt)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        counts = {key: re.search(rf"{key}\s+= (\d+)", run.stderr + run.stdout) for key in ("n_predict", "n_accept")}
        if run.returncode != 0 or None in counts.values():
            sys.exit(f"llama.cpp failed on row {row['id']}:\n{run.stderr[-2000:]}")
        n_predict, n_accept = (int(counts[key].group(1)) for key in ("n_predict", "n_accept"))
        committed += n_predict
        accepted += n_accept
        results.append({"id": row["id"], "committed_tokens": n_predict, "verify_steps": n_predict - n_accept})
        prompt.unlink()
    steps = committed - accepted
    answer = {"engine": f"llama.cpp of llama-cpp-python {VERSION}", "workload": args.workload, "kind": kind}
    answer |= {"depth": args.depth}
    answer |= {"rows": results, "committed_tokens": committed, "verify_steps": steps, "accept_len": committed / steps}
    return answer


if __name__ == "__main__":
    main()

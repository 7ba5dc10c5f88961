#!/usr/bin/env python3
"""Makes the small prompt mix, its held-back rows and the evaluation files of this folder.

    python3 make.py TRAIN.jsonl.zst VALID.jsonl.zst EVAL_DIR LICENSES_DIR [--out DIR]

TRAIN and VALID are the project's full prompt files, EVAL_DIR holds `gsm8k.jsonl` and `mtbench.jsonl`, LICENSES_DIR the
licence texts of the carrying repositories. Needs Python 3.9 and the `zstd` program; the result depends on the input
files and on SEED alone.

Only rows whose licence is exactly MIT, Apache-2.0, BSD-3-Clause or CC0-1.0 in all of its parts are taken, and of those
only the sources named in SOURCES: competition problems (disputed rights in the single problems), texts made with a
closed model, and data over third-party texts (paper abstracts, plot summaries) are left out.
"""

import argparse
import collections
import hashlib
import json
import pathlib
import random
import re
import shutil
import subprocess

SEED = 20261123

ALLOWED = {
    "MIT",
    "Apache-2.0",
    "BSD-3-Clause",
    "CC0-1.0",
    "CC0-1.0 (base prompt) + CC0-1.0 (constraint)",
    "Apache-2.0 (base prompt) + CC0-1.0 (constraint)",
}

# source -> rows of the training mix. The shares by domain follow Open-PerfectBlend (math 54 %, chat 27.5 %, code 12.5 %,
# instruction following 4.3 %, reasoning 1.8 %); inside math the plain word problems come first.
SOURCES = {
    "gsm8k_train": 5200,
    "gsm8k_backward": 1500,
    "gsm8k_check": 500,
    "gsm8k_followup": 500,
    "svamp": 500,
    "synthetic_topics": 2600,
    "open_assistant": 330,
    "awesome_chatgpt_prompts": 640,
    "self_dialogue": 600,
    "synthetic_code": 1080,
    "exercism": 300,
    "python_programming_puzzles": 200,
    "wikisql": 320,
    "constraints_synthetic_topics": 575,
    "constraints_open_assistant": 75,
    "reasoning_gym": 280,
}
# The mix for drafts of code models; `prompts-functions.jsonl.zst` stands beside it.
CODE = {
    "synthetic_code": 1900,
    "exercism": 355,
    "python_programming_puzzles": 352,
    "wikisql": 200,
    "gsm8k_train": 150,
    "synthetic_topics": 150,
    "awesome_chatgpt_prompts": 60,
}
# Held-out requests for code, to measure with.
CODE_EVAL = {"synthetic_code": 24, "exercism": 3, "python_programming_puzzles": 5, "wikisql": 8}
# Rows with longer prompts (tokens of user and system turns) are left out: the file stays small and the share of
# tokens stays near the share of rows.
MAX_PROMPT_TOKENS = 320
# Answers of the source are kept only where they are short and written by people; the target's own answers replace them.
ANSWERS = {"gsm8k_train", "self_dialogue"}
MAX_ANSWER_CHARS = 160
VALID_ROWS = 200
GSM8K_ROWS = 80
HUMANEVAL_ROWS = 80

LICENSE_FILES = {
    "gsm8k (training and evaluation)": "openai__grade-school-math__LICENSE",
    "svamp": "arkilpatel__SVAMP__LICENSE",
    "open_assistant": "LAION-AI__Open-Assistant__LICENSE",
    "awesome_chatgpt_prompts": "f__awesome-chatgpt-prompts__LICENSE",
    "self_dialogue": "jfainberg__self_dialogue_corpus__LICENSE",
    "exercism": "exercism__problem-specifications__LICENSE",
    "python_programming_puzzles": "microsoft__PythonProgrammingPuzzles__LICENSE",
    "wikisql": "jkkummerfeld__text2sql-data__data_wikisql-LICENSE.txt",
    "mtbench (evaluation)": "lm-sys__FastChat__LICENSE",
    "humaneval (evaluation)": "openai__human-eval__LICENSE",
}


def read_rows(path):
    path = str(path)
    if path.endswith(".zst"):
        text = subprocess.run(["zstd", "-dcq", path], check=True, stdout=subprocess.PIPE).stdout.decode("utf-8")
    else:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    # str.splitlines would also cut at U+2028 and friends, which may stand inside a JSON string.
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def compact(row):
    """The row as it is written: turns without long or machine-made answers."""
    messages = row["conversations"]
    answer_chars = sum(len(m["content"]) for m in messages if m["role"] == "assistant")
    if row["source"] not in ANSWERS or answer_chars > MAX_ANSWER_CHARS or row["answers"] != "all":
        messages = [m for m in messages if m["role"] != "assistant"]
    return {
        "id": row["id"],
        "domain": row["domain"],
        "source": row["source"],
        "license": row["license"],
        "conversations": [{"role": m["role"], "content": m["content"]} for m in messages],
    }


def key(row):
    """Case, punctuation and space do not make a prompt new."""
    text = "\n".join(m["content"] for m in row["conversations"] if m["role"] == "user")
    return hashlib.sha256(re.sub(r"\W+", " ", text.lower()).strip().encode("utf-8")).hexdigest()


def pick(rows, want, seed, taken):
    by_source = collections.defaultdict(list)
    for row in rows:
        if row["source"] in want and row["license"] in ALLOWED and row["prompt_tokens"] <= MAX_PROMPT_TOKENS:
            by_source[row["source"]].append(row)
    out = []
    for source, count in want.items():
        pool = sorted(by_source[source], key=lambda row: row["id"])
        random.Random(f"{seed}/{source}").shuffle(pool)
        picked = 0
        for row in pool:
            if picked == count:
                break
            if key(row) in taken:
                continue
            taken.add(key(row))
            out.append(row)
            picked += 1
        if picked < count:
            print(f"  {source}: only {picked} of {count}")
    random.Random(f"{seed}/order").shuffle(out)
    return out


def write_zst(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        subprocess.run(["zstd", "-19", "-q", "-c"], check=True, input=text.encode("utf-8"), stdout=file)
    temporary.replace(path)


def report(name, path, rows):
    print(f"{name}: {len(rows)} rows, {path.stat().st_size} bytes")
    tokens = collections.Counter()
    count = collections.Counter()
    turns = 0
    for row in rows:
        tokens[row["domain"]] += row["prompt_tokens"]
        count[row["domain"]] += 1
        turns += row["n_user_turns"]
    for domain, rows_here in count.most_common():
        share = 100 * rows_here / len(rows)
        print(f"  {domain:24} {rows_here:6} rows {share:5.1f} %  {tokens[domain]:8} prompt tokens")
    print(f"  {'all':24} {len(rows):6} rows          {sum(tokens.values()):8} prompt tokens, {turns} user turns")
    print(f"  licences: {dict(collections.Counter(row['license'] for row in rows))}")
    print(f"  sources: {dict(collections.Counter(row['source'] for row in rows))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("valid")
    parser.add_argument("eval_dir", type=pathlib.Path)
    parser.add_argument("licenses_dir", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args = parser.parse_args()

    valid_pool = read_rows(args.valid)
    total = sum(SOURCES.values())
    want_valid = {source: max(1, round(VALID_ROWS * count / total)) for source, count in SOURCES.items()}
    taken = set()
    valid = pick(valid_pool, want_valid, SEED, taken)
    train = pick(read_rows(args.train), SOURCES, SEED, taken)
    math = [row for row in train if row["domain"] == "math"]
    general = [row for row in train if row["domain"] != "math"]
    files = [("prompts-math.jsonl.zst", math), ("prompts-general.jsonl.zst", general), ("prompts-valid.jsonl.zst", valid)]
    for name, rows in files:
        write_zst(args.out / name, [compact(row) for row in rows])
        report(name, args.out / name, rows)

    # A set of its own, which may share rows with those above. Its user turns alone: a code model answers all of them.
    held_out = {key(row) for row in valid}
    code_eval = pick(valid_pool, CODE_EVAL, f"{SEED}/code-eval", held_out)
    code = pick(read_rows(args.train), CODE, f"{SEED}/code", held_out)
    name = "prompts-code.jsonl.zst"
    write_zst(args.out / name, [compact({**row, "answers": "none"}) for row in code])
    report(name, args.out / name, code)

    (args.out / "eval").mkdir(exist_ok=True)
    text = "".join(
        json.dumps(
            {
                "id": row["id"],
                "bench": "code",
                "category": row["source"],
                "turns": [m["content"] for m in row["conversations"] if m["role"] == "user"][:1],
                "split": "public",
            },
            ensure_ascii=False,
        )
        + "\n"
        for row in code_eval
    )
    (args.out / "eval" / "code.jsonl").write_text(text, encoding="utf-8")
    print(f"eval/code.jsonl: {len(code_eval)} rows")
    gsm8k = [row for row in read_rows(args.eval_dir / "gsm8k.jsonl")][:GSM8K_ROWS]
    mtbench = read_rows(args.eval_dir / "mtbench.jsonl")
    # The tests that would run the answers are left out: nothing here executes them.
    humaneval = [
        {**row, "meta": {"task_id": row["meta"]["task_id"]}}
        for row in read_rows(args.eval_dir / "humaneval.jsonl")[:HUMANEVAL_ROWS]
    ]
    files = [("gsm8k.jsonl", gsm8k), ("mtbench.jsonl", mtbench), ("humaneval.jsonl", humaneval)]
    for name, rows in files:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / "eval" / name).write_text(text, encoding="utf-8")
        print(f"eval/{name}: {len(rows)} rows")

    (args.out / "licenses").mkdir(exist_ok=True)
    for file in sorted(set(LICENSE_FILES.values())):
        shutil.copyfile(args.licenses_dir / file, args.out / "licenses" / file)


if __name__ == "__main__":
    main()

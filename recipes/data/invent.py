"""Invents prompts: Python functions to complete, whose docstrings the target itself writes.

Usage: invent.py URL EVAL_FOLDER OUT.jsonl

URL is a `draftsmith serve` of a Qwen target (`http://127.0.0.1:8080`), EVAL_FOLDER holds the evaluation sets (JSONL with
`turns`). Names and signatures are put together here, from lists; the server continues the docstring. What shares eight words
in a row with an evaluation row, or the name of a function there, is dropped. A server that is asked for the same again gives
the same.
"""

import concurrent.futures as cf
import glob
import hashlib
import json
import random
import re
import sys
import urllib.request

if len(sys.argv) != 4:
    sys.exit(__doc__)
url, eval_folder, out_path = sys.argv[1:]
random.seed(11)
verbs = "count find remove sum sort merge split filter group reverse rotate flatten compare validate parse format encode decode compress expand extract replace swap shift shuffle rank average normalize interleave partition convert generate check compute list map reduce zip pair index trim pad join chunk dedupe collapse invert transpose search update track classify tally match align clamp".split()
objs = "vowels words digits primes factors pairs triplets intervals matrix_rows matrix_columns diagonals duplicates anagrams palindromes substrings prefixes suffixes characters sentences lines paragraphs tokens dates times prices orders scores grades students employees inventory items keys values nested_lists dictionaries tuples sets graph_edges tree_nodes paths cycles islands coordinates points rectangles triangles angles temperatures ratios fractions roman_numerals binary_strings hex_colors bits brackets parentheses expressions operators stack_operations queue_events log_lines csv_rows json_fields urls emails ip_addresses passwords usernames file_names versions tags votes ballots coins change_amounts subarrays windows peaks valleys runs gaps streaks permutations combinations subsets sequences fibonacci_terms powers squares cubes divisors multiples remainders sums products differences medians modes ranges percentages".split()
quals = [
    "",
    "",
    "",
    "",
    "_by_length",
    "_in_order",
    "_with_limit",
    "_ignoring_case",
    "_above_threshold",
    "_recursively",
    "_without_duplicates",
    "_by_key",
    "_at_even_indices",
    "_until_zero",
    "_in_window",
    "_by_frequency",
    "_from_end",
    "_modulo_n",
    "_between_bounds",
    "_per_group",
]
sigs = [
    ("numbers: List[int]", "int"),
    ("numbers: List[int]", "List[int]"),
    ("text: str", "str"),
    ("text: str", "int"),
    ("words: List[str]", "List[str]"),
    ("words: List[str]", "Dict[str, int]"),
    ("values: List[float]", "float"),
    ("matrix: List[List[int]]", "List[int]"),
    ("n: int", "int"),
    ("n: int", "List[int]"),
    ("a: int, b: int", "int"),
    ("text: str", "bool"),
    ("items: List[int], k: int", "List[int]"),
    ("s: str, t: str", "bool"),
    ("data: Dict[str, int]", "List[str]"),
    ("pairs: List[Tuple[int, int]]", "List[Tuple[int, int]]"),
    ("numbers: List[int], target: int", "bool"),
    ("n: int", "str"),
    ("lst", "list"),
    ("x, y", "bool"),
]
heads = [
    "Complete the following Python function. Return the whole function in one code block.",
    "Finish this function.",
    "Complete this Python function:",
    "Please implement the body of this function and show the complete code.",
    "Fill in the implementation.",
]
names = set()
while len(names) < 3000:
    names.add(f"{random.choice(verbs)}_{random.choice(objs)}{random.choice(quals)}")
names = sorted(names)
random.shuffle(names)
evals = []
for p in glob.glob(f"{eval_folder}/*.jsonl"):
    for line in open(p, encoding="utf-8"):
        r = json.loads(line)
        evals.append(
            " ".join(r["turns"]) + " " + " ".join(x for x in (r.get("reference") or []) if isinstance(x, str))
            if not isinstance(r.get("reference"), str)
            else " ".join(r["turns"]) + " " + r["reference"]
        )
grams = set()
entry = set()
for t in evals:
    w = re.findall(r"\w+", t.lower())
    for i in range(len(w) - 7):
        grams.add(" ".join(w[i : i + 8]))
    entry |= set(re.findall(r"def (\w+)", t))


def ask(job):
    name, (args, typ), head, seed = job
    need = sorted(set(re.findall(r"List|Dict|Tuple", args + typ)))
    imp = f"from typing import {', '.join(need)}\n\n\n" if need else ""
    arrow = f" -> {typ}" if ":" in args else ""
    code = f'{imp}def {name}({args}){arrow}:\n    """'
    prompt = f"<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n{head}\n\n```python\n{code}"
    body = json.dumps(
        {
            "model": "m",
            "prompt": prompt,
            "max_tokens": 160,
            "temperature": 0.9,
            "top_p": 0.95,
            "stop": ['"""', "```"],
            "seed": seed,
        }
    ).encode()
    req = urllib.request.Request(url.rstrip("/") + "/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(req, timeout=3000) as answer:
        r = json.load(answer)["choices"][0]
    if r["finish_reason"] != "stop":
        return None
    doc = r["text"].rstrip()
    if len(doc.split()) < 4:
        return None
    text = code + doc + ("\n    " if "\n" in doc else "") + '"""'
    w = re.findall(r"\w+", text.lower())
    if name in entry or any(" ".join(w[i : i + 8]) in grams for i in range(len(w) - 7)):
        return None
    return {
        "id": "invented-" + hashlib.sha256(text.encode()).hexdigest()[:12],
        "domain": "code",
        "source": "invented_functions",
        "license": "CC0-1.0",
        "conversations": [{"role": "user", "content": f"{head}\n\n```python\n{text}\n```"}],
    }


jobs = [
    (n, random.choice(sigs), heads[0] if random.random() < 0.5 else random.choice(heads), random.randrange(1 << 30))
    for n in names
]
out = open(out_path, "w")
kept = 0
bad = 0
with cf.ThreadPoolExecutor(32) as ex:
    for i, r in enumerate(ex.map(ask, jobs)):
        if r:
            out.write(json.dumps(r) + "\n")
            kept += 1
        else:
            bad += 1
        if i % 200 == 0:
            print(i, kept, bad, flush=True)
            out.flush()
print("done", kept, bad)

"""lm-evaluation-harness against `draftsmith serve`: its own client, its own requests.

    pip install lm_eval requests aiohttp tenacity transformers     (no torch is needed)
    draftsmith serve --target FOLDER --port 8080 &
    python bench/peers/lm_eval_client.py http://127.0.0.1:8080 FOLDER

`local-completions` sends `{"prompt": [[ids]], "max_tokens": 1, "logprobs": 1, "echo": true, "temperature": 0}` and reads
`logprobs.token_logprobs`, `tokens` and `top_logprobs`. What is checked:

* the score of a continuation is the score of the whole text less that of its context (chain rule), both from other
  requests;
* a continuation is called greedy exactly if the server writes it at temperature 0;
* several prompts in one request score as one by one;
* `generate_until` returns the text that the server completes.
"""

import sys

import requests
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

TEXTS = [
    ("There are 2 boxes with 8 buttons in each box.", " So 2 times 8 is 16."),
    ("Calculate 22 + 20.", " 22 + 20 = 42."),
    ("Why?", " Because."),
    ("Tell me a short story about a cow.", " The cow and the door."),
]


def main() -> int:
    base, folder = sys.argv[1].rstrip("/"), sys.argv[2]
    name = requests.get(f"{base}/v1/models", timeout=60).json()["data"][0]["id"]
    url = f"{base}/v1/completions"

    def client(batch_size):
        return LocalCompletionsAPI(
            base_url=url, model=name, tokenizer=folder, tokenizer_backend="huggingface", tokenized_requests=True,
            batch_size=batch_size, max_length=512, num_concurrent=1, max_retries=1,
        )

    def instances(kind, arguments):
        return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]

    def ids(text):
        return lm.tok_encode(text, add_special_tokens=False)

    def total(prompt):
        """The score of a prompt, without the harness."""
        body = {"model": name, "prompt": prompt, "max_tokens": 0, "logprobs": 1, "echo": True}
        choice = requests.post(url, json=body, timeout=60).json()["choices"][0]
        return sum(choice["logprobs"]["token_logprobs"][1:])

    lm = client(1)
    # What the model itself would write after each context, as further continuations: these are greedy.
    pairs = list(TEXTS)
    for context, _ in TEXTS:
        body = {"model": name, "prompt": ids(context), "max_tokens": 6, "temperature": 0, "ignore_eos": True,
                "skip_special_tokens": False}
        said = requests.post(url, json=body, timeout=60).json()["choices"][0]["text"]
        if said and ids(context + said)[: len(ids(context))] == ids(context):
            pairs.append((context, said))
    failures, greedy_ones = 0, 0

    def expect(what, found, wanted):
        nonlocal failures
        same = abs(found - wanted) < 1e-3 if isinstance(wanted, float) else found == wanted
        failures += not same
        print(f"{'ok  ' if same else 'FAIL'} {what}: {found}" + ("" if same else f", expected {wanted}"))

    scored = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    together = client(4).loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (score, greedy), (score_4, greedy_4) in zip(pairs, scored, together):
        before, after = lm._encode_pair(context, continuation)
        what = f"{context[:18]!r} + {continuation[:18]!r}"
        expect(f"{what}, score", score, total(before + after) - total(before))
        body = {"model": name, "prompt": before, "max_tokens": len(after), "temperature": 0, "ignore_eos": True,
                "skip_special_tokens": False}
        said = requests.post(url, json=body, timeout=60).json()["choices"][0]["text"]
        expect(f"{what}, greedy", greedy, said == lm.tokenizer.decode(after))
        greedy_ones += greedy
        expect(f"{what}, in a batch", (round(score_4, 4), greedy_4), (round(score, 4), greedy))
    expect("some continuations are greedy, and some are not", 0 < greedy_ones < len(pairs), True)
    rolling = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(c,) for c, _ in TEXTS]), disable_tqdm=True)
    for (context, _), score in zip(TEXTS, rolling):
        expect(f"{context[:18]!r}, rolling", score, total([lm.prefix_token_id] + ids(context)))
    until = [(context, {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0}) for context, _ in TEXTS]
    for (context, _), text in zip(TEXTS, lm.generate_until(instances("generate_until", until), disable_tqdm=True)):
        body = {"model": name, "prompt": ids(context), "max_tokens": 12, "temperature": 0, "stop": ["\n\n"]}
        expect(f"{context[:18]!r}, text", text, requests.post(url, json=body, timeout=60).json()["choices"][0]["text"])
    print(f"{failures} failed" if failures else "all as expected")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""How long the second turn of a chat waits for its first token, beside the first turn.

    python3 bench/second_turn.py http://127.0.0.1:8080/v1 [--history 2000] [--rounds 5]

Each round is a chat of its own: a long first question (about HISTORY tokens, another text each time), the answer, and a short second
question behind both. Prints one JSON line per round (milliseconds to the first piece of text, tokens of both prompts, and how many
of them the server had kept) and one with the medians. Needs Python 3.9 and nothing else.
"""

import argparse
import json
import random
import statistics
import time
import urllib.request

WORDS = """river stone lamp garden music winter letter bridge engine cloud market silver forest window harbour paper
mountain candle village mirror ocean bread clock feather island kettle ladder needle orchard pencil""".split()


def ask(url, messages, max_tokens):
    """Seconds to the first text, the whole answer, and the usage."""
    body = {
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        url + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began = time.perf_counter()
    first, text, usage = None, "", None
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            line = line.decode().strip()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            piece = "".join((choice.get("delta") or {}).get("content") or "" for choice in event["choices"])
            if piece and first is None:
                first = time.perf_counter() - began
            text += piece
    if first is None:
        raise SystemExit("error: the server gave no text")
    return first, text, usage


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--history", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    # One that does not count: it touches the weights.
    ask(args.url, [{"role": "user", "content": "Say hello."}], 4)
    rounds = []
    for number in range(args.rounds):
        rng = random.Random(number)
        # A word is one to two tokens.
        story = " ".join(rng.choice(WORDS) for _ in range(int(args.history / 1.1)))
        chat = [{"role": "user", "content": f"Chat {number}. Which words of this list are things to eat? {story}"}]
        first, text, usage = ask(args.url, chat, 24)
        chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "And which of them are buildings?"}]
        second, _, again = ask(args.url, chat, 24)
        row = {
            "first_ms": round(first * 1e3, 1),
            "second_ms": round(second * 1e3, 1),
            "first_prompt": usage["prompt_tokens"],
            "second_prompt": again["prompt_tokens"],
            "kept": (again.get("prompt_tokens_details") or {}).get("cached_tokens"),
        }
        rounds.append(row)
        print(json.dumps(row), flush=True)
    first = statistics.median(row["first_ms"] for row in rounds)
    second = statistics.median(row["second_ms"] for row in rounds)
    print(json.dumps({"first_ms": first, "second_ms": second, "second_over_first": round(second / first, 4)}))


if __name__ == "__main__":
    main()

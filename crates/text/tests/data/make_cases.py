#!/usr/bin/env python3
"""Makes the expected values of this folder.

    python3 make_cases.py TOKENIZER.json GREEDY.jsonl PROMPTS.jsonl

`smollm2_cases.jsonl`: ids and texts that the `tokenizers` package (0.23.3) gives for the tokenizer of
SmolLM2-135M-Instruct, plus the prompts and ids of a llama.cpp run. `render_cases.jsonl`: what Jinja2 (3.1) gives for the
templates in ../templates, set up as the transformers library sets it up. Needs those two packages.
"""

import datetime
import json
import pathlib
import random
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from tokenizers import Tokenizer

HERE = pathlib.Path(__file__).parent
NOW = 1732406400  # 2024-11-24T00:00:00Z

TEXTS = [
    "", "Hello, world!", " leading space", "trailing space ", "tabs\tand\nnewlines\r\n\r\n end", "I'll we've they'RE don't",
    "2024 costs $1,234.56 or 007", "naïve café — “quotes” …", "日本語のテキストと中文混排", "Привет, мир! 123",
    "مرحبا بالعالم", "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji", "x\u0301 combining e\u0301", "def f(x):\n    return x**2  # comment\n\n\n",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|><|im_end|><|endoftext|>",
    "text<|im_end|>more <|im_start|> less", "<|im_ end|> <im_start>", "a" * 60, "   \n  \n\t\t x", "½ ² Ⅷ ௧",
    "\u200b\ufeff\u00a0nbsp\u2028line", "https://example.com/a?b=c&d=%20", '{"key": [1, 2, {"x": null}]}',
    "SELECT * FROM t WHERE a='b';", "ABCdefGHI camelCase snake_case", "한국어 문장입니다.", "ไทยภาษา",
    "\u0000\u0001\u007f control", "<repo_name>x<file_sep>y<jupyter_start>",
]  # fmt: skip


def tokenizer_cases(tokenizer, greedy, prompts):
    texts = list(TEXTS)
    texts += [json.loads(line)["conversations"][0]["content"] for line in prompts[:60]]
    rng = random.Random(3)
    ranges = [(32, 127), (32, 127), (0xA0, 0x600), (0x3000, 0x9FFF), (0x1F300, 0x1F6FF), (10, 11), (32, 33)]
    for _ in range(60):
        texts.append("".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 30))))
    for text in texts:
        yield {"text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids}
    for row in map(json.loads, greedy):
        if row["weights"] == "f32_dequant":
            yield {"user": row["user"], "text": row["prompt_formatted"], "ids": row["prompt_token_ids"]}
    for _ in range(20):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(1, 20))]
        yield {
            "decode": ids,
            "text": tokenizer.decode(ids, skip_special_tokens=True),
            "text_with_special": tokenizer.decode(ids, skip_special_tokens=False),
        }


class Generation(jinja2.ext.Extension):
    """`{% generation %}` as a block that is always on."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


PLAIN = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "  And 3+3? \n"},
    {"role": "assistant", "content": "6\n"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}] + PLAIN
THINKING = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because.", "reasoning_content": "Hm.\nLet me see."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "<think>\nSure?\n</think>\n\nYes."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Ädds <two> numbers", "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}}}]
CALLS = [
    {"role": "user", "content": "Add 1 and 2."},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2.0}}}]},
    {"role": "tool", "content": "3", "name": "add"},
    {"role": "assistant", "content": "3."},
]


EXTRAS = {
    "llama3": [{"now": NOW}],
    "qwen25_tools": [{"tools": TOOLS}],
    "qwen3_thinking": [{"kwargs": {"enable_thinking": False}}],
}


def render_cases():
    names = ["chatml", "llama3", "qwen25_tools", "qwen3_thinking", "gemma", "zephyr", "generation_tags", "python_isms"]
    for name in names:
        source = (HERE.parent / "templates" / f"{name}.jinja").read_text()
        template = environment().from_string(source)
        for messages in [PLAIN[:1], PLAIN, SYSTEM, PLAIN[:3], THINKING, CALLS]:
            for prompt in [False, True]:
                for extra in [{}, *EXTRAS.get(name, [])]:
                    variables = dict(extra.get("kwargs", {}))
                    variables["tools"] = extra.get("tools")
                    if "now" in extra:
                        moment = datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc)
                        variables["strftime_now"] = moment.strftime
                    case = {"template": name, "messages": messages, "add_generation_prompt": prompt, **extra}
                    try:
                        case["text"] = template.render(
                            messages=messages, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>", **variables
                        )
                    except jinja2.TemplateError as error:
                        case["raised"] = str(error)
                    yield case


def write(name, rows):
    text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    (HERE / name).write_text(text, encoding="utf-8")


def main():
    lines = [pathlib.Path(path).read_text(encoding="utf-8").split("\n")[:-1] for path in sys.argv[2:]]
    write("smollm2_cases.jsonl", tokenizer_cases(Tokenizer.from_file(sys.argv[1]), *lines))
    write("render_cases.jsonl", render_cases())


if __name__ == "__main__":
    main()

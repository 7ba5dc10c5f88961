"""Asks a running `draftsmith serve` through the official Python client, the way users do.

Usage: openai_client.py URL [KEY]

URL is the server's (`http://127.0.0.1:8080`), KEY one of its API keys if it has any. Needs the package `openai`. Prints a
line for each check and ends with 1 at the first that fails. Answers are not judged, only their form and what must be equal;
so any instruct model will do.
"""

import json
import sys

import openai

if len(sys.argv) not in (2, 3):
    sys.exit(__doc__)
url = sys.argv[1].rstrip("/") + "/v1"
key = sys.argv[2] if len(sys.argv) == 3 else None
client = openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=120)
QUESTION = [{"role": "user", "content": "Calculate 22 + 20."}]


def check(name, holds, found=None):
    if not holds:
        print(f"FAILED {name}: {found!r}")
        sys.exit(1)
    print(f"ok {name}")


def refused(name, kind, ask, param=None):
    """`ask` must fail with this error of the client's."""
    try:
        found = ask()
    except kind as error:
        body = error.body or {}
        check(name, bool(body.get("message")) and (param is None or body.get("param") == param), body)
    except openai.OpenAIError as error:
        check(name, False, error)
    else:
        check(name, False, found)


def chat(**options):
    return client.chat.completions.create(**{"model": model, "messages": QUESTION, "max_tokens": 24, **options})


def text(**options):
    return chat(**options).choices[0].message.content


models = client.models.list().data
check("the list of models has one", len(models) == 1 and models[0].object == "model", models)
model = models[0].id
check("a model is found by its name", client.models.retrieve(model).id == model)

answer = chat(temperature=0)
choice = answer.choices[0]
check("an answer has text", bool(choice.message.content) and choice.message.role == "assistant", answer)
check("an answer says why it ended", choice.finish_reason in ("stop", "length"), choice.finish_reason)
check("an answer names model and kind", answer.model == model and answer.object == "chat.completion", answer)
used = answer.usage
check(
    "usage adds up",
    used.prompt_tokens > 0
    and 0 < used.completion_tokens <= 24
    and used.total_tokens == used.prompt_tokens + used.completion_tokens,
    used,
)

parts = list(chat(temperature=0, stream=True, stream_options={"include_usage": True}))
streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
check("a streamed answer has the same text", streamed == choice.message.content, streamed)
reasons = [part.choices[0].finish_reason for part in parts if part.choices]
check("only the last part says why it ended", reasons[-1] == choice.finish_reason and not any(reasons[:-1]), reasons)
check("a stream ends with its usage", parts[-1].usage == used and not parts[-1].choices, parts[-1])
check("all parts have one id", len({part.id for part in parts}) == 1)

seeded = text(temperature=1.0, seed=7)
check("one seed gives one text", text(temperature=1.0, seed=7) == seeded)
others = {text(temperature=1.0, seed=seed) for seed in range(8)}
check("other seeds give other texts", len(others) > 1, others)
plain = text(temperature=1.0, seed=7, extra_body={"draftsmith": {"draft": "none"}})
check("a seed gives the same text without a draft", plain == seeded, plain)
penalised = text(temperature=0, frequency_penalty=2.0, presence_penalty=2.0)
check("penalties are taken", isinstance(penalised, str))

full = choice.message.content
stop = full[2:4]
stopped = chat(temperature=0, stop=[stop]).choices[0]
check(
    "a stop text ends the answer before it",
    stopped.message.content == full[: full.index(stop)] and stopped.finish_reason == "stop",
    stopped,
)
short = chat(temperature=0, max_completion_tokens=1, max_tokens=openai.omit)
check("the limit of tokens holds", short.usage.completion_tokens == 1 and short.choices[0].finish_reason == "length")

several = chat(temperature=1.0, seed=7, n=3).choices
check("n answers come in order", [choice.index for choice in several] == [0, 1, 2], several)
check("the first of n is the answer of that seed", several[0].message.content == seeded, several[0])
streams = [""] * 2
for part in chat(temperature=1.0, seed=7, n=2, stream=True):
    for piece in part.choices:
        streams[piece.index] += piece.delta.content or ""
check("n streamed answers are the same", streams == [c.message.content for c in several[:2]], streams)

tokens = chat(temperature=0, logprobs=True, top_logprobs=3)
content = tokens.choices[0].logprobs.content
check("each token has a log-probability", len(content) == tokens.usage.completion_tokens, len(content))
check("and the most probable ones beside it", all(len(token.top_logprobs) == 3 for token in content))
best = all(abs(token.logprob - token.top_logprobs[0].logprob) < 1e-6 for token in content)
check("a greedy token is the most probable one", best and all(token.logprob <= 0 for token in content))
check("asking for log-probabilities changes no text", tokens.choices[0].message.content == full)
spelt = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
check("the tokens spell the text", spelt == full, spelt)

schema = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
    },
    "required": ["colour", "size", "tags"],
    "additionalProperties": False,
}
form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
for seed in range(3):
    found = chat(temperature=1.0, seed=seed, max_tokens=200, response_format=form).choices[0]
    value = json.loads(found.message.content)
    check(
        f"an answer follows its schema, seed {seed}",
        list(value) == ["colour", "size", "tags"]
        and value["colour"] in ("red", "green")
        and type(value["size"]) is int
        and 1 <= value["size"] <= 99
        and len(value["tags"]) <= 2
        and all(isinstance(tag, str) and len(tag) <= 8 for tag in value["tags"])
        and found.finish_reason == "stop",
        found,
    )
guided = text(temperature=1.0, seed=0, max_tokens=200, response_format=form)
plain = text(
    temperature=1.0, seed=0, max_tokens=200, response_format=form, extra_body={"draftsmith": {"draft": "none"}}
)
check("a schema gives the same text without a draft", plain == guided, (plain, guided))
check("any object can be asked for", text(max_tokens=8, response_format={"type": "json_object"}).lstrip()[0] == "{")

completion = client.completions.create(model=model, prompt="Once", max_tokens=8, temperature=0, logprobs=2)
check("a text is continued", completion.object == "text_completion" and completion.choices[0].text != "", completion)
check("with log-probabilities", len(completion.choices[0].logprobs.tokens) == completion.usage.completion_tokens)
two = client.completions.create(model=model, prompt=["Once", "Twice"], max_tokens=4, temperature=0).choices
check("two prompts get two answers", [choice.index for choice in two] == [0, 1], two)

if key:
    stranger = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
    refused("a wrong key is refused", openai.AuthenticationError, stranger.models.list)
refused("an unknown model is refused", openai.NotFoundError, lambda: chat(model="none-such"), "model")
bad = openai.BadRequestError
refused("an empty conversation is refused", bad, lambda: chat(messages=[]), "messages")
refused("a role that is none is refused", bad, lambda: chat(messages=[{"role": 3, "content": "a"}]))
refused("a temperature out of range is refused", bad, lambda: chat(temperature=9), "temperature")
refused("a limit that is no number is refused", bad, lambda: chat(max_tokens="many"), "max_tokens")
refused("a prompt beyond the context is refused", bad, lambda: chat(max_tokens=10**9), "max_tokens")
wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {"a": {"type": "strnig"}}}}}
place = "response_format.json_schema.schema.properties.a"
refused("a wrong schema is refused with its place", bad, lambda: chat(response_format=wrong), place)
refused("tools are refused, not ignored", bad, lambda: chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools")
check("the server still answers", text(temperature=0) == full)

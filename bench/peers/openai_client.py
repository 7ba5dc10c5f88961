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
counts = lambda usage: (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
check("a stream ends with its usage", counts(parts[-1].usage) == counts(used) and not parts[-1].choices, parts[-1])
cached = parts[-1].usage.prompt_tokens_details.cached_tokens
check("usage says what was in the cache", 0 <= cached < used.prompt_tokens, parts[-1])
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
refused("embeddings are refused by name", bad, lambda: client.embeddings.create(model=model, input="a"))


def takes_tools():
    try:
        chat(max_tokens=1, tools=[TOOL])
        return True
    except bad as error:
        check("a template that knows no tools says so", error.body["param"] == "tools" and "template" in error.body["message"])
        return False


PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "Weather of the next days.", "parameters": PARAMETERS, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
OTHER = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
WEATHER = [{"role": "user", "content": "How will the weather be in Paris in the next 3 days?"}]


def follows(arguments):
    value = json.loads(arguments)
    return value.get("city") in ("Paris", "Oslo") and 1 <= value.get("days") <= 9 and len(value) == 2


def tool_examples():
    ask = {"messages": WEATHER, "tools": [TOOL], "max_tokens": 400, "temperature": 0, "tool_choice": "required",
           "parallel_tool_calls": False}
    whole = chat(**ask)
    choice = whole.choices[0]
    calls = choice.message.tool_calls
    check("a call that is required is made", choice.finish_reason == "tool_calls" and calls and calls[0].type == "function", choice)
    check("its arguments follow the schema", all(follows(call.function.arguments) for call in calls), calls)
    check("and it has no text", choice.message.content is None, choice)
    plain = chat(**ask, extra_body={"draftsmith": {"draft": "none"}}).choices[0].message.tool_calls
    same = lambda a, b: [c.function for c in a] == [c.function for c in b]
    check("the call is the same without a draft", same(plain, calls), plain)

    made, reasons, usage = {}, [], None
    for part in chat(**ask, stream=True, stream_options={"include_usage": True}):
        usage = part.usage or usage
        for piece in part.choices:
            reasons.append(piece.finish_reason)
            for delta in piece.delta.tool_calls or []:
                if delta.id:
                    first = delta.type == "function" and delta.function.arguments == ""
                    check("the first part of a call names it", first and delta.index not in made, delta)
                    made[delta.index] = [delta.function.name, ""]
                else:
                    check("the others have arguments alone", delta.function.name is None and delta.type is None, delta)
                    made[delta.index][1] += delta.function.arguments
    streamed = [made[index] for index in sorted(made)]
    check("a streamed call is the same", streamed == [[c.function.name, c.function.arguments] for c in calls], streamed)
    check("and ends for the same reason", reasons[-1] == "tool_calls" and not any(reasons[:-1]), reasons)
    check("with the same usage", usage.completion_tokens == whole.usage.completion_tokens, usage)

    with client.chat.completions.stream(model=model, **ask) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    check("the client's own reader tells of arguments", "tool_calls.function.arguments.delta" in kinds, kinds)
    parsed = final.message.tool_calls[0].function.parsed_arguments
    check("and parses them", parsed == json.loads(calls[0].function.arguments), parsed)

    named = {"type": "function", "function": {"name": "get_weather"}}
    two = chat(messages=WEATHER, tools=[OTHER, TOOL], tool_choice=named, max_tokens=400, seed=3, n=2).choices
    each = [choice.message.tool_calls for choice in two]
    one = all(len(calls) == 1 and calls[0].function.name == "get_weather" for calls in each)
    check("a named function is called once in each answer", one and all(follows(c[0].function.arguments) for c in each), two)
    single = {**ask, "tools": [TOOL, OTHER], "temperature": 1.0}
    check("parallel calls can be left out", all(len(chat(**single, seed=s).choices[0].message.tool_calls) == 1 for s in range(3)))
    none = chat(messages=WEATHER, tools=[TOOL], tool_choice="none", temperature=0).choices[0]
    check("with `none` the answer is text", isinstance(none.message.content, str) and not none.message.tool_calls, none)

    history = WEATHER + [choice.message, {"role": "tool", "tool_call_id": calls[0].id, "content": '{"rain": true}'}]
    told = chat(messages=history, tools=[TOOL], temperature=0)
    check("the output of a tool is read", told.usage.prompt_tokens > whole.usage.prompt_tokens, told)
    wrong = {"type": "function", "function": {"name": "none_such"}}
    refused("a function that is not there is refused", bad, lambda: chat(**{**ask, "tool_choice": wrong}), "tool_choice")
    refused("a tool that is no function is refused", bad, lambda: chat(tools=[{"type": "custom"}]), "tools[0].type")

    flat = {"type": "function", **FUNCTION}
    ask = {"model": model, "input": "How will the weather be in Paris?", "tools": [flat], "tool_choice": "required",
           "parallel_tool_calls": False, "max_output_tokens": 400, "temperature": 0}
    response = client.responses.create(**ask)
    made = [item for item in response.output if item.type == "function_call"]
    check("a response has calls", response.status == "completed" and made and all(follows(c.arguments) for c in made), response)
    plain = client.responses.create(**ask, extra_body={"draftsmith": {"draft": "none"}})
    check("the same without a draft", [i.arguments for i in plain.output] == [i.arguments for i in response.output], plain)
    with client.responses.stream(**ask) as stream:
        events = list(stream)
        final = stream.get_final_response()
    numbers = [event.sequence_number for event in events]
    check("events are counted", numbers == list(range(len(events))), numbers)
    check("a streamed response is the same", [i.arguments for i in final.output] == [i.arguments for i in response.output], final)
    kinds = [event.type for event in events]
    order = ["response.created", "response.in_progress", "response.output_item.added", "response.function_call_arguments.delta"]
    check("events come in order", kinds[:4] == order and kinds[-1] == "response.completed", kinds)
    items = [{"role": "user", "content": "How will the weather be?"}, *response.output,
             {"type": "function_call_output", "call_id": made[0].call_id, "output": "Rain."}]
    told = client.responses.create(model=model, input=items, tools=[flat], max_output_tokens=16, temperature=0)
    check("the output of a tool is an item", told.output[0].type in ("message", "function_call"), told)
    hosted = lambda: client.responses.create(model=model, input="a", tools=[{"type": "web_search"}])
    refused("tools of OpenAI's own are refused by name", bad, hosted, "tools[0].type")


def response_examples():
    ask = {"model": model, "instructions": "Be short.", "input": "Calculate 22 + 20.", "max_output_tokens": 24, "temperature": 0}
    response = client.responses.create(**ask, metadata={"a": "b"}, store=False)
    check("a response has text", bool(response.output_text) and response.object == "response", response)
    check("and says why it ended", response.status in ("completed", "incomplete"), response.status)
    used = response.usage
    check("its usage adds up", used.total_tokens == used.input_tokens + used.output_tokens and used.output_tokens <= 24, used)
    check("what was asked stands in it", response.instructions == "Be short." and response.metadata == {"a": "b"}, response)
    messages = [{"role": "system", "content": "Be short."}, *QUESTION]
    check("it is the answer of a chat", response.output_text == text(messages=messages, temperature=0), response.output_text)
    events = list(client.responses.create(**ask, stream=True))
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    check("a streamed response has the same text", said == response.output_text, said)
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    expected = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
                "response.output_text.done", "response.content_part.done", "response.output_item.done", f"response.{response.status}"]
    check("its events are OpenAI's", kinds == expected, kinds)
    check("they are counted", [event.sequence_number for event in events] == list(range(len(events))))
    last = events[-1].response
    check("the last one has it whole", last.output_text == said and last.usage.output_tokens == used.output_tokens, last)
    form = {"format": {"type": "json_schema", "name": "thing", "schema": schema, "strict": True}}
    found = client.responses.create(model=model, input="A thing.", text=form, max_output_tokens=200, temperature=1.0, extra_body={"seed": 0})
    check("a response follows its schema", list(json.loads(found.output_text)) == ["colour", "size", "tags"], found)
    earlier = lambda: client.responses.create(model=model, input="a", previous_response_id=response.id)
    refused("an earlier response is refused by name", bad, earlier, "previous_response_id")


response_examples()
if takes_tools():
    tool_examples()
check("the server still answers", text(temperature=0) == full)

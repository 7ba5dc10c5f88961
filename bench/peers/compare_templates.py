#!/usr/bin/env python3
"""Compares how draftsmith renders chat templates with what transformers renders.

    python3 compare_templates.py --draftsmith target/release/draftsmith PATH...

A PATH is a model folder (with tokenizer.json: token ids are compared), a GGUF file (its template, with its own special
tokens: text is compared), a Jinja file, or a folder of Jinja files. Conversations are generated; besides, some
thousand generated expressions are rendered here by transformers' Jinja2 environment and there by draftsmith's engine.

Needs `pip install transformers jinja2 gguf`. Exit code 1 if anything differs that EXPLAINED does not name.
"""
import argparse
import datetime
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils as ctu

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "fixtures" / "tiny-target"

# What draftsmith refuses though Jinja2 renders it: pattern of its error, and why.
EXPLAINED = [
    (r"cannot be printed: Python writes its address", "addresses in memory differ from run to run"),
    (r"other text each time|another value each time", "random on purpose"),
    (r"beyond 128 bits|beyond 2\*\*53|so large a number", "arbitrary precision"),
    (r"complex numbers", "complex numbers"),
    (r"is not supported", "refused by name, see docs/TEMPLATES.md"),
    (r"are not supported", "refused by name, see docs/TEMPLATES.md"),
]


class FixedDatetime(datetime.datetime):
    """The date that draftsmith uses where none is given."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


ctu.datetime = FixedDatetime


def tool(name, parameters, required=()):
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}, quickly & \"well\".",
            "parameters": {"type": "object", "properties": parameters, "required": list(required)},
        },
    }


TOOLS = [
    tool("weigh", {"thing": {"type": "string", "description": "What to weigh"},
                   "unit": {"type": "string", "enum": ["g", "kg"]}}, ["thing"]),
    tool("plan", {"steps": {"type": "array", "items": {"type": "object", "properties": {
        "n": {"type": "integer"}, "ratio": {"type": "number", "default": 0.5}}}},
        "strict": {"type": "boolean"}, "when": {"type": ["string", "null"]}}),
    tool("nothing", {}),
]


def call(name, arguments, ident):
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}


def conversations():
    """Rows: messages, tools, kwargs, generation prompt."""
    user = lambda text: {"role": "user", "content": text}
    assistant = lambda text, **more: {"role": "assistant", "content": text, **more}
    system = lambda text: {"role": "system", "content": text}
    reply = lambda text, ident="abcdefghi": {"role": "tool", "content": text, "tool_call_id": ident}
    weigh = call("weigh", {"thing": "a pear", "unit": "g"}, "abcdefghi")
    plan = call("plan", {"steps": [{"n": 1, "ratio": 1e-05}, {"n": -2, "ratio": 3.0}], "strict": True, "when": None},
                "jklmnopqr")
    short = [
        [user("hi")],
        [system("Be brief."), user("hi")],
        [user("hi"), assistant("hello")],
        [system("Be brief.\n"), user(" a \n"), assistant(" b "), user("c\n\n")],
        [user("größer? 漢字 🙂 e\u0301"), assistant("ja\u00a0\u2028ok"), user("\tweiter")],
        [user(""), assistant(""), user("x")],
        [user("1 < 2 & 'q' \"d\" {{ x }} {% y %}"), assistant("<b>&amp;</b>"), user("z")],
        [user("a"), assistant("<think>\nwhy\n</think>\n\nso"), user("b")],
        [user("a"), assistant("<think>why</think>so"), user("b"), assistant("<think>\n\n</think>\n\nc")],
        [user("a"), assistant("so", reasoning_content="because\nof that"), user("b")],
        [user("a"), assistant("so", reasoning_content="r1"), user("b"), assistant("then", reasoning_content=" r2\n")],
        [user("a")] + [m for i in range(4) for m in (assistant(f"n{i}"), user(f"m{i}"))],
        [system("s"), user("a"), user("b")],
        [assistant("first"), user("b")],
        [system("only")],
    ]
    with_tools = [
        [user("weigh it")],
        [system("Use tools."), user("weigh it")],
        [user("weigh it"), assistant("", tool_calls=[weigh]), reply("150"), assistant("It weighs 150 g.")],
        [user("both"), assistant("On it.", tool_calls=[weigh, plan]), reply("150"), reply('{"ok": true}', "jklmnopqr")],
        [system("s"), user("both"), assistant("", reasoning_content="need two", tool_calls=[weigh, plan]),
         reply("150"), reply("done", "jklmnopqr"), assistant("Fine."), user("again")],
        [user("n"), assistant("", tool_calls=[call("nothing", {}, "stuvwxyza")]), reply("", "stuvwxyza")],
        [user("n"), assistant("", tool_calls=[call("weigh", {"thing": "größe \"q\" <\n>", "list": [1, [2, {}]]},
                                                   "stuvwxyza")]), reply("[1, 2]", "stuvwxyza")],
        [user("s"), assistant("", tool_calls=[call("weigh", '{"thing":  "a","n":1e-05}', "stuvwxyza")]),
         reply("x", "stuvwxyza")],
    ]
    kwargs = [{}, {"enable_thinking": False}, {"enable_thinking": True, "thinking": True}]
    more = [{"date_string": "01 Jan 2025"}, {"reasoning_effort": "high", "model_identity": "I am none."},
            {"builtin_tools": ["browser", "python"]}, {"documents": [{"title": "T", "text": "t"},
                                                                    {"doc_id": 2, "title": "U", "text": "ü"}]},
            {"controls": {"length": "short"}}, {"add_vision_id": True}, {"bos_token": "<override>"}]
    for messages in short:
        for prompt in (False, True):
            for extra in kwargs:
                yield {"messages": messages, "add_generation_prompt": prompt, "chat_template_kwargs": extra}
    for messages in short[1:4]:
        for extra in more:
            yield {"messages": messages, "add_generation_prompt": True, "chat_template_kwargs": extra}
    for messages in with_tools:
        for tools in (TOOLS, TOOLS[:1], None, []):
            for prompt in (False, True):
                for extra in kwargs[:2]:
                    row = {"messages": messages, "add_generation_prompt": prompt, "chat_template_kwargs": extra}
                    if tools is not None:
                        row["tools"] = tools
                    yield row


def draftsmith(program, rows, target, template=None):
    """What draftsmith makes of rows: one object per row, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [program, "data", "render", str(path), "--json", "--target", str(target)]
        if template is not None:
            command += ["--template", str(template)]
        done = subprocess.run(command, capture_output=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}:\n{done.stderr.decode()}")
        # One object per line; other characters that end lines for Python may stand inside.
        return [json.loads(line) for line in done.stdout.decode().split("\n") if line]


def with_objects(row):
    """The same row with arguments of tool calls as objects: what draftsmith gives a template first."""
    row = json.loads(json.dumps(row))
    for message in row["messages"]:
        for one in message.get("tool_calls", []):
            if isinstance(one["function"]["arguments"], str):
                one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    return row


def reference(render, row):
    try:
        return render(row), None
    except Exception as error:  # whatever a template does
        return None, f"{type(error).__name__}: {error}"


def by_text(source, special):
    def render(row):
        if not row["messages"]:
            raise ValueError("no messages")
        kwargs = {**special, **row.get("chat_template_kwargs", {})}
        rows = ctu._normalize_chat_messages(row["messages"])
        return ctu.render_jinja_template([rows], tools=row.get("tools"), chat_template=source,
                                         add_generation_prompt=row["add_generation_prompt"], **kwargs)[0][0]
    return render


def by_tokenizer(tokenizer):
    def render(row):
        return tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), tokenize=False,
            add_generation_prompt=row["add_generation_prompt"], **row.get("chat_template_kwargs", {}))
    return render


class Counts:
    def __init__(self):
        self.equal = self.refused = self.explained = self.different = 0

    def add(self, name, what, expected, error, got, ids=None):
        text, ours = got.get("text"), got.get("error")
        if error is None and text == expected and (ids is None or ids == got["ids"]):
            self.equal += 1
        elif error is not None and ours is not None:
            self.refused += 1
        elif error is None and ours is not None and " at 0x" in expected:
            self.explained += 1
        elif error is None and ours is not None and any(re.search(p, ours) for p, _ in EXPLAINED):
            self.explained += 1
        else:
            self.different += 1
            print(f"DIFFERENT {name}: {what}\n  transformers {expected if error is None else error!r:.3000}"
                  f"\n  draftsmith   {text if ours is None else ours!r:.3000}")

    def line(self, name):
        return (f"{name}: {self.equal} equal, {self.refused} refused by both, {self.explained} refused here alone "
                f"(explained), {self.different} different")


def gguf_template(path):
    """Templates and special tokens of a GGUF file."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    if "tokenizer.chat_template" not in fields:
        return None, {}
    tokens = fields["tokenizer.ggml.tokens"]
    special = {}
    for role, key in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]:
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            ident = int(field.parts[field.data[0]][0])
            special[role] = bytes(tokens.parts[tokens.data[ident]]).decode()
    return fields["tokenizer.chat_template"].contents(), special


def compare_templates(program, paths, out):
    rows = list(conversations())
    totals = Counts()
    for path in paths:
        jobs = []
        if path.is_dir() and (path / "tokenizer.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(path)
            jobs.append((str(path), by_tokenizer(tokenizer), path, None, tokenizer))
        elif path.is_dir():
            special = AutoTokenizer.from_pretrained(TINY).special_tokens_map
            for file in sorted(path.glob("*.jinja")):
                jobs.append((str(file), by_text(file.read_text(), special), TINY, file, None))
        elif path.suffix == ".gguf":
            source, special = gguf_template(path)
            if source is None:
                print(f"{path}: no template")
                continue
            jobs.append((str(path), by_text(source, special), path, None, None))
        else:
            special = AutoTokenizer.from_pretrained(TINY).special_tokens_map
            jobs.append((str(path), by_text(path.read_text(), special), TINY, path, None))
        for name, render, target, template, tokenizer in jobs:
            counts = Counts()
            for row, got in zip(rows, draftsmith(program, rows, target, template), strict=True):
                expected, error = reference(render, row)
                if (objects := with_objects(row)) != row:
                    # Objects first, strings where the template fails with them or prints them as Python would.
                    other, other_error = reference(render, objects)
                    if other_error is None and "{'" not in other:
                        expected, error = other, other_error
                ids = None
                if tokenizer is not None and error is None:
                    ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
                counts.add(name, json.dumps(row, ensure_ascii=False)[:600], expected, error, got, ids)
            for key in ("equal", "refused", "explained", "different"):
                setattr(totals, key, getattr(totals, key) + getattr(counts, key))
            out.append(counts.line(name))
    out.append(totals.line("all conversations"))
    return totals.different


VARIABLES = {
    "s": "Hello World, foo-bar", "w": "  \tpadded text\n ", "u": "Größe ßŉ ΑΣ İ \u00a0x", "e": "", "q": "it's \"q\" <b>&",
    "lines": "a\nb\r\nc\rd\n", "num": "42", "fl": "4.25", "n": 7, "neg": -7, "z": 0, "f": 2.5, "g": 1e-05, "h": 1e16,
    "big": 12345678901234567890, "l": [3, 1, 2], "ls": ["b", "A", "c", "a"], "mixed": [1, "a", None, True, 2.0, [1]],
    "d": {"b": 1, "a": [1, 2], "items": "x", "C": None}, "users": [
        {"name": "bo", "age": 3, "tag": {"k": "x"}}, {"name": "Al", "age": 1, "tag": {"k": "y"}},
        {"name": "cy", "age": 3, "tag": {}}],
    "no": None, "yes": True, "off": False, "empty": [], "ed": {},
}

OPERANDS = ["s", "e", "n", "neg", "z", "f", "g", "h", "big", "l", "ls", "d", "no", "yes", "off", "empty", "undef",
            "(1, 2)", "'a'", "2", "-3", "0.1", "range(3)", "d.keys()", "users"]
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", "<=", ">", ">=", "in", "not in", "and", "or"]
TESTS = ["defined", "undefined", "none", "boolean", "true", "false", "integer", "float", "number", "string", "mapping",
         "iterable", "sequence", "callable", "escaped", "lower", "upper", "odd", "even", "divisibleby 3", "sameas none",
         "in [1, 2, 'a', none]", "eq 7", "ne 7", "gt 2", "ge 2.5", "lt 3", "le 3", "equalto 'x'", "filter", "test",
         "divisibleby(2)", "not none", "sequence and true"]
FILTERS = [
    "abs", "attr('items')", "attr('upper')", "batch(2)|list", "batch(2, 'x')|list", "capitalize", "center(30)", "count",
    "default('D')", "default('D', true)", "d('D', boolean=true)", "dictsort", "dictsort(reverse=true)",
    "dictsort(by='value')", "dictsort(true)", "escape", "e", "filesizeformat", "filesizeformat(true)", "first", "float",
    "float(1.5)", "forceescape", "format(1)", "indent", "indent(2)", "indent(2, true)", "indent(2, true, true)",
    "indent('> ')", "indent(first=true, width=1)", "int", "int(9)", "int(0, 16)", "items|list", "items", "join",
    "join(', ')", "join('-', attribute='name')", "last", "length", "list", "lower", "map('upper')|list",
    "map(attribute='name')|list", "map(attribute='zz', default='D')|list", "map('string')|join", "max", "min",
    "max(attribute='age')", "pprint", "reject('none')|list", "rejectattr('age', 'eq', 3)|list", "replace('l', 'L')",
    "replace('o', '0', 1)", "replace('', '.')", "reverse|list", "reverse", "round", "round(1)", "round(-1)",
    "round(1, 'floor')", "round(method='ceil')", "safe", "select|list", "select('string')|list", "select('odd')|list",
    "selectattr('age')|list", "selectattr('age', 'gt', 1)|map(attribute='name')|list", "slice(2)|list",
    "slice(2, 'x')|list", "sort", "sort(reverse=true)", "sort(case_sensitive=true)", "sort(attribute='name')",
    "sort(attribute='age,name')", "string", "striptags", "sum", "sum(start=10)", "sum(attribute='age')", "title",
    "tojson", "tojson(indent=2)", "tojson(true)", "tojson(separators=(',', ':'))", "tojson(sort_keys=true)",
    "tojson(ensure_ascii=true, indent='\t')", "trim", "trim('Hd')", "trim(chars=' ')", "truncate(8)",
    "truncate(8, true)", "truncate(8, true, '!')", "truncate(8, leeway=0)", "unique|list", "unique(true)|list",
    "unique(attribute='age')|list", "upper", "urlencode", "wordcount", "xmlattr", "groupby('age')",
    "groupby('name', default='z')", "map('length')|list", "list|length", "split", "nosuch",
]
METHODS = [
    "strip()", "strip('Hd')", "lstrip()", "rstrip()", "rstrip('\\n ')", "upper()", "lower()", "title()", "capitalize()",
    "casefold()", "swapcase()", "split()", "split('o')", "split('o', 1)", "split(maxsplit=1)", "split(none, 1)",
    "split(sep=',', maxsplit=1)", "rsplit()", "rsplit('o', 1)", "rsplit(none, 1)", "rsplit(' ', maxsplit=1)",
    "splitlines()", "splitlines(true)", "startswith('H')", "startswith(('x', 'H'))", "startswith('e', 1)",
    "startswith('ell', 1, 4)", "startswith('', 99)", "endswith('r')", "endswith(('r', 'b'))", "endswith('o', 0, 5)",
    "find('o')", "find('o', 5)", "find('zz')", "rfind('o')", "rfind('o', 0, 6)", "index('o')", "index('zz')",
    "count('o')", "count('')", "count('o', 5)", "replace('o', '0')", "replace('o', '0', 1)", "replace('', '-')",
    "replace('o', '0', -1)", "replace('o', '0', 0)", "join(['a', 'b'])", "join([1])", "join('xyz')", "partition(', ')",
    "rpartition('o')", "partition('zz')", "rpartition('zz')", "removeprefix('Hello')", "removesuffix('bar')",
    "ljust(25, '.')", "rjust(25)", "center(25, '*')", "center(24, '*')", "zfill(30)", "expandtabs(4)", "isdigit()",
    "isalpha()", "isalnum()", "isspace()", "islower()", "isupper()", "istitle()", "isnumeric()", "isdecimal()",
    "isascii()", "isprintable()", "isidentifier()", "format()", "encode()", "nosuch()", "append('x')", "keys()",
    "items()", "get('a')", "values()|list", "pop()", "update({})", "copy()", "get('zz', 'D')", "index(1)", "count(1)",
]

SNIPPETS = r"""
{{ 1 }} {{ 1.0 }} {{ 1e5 }} {{ 1e16 }} {{ 1.5e-7 }} {{ 123456789.125 }} {{ 1e22 }} {{ 1_000 }} {{ 0x1F }} {{ 0b101 }}
{{ 0o17 }} {{ 1.0e300 * 1e10 }} {{ -0.0 }} {{ 5e-324 }} {{ 0.1 + 0.2 }} {{ 100000000000000000000 }} {{ 2 ** 100 }}
{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 // -2 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 7.5 // 2 }} {{ -7.5 % 2 }} {{ 2 ** -1 }}
{{ 2 ** 3 ** 2 }} {{ -2 ** 2 }} {{ 1 / 2 }} {{ 4 / 2 }} {{ 1 + true }} {{ true + true }} {{ 'a' * 3 }} {{ 3 * [1] }}
{{ [1] + [2] }} {{ (1,) + (2,) }} {{ (1,) }} {{ () }} {{ 1, 2 }} {{ [] }} {{ {} }} {{ {'a': 1, 2: none, none: 'x'} }}
{{ {'a': 1, 'a': 2} }} {{ {1: 'a', true: 'b', 1.0: 'c'} }} {{ [true, false, none, 1.0, 'x', "it's", '"', '\n'] }}
{{ true }} {{ none }} {{ True is true }} {{ 1 == true }} {{ 1 == 1.0 }} {{ '1' == 1 }} {{ [1] == [1.0] }}
{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ 1 < 2 == 2 }} {{ 'a' < 'b' }} {{ [1, 2] < [1, 3] }} {{ 'a' < 1 }}
{{ not true }} {{ not '' }} {{ 1 and 2 }} {{ 0 or 'x' }} {{ 1 if false }} {{ 'a' if true else 'b' }} {{ (1 if false) is defined }}
{{ 1 if 0 else 2 if 0 else 3 }} {{ 'a' 'b' "c" }} {{ 'a' ~ 1 ~ none ~ true ~ 1.5 ~ [1, 'x'] }} {{ undef ~ 'x' }}
{{ undef }} {{ undef.foo }} {{ undef['x'] }} {{ undef() }} {{ undef + 1 }} {{ 1 + undef }} {{ undef == undef2 }} {{ undef == none }}
{{ undef is iterable }} {{ undef|length }} {{ undef|list }} {{ undef|join }} {{ undef|upper }} {{ undef|tojson }} {{ undef|int }}
{{ d.zz }} {{ d.zz.y }} {{ d['zz'] }} {{ d.items }} {{ d['items'] }} {{ d.items() }} {{ d.items()|list }} {{ d.keys() }} {{ d.values() }}
{{ d.get('a') }} {{ d.get('zz') }} {{ d.get('zz', 5) }} {{ d|length }} {{ d|list }} {{ d|first }} {{ 'a' in d }} {{ d.b }} {{ d.C }}
{{ d.update({}) }} {{ l.append(1) }} {{ l.pop() }} {{ d.pop('a') }} {{ d.setdefault('q', 1) }} {{ l.sort() }} {{ l.copy() }} {{ d.copy() }}
{{ l[0] }} {{ l[-1] }} {{ l[9] }} {{ l[1:] }} {{ l[::-1] }} {{ l[:-1] }} {{ l[-2:] }} {{ l[::2] }} {{ l[5:1:-1] }} {{ l.0 }} {{ users.0.name }} {{ l[true] }}
{{ s[0] }} {{ s[-1] }} {{ s[1:4] }} {{ s[::-1] }} {{ s[::3] }} {{ s[99] }} {{ s[:100] }} {{ u[2:4] }} {{ u[::-1] }} {{ s['upper']() }} {{ s[-3:-1] }} {{ no[1:] }} {{ l['x'] }} {{ l[1.0] }}
{{ users[0]['name'] }} {{ users[1].tag.k }} {{ users|map(attribute='tag.k')|list }} {{ users[::-1]|map(attribute='name')|join(',') }}
{{ "\x41\u00e9\U0001F600\101\t|\n|\\|\'|\"|\q|\0|" }} {{ '\é' }} {{ 'a\
b' }} {{ "tab	x" }} {{ '{{ x }}' }} {{ "%}" }}
{{ "%s and %r" % ('a', 'b') }} {{ "%d%%" % 5 }} {{ "%05.2f|%-6s|%+d|%x|%e" % (1.5, 'a', 3, 255, 12345.678) }} {{ "%(a)s" % {'a': 1} }} {{ '%s' % [1] }} {{ '%s' % 1 }} {{ "%5d|%-5d|%05d" % (42, 42, -42) }} {{ '%g %g' % (1e10, 0.0001) }} {{ '%s' }} {{ '%s %s' % 'a' }} {{ '%c' % 65 }} {{ '%.3s' % 'abcdef' }} {{ '%#x' % 255 }} {{ '%i' % 3.9 }}
{{ "{} {}".format(1, 'a') }} {{ "{0}{1}{0}".format('x', 'y') }} {{ "{a:>5}|{b:.2f}".format(a='x', b=2) }} {{ "{:,}".format(1234567) }} {{ "{{}}".format() }} {{ '{:08.3f}|{:+d}|{:x}|{:#b}|{:%}'.format(3.14159, 5, 255, 5, 0.25) }} {{ '{0[a]} {1[0]} {2.real}'.format({'a': 1}, [2], 3) }} {{ '{!r}'.format('a') }} {{ '{:^9}|{:*<5}'.format('mid', 'ab') }} {{ '{}'.format() }} {{ '{:d}'.format('a') }} {{ '{:_}'.format(1000000) }} {{ '{:e}'.format(12345.678) }} {{ '{:g}'.format(0.00001) }}
{{ "%s"|format('x') }} {{ "%(a)s"|format(a=1) }} {{ 42.555|round(2) }} {{ 2.5|round }} {{ 3.5|round }} {{ 1234|round(-2) }} {{ 1250.0|round(-2) }} {{ 2.345|round(2, 'ceil') }} {{ 7|round(1, 'floor') }} {{ '3.9'|int }} {{ 'x'|int }} {{ '0x1f'|int(0, 16) }} {{ ' 12 '|int }} {{ '1_0'|int }} {{ '1e3'|int }} {{ '-5'|int }} {{ 'inf'|float }} {{ 'nan'|float }} {{ 'x'|float }} {{ '1e5'|float }} {{ none|int }} {{ [1]|int }} {{ true|int }}
{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}{{ loop.previtem }}{{ loop.nextitem }};{% endfor %}
{% for x in l %}{{ loop.cycle('a', 'b') }}{{ loop.changed(x > 1) }}{% endfor %} {% for x in l if x > 1 %}{{ x }}{{ loop.length }}{{ loop.last }}{% else %}none{% endfor %} {% for x in [] %}x{% else %}empty{% endfor %} {% for x in undef %}x{% else %}u{% endfor %} {% for x in none %}x{% endfor %}
{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %} {% for k, v in d|items %}{{ k }}{% endfor %} {% for k in d %}{{ k }}{% endfor %} {% for c in 'abc' %}{{ c }}.{% endfor %} {% for a, b in [[1, 2], (3, 4)] %}{{ a + b }},{% endfor %} {% for a, b in [1] %}x{% endfor %}
{% for x in l %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% if x == 2 %}{% break %}{% endif %}{% endfor %} {% for x in l %}{% break %}{% else %}E{% endfor %}
{% set x = 1 %}{% for i in l %}{% set x = x + 1 %}{{ x }}{% endfor %}{{ x }} {% set ns = namespace(a=1, b='x') %}{% for i in l %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.zz }} {% set ns = namespace() %}{% if ns.x is undefined %}U{% endif %}{% set ns.x = [1] %}{{ ns }} {% set ns._x = 1 %}
{% if true %}{% set y = 5 %}{% endif %}{{ y }} {% set a, b = 1, 2 %}{{ a }}{{ b }} {% set t = (1, 2) %}{{ t }} {% set t = 1, 2 %}{{ t[1] }} {% set x %} block {% endset %}[{{ x }}] {% set x | upper | trim %} block {% endset %}[{{ x }}] {% set d.x = 1 %}
{% macro m(a, b='B', c=none) %}[{{ a }}|{{ b }}|{{ c }}|{{ varargs }}|{{ kwargs }}]{% endmacro %}{{ m() }}{{ m(1) }}{{ m(1, 2, 3, 4) }}{{ m(1, z=2) }}{{ m(b=1, a=2) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }} {% macro m2(a) %}{{ a }}{% endmacro %}{{ m2(z=1) }} {% macro m3(x) %}{{ x }}{{ caller(x) }}{% endmacro %}{% call(v) m3(5) %}<{{ v }}>{% endcall %} {% macro m4() %}{{ caller() }}{% endmacro %}{{ m4() }}
{% macro f(n) %}{% if n > 0 %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}{{ f(2)|length }}{{ f.name }}{{ f.arguments }}{{ f is callable }} {% macro g(x) %}{% set y = x %}{{ y }}{% endmacro %}{{ g(3) }}{{ y }} {% macro h() %}{{ later }}{% endmacro %}{% set later = 9 %}{{ h() }}
{% filter upper %}abc{{ s }}{% endfilter %} {% filter replace('a', 'b')|upper %}aaa{% endfilter %} {% with %}{% set q1 = 1 %}{{ q1 }}{% endwith %}{{ q1 }} {% with a = 1, b = 2 %}{{ a + b }}{% endwith %} {% set v = 1 %}{% with v = 2, w2 = v %}{{ v }}{{ w2 }}{% endwith %}
{% raw %}{{ x }}{% endraw %} {% raw -%}  {{ y }}  {%- endraw %} {# comment #}x{#- c -#} y  {%- if true -%}  z  {%- endif -%}  . {{- ' a ' -}} . {%+ if true %}p{% endif %}
{% generation %}{{ s }}{% set gg = 1 %}{% endgeneration %}{{ gg }} {% block b %}in{{ s }}{% endblock %} {% print 1, 2 %} {% do 1 %} {% include 'x' %} {% autoescape false %}{{ q }}{% endautoescape %}
{{ range(5)|list }} {{ range(2, 8, 3)|list }} {{ range(5, 0, -2)|list }} {{ range(3) }} {{ range(3)[1] }} {{ range(1, 9)|length }} {{ 2 in range(3) }} {{ range(200000)|list }} {{ range(1.5) }} {{ range(3) == range(0, 3) }}
{{ dict(a=1, b=2) }} {{ dict([('a', 1)], b=2) }} {{ dict({'x': 1}) }} {{ dict.fromkeys('ab', 0) }} {{ dict(1) }} {% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }} {% set j = joiner('|') %}{{ j() }}{{ j() }} {{ joiner }} {{ lipsum() }}
{{ [1, 2]|map('string')|join('+') }} {{ ['a', 'b']|map('upper') }} {{ ([1]|map('string')) is iterable }} {{ ([]|map('string')) and 'truthy' }} {{ [1, 2]|select('odd')|first }} {{ [3, 1]|sort|first }} {{ [1, 2, 3]|reverse|list }} {{ 'abc'|reverse }} {{ [1, 2]|select('odd')|length }} {{ [1]|map('nosuch')|list }}
{{ users|groupby('age') }} {% for g in users|groupby('age') %}{{ g.grouper }}:{{ g.list|length }};{{ g[0] }}{% endfor %} {% for age, us in users|groupby('age') %}{{ age }}{{ us|map(attribute='name')|join }}{% endfor %}
{{ 'a' is in ['a'] }} {{ 1 is in [1] }} {{ 'x' is not in 'xyz' }} {{ 1 is divisibleby 1 }} {{ none is not none }} {{ 3 is odd and 4 is even }} {{ s is string and true }} {{ 5 is number }} {{ true is number }} {{ true is integer }} {{ 1.0 is integer }} {{ d is mapping }} {{ 'a' is sequence }} {{ {} is sequence }} {{ none is iterable }} {{ none is sequence }} {{ range is callable }} {{ s is nosuch }} {{ 1 is is }} {{ x is y is z }}
{{ raise_exception('bad') }} {{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%d %b %Y %H:%M:%S %A %j %p %y %B %-d') }} {{ strftime_now is defined }} {{ raise_exception is callable }} {{ strftime_now('%%') }}
{{ s|length > 3 and s|upper == 'X' }} {{ (s|length) + 1 }} {{ -1|abs }} {{ -n|abs }} {{ n - -1 }} {{ +n }} {{ -f }} {{ -'a' }} {{ n.real }} {{ f.is_integer() }} {{ n.bit_length() }} {{ none.x }} {{ 5 .x }}
{{ '<b>'|safe ~ '<i>' }} {{ '<b>'|e ~ '<i>' }} {{ ('<b>'|safe) + '<i>' }} {{ '<b>'|e|upper }} {{ '<b>'|e is escaped }} {{ {'class': 'a&b', 'x': none}|xmlattr }} {{ {'a': 1, 'b': 'x y'}|urlencode }} {{ 'a b/c?ü'|urlencode }} {{ '<p>a  <b>b</b></p>'|striptags }}
{{ [1, [2, {'a': (3,)}]]|tojson }} {{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }} {{ {1: 2, none: 3, true: 4, 1.5: 5}|tojson }} {{ 'é\u2028</script>\x7f'|tojson }} {{ 'é\x7f😀'|tojson(ensure_ascii=true) }} {{ [1.0, 1e-7, 1e20, 100000000000000000000.0]|tojson }} {{ (range(3))|tojson }} {{ []|tojson(indent=2) }} {{ {'a': [], 'b': {}}|tojson(indent=2) }} {{ {'a': 1}|tojson(indent=2, separators=(', ', ' = ')) }} {{ d|tojson(indent=none) }} {{ ('inf'|float)|tojson }}
{{ 'Größe ß'|upper }} {{ 'ΑΣ'|lower }} {{ 'ßa'|capitalize }} {{ 'ǆ'|title }} {{ "they're bill's"|title }} {{ "they're bill's".title() }} {{ 'foo-bar (baz)'|title }} {{ 'hello wORLD'|capitalize }} {{ 'İ'.lower()|length }} {{ 'ŉ'.upper() }} {{ '²'.isdigit() }}{{ '²'.isdecimal() }}{{ '½'.isnumeric() }}{{ '٣'.isdigit() }}{{ '٣'|int }} {{ ['\u200b', '\xa0', 'é', '\x00', '\u3000', '😀'] }} {{ 'ß'.casefold() }}
{% for item in [1, [2, [3]]] recursive %}{% if item is iterable %}({{ loop(item) }}){% else %}{{ item }}:{{ loop.depth }}{% endif %}{% endfor %} {% for a in l %}{% for b in l %}{{ loop.index }}{{ loop.depth }}{% endfor %}{% endfor %} {% for x in l %}{{ x }}{% if not loop.last %}, {% endif %}{% endfor %}
{{ ['a', 'B', 'c']|sort }} {{ ['b', 'A']|sort(case_sensitive=true) }} {{ [1, 'a']|sort }} {{ [[2, 1], [1, 2]]|sort }} {{ ['B', 'a', 'b']|unique|list }} {{ [1, 1.0, true]|unique|list }} {{ ['b', 'a']|min }} {{ []|max }} {{ [1, 2]|sum }} {{ ['a']|sum }} {{ [[1], [2]]|sum(start=[]) }} {{ []|first }} {{ []|last }} {{ 'abc'|last }} {{ 'abc'|first }}
{{ messages[0].role }} {{ messages|length }} {{ messages[0]['content'] }} {{ messages[0] }} {{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ messages is string }} {{ messages|tojson }} {{ tools }}
{%- if tools is iterable and tools | length > 0 %}T{% else %}F{% endif %} {% if tools %}x{% elif l %}y{% else %}z{% endif %} {% if undef %}x{% elif undef is not defined %}U{% endif %} {% if (n > 3 and
  l) %}multi{% endif %} {{ 'x' if n > 3 and not off else 'y' }} {{ n if n is defined and n is not none else 'zz' }} {{ loop }} {{ self }} {{ caller }} {{ varargs }}
{{ 1}}{{2 }}{{3}} {{ {'a': {'b': 1}}['a']['b'] }} {{ {'a': {'b': 1}}}} {{ [1, 2,] }} {{ {'a': 1,} }} {{ (1, 2,)|length }} {{ f(*[1]) }} {{ dict(**{'a': 1}) }} {{ range(*[1, 4])|list }} {{ 'a'.join(['x', 'y',]) }}
{{ 1 +}} {{ }} {% if %} {% endif %} {% for x %} {{ 'unterminated }} {% endfor %} {{ 007 }} {{ 1.2.3 }} {{ a b }} {{ (1 }} {{ [1) }} {% set %} {% macro %} {{ x|}} {{ 1 is }} {% unknown %} {{ ! }} {{ a = 1 }} {{ 'a' 1 }}
"""


def expressions():
    """Snippets, each rendered on its own."""
    # Handwritten ones: a line is rendered whole, and each tag without a block by itself.
    lines = SNIPPETS.strip("\n").split("\n")
    joined = []
    for line in lines:
        if joined and (joined[-1].endswith("\\") or joined[-1].count("{%") > joined[-1].count("%}")):
            joined[-1] += "\n" + line
        else:
            joined.append(line)
    for line in joined:
        yield line
        yield line.replace(" {%", "\n  {%") + "\n"
        yield line.replace(" {{", "\r\n{{") + "\r\n\n"
        if "{%" not in line:
            for part in re.findall(r"\{\{.*?\}\}(?=\s|$|\{)", line, flags=re.S):
                yield part
        else:
            for part in re.split(r"(?<=\}) (?=\{)", line):
                yield part
    for a, op, b in itertools.product(OPERANDS, OPERATORS, OPERANDS):
        # A fair part of all pairs; the same each time.
        if (len(a) * 7 + len(b) * 5 + len(op) * 3 + ord(a[0]) + ord(b[0])) % 3 == 0:
            yield "{{ (" + a + ") " + op + " (" + b + ") }}"
    for a, test in itertools.product(OPERANDS + ["'Ab'", "'AB'", "'ab'", "undef|list", "'x'|safe", "range"], TESTS):
        yield "{{ " + a + " is " + test + " }}"
    for a, name in itertools.product(OPERANDS + ["w", "u", "q", "num", "fl", "lines", "mixed", "ed"], FILTERS):
        yield "{{ " + a + "|" + name + " }}"
    for a, name in itertools.product(["s", "w", "u", "e", "q", "lines", "num", "l", "d", "n", "no", "undef"], METHODS):
        yield "{{ " + a + "." + name + " }}"
    for start, stop, step in itertools.product(["", "0", "2", "-2", "99", "-99", "none"], ["", "0", "1", "-1", "99"],
                                               ["", ":", ":2", ":-1", ":-2", ":0"]):
        yield "{{ s[" + start + ":" + stop + step + "] }}|{{ l[" + start + ":" + stop + step + "] }}"
    for value in ["0.1", "1e15", "1e16", "123456789012345680.0", "1e-4", "1e-5", "0.00012345", "1.7976931348623157e308",
                  "2.5", "1e2", "3.0", "1/3", "2/3*1e20", "-1.5e-10", "f*3", "10**20", "10**30", "-(2**70)"]:
        yield "{{ " + value + " }} {{ [" + value + "] }} {{ " + value + " ~ '' }} {{ (" + value + ")|tojson }}"
        yield "{{ (" + value + ")|round(2) }} {{ (" + value + ")|int }} {{ '%.3f' % (" + value + ") }}"
        yield "{{ '{:.2e} {:,.1f}'.format(" + value + ", " + value + ") }}"


def compare_expressions(program, out):
    snippets = list(dict.fromkeys(expressions()))
    rows = [{"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False, "template": snippet,
             "chat_template_kwargs": VARIABLES} for snippet in snippets]
    special = AutoTokenizer.from_pretrained(TINY).special_tokens_map
    counts = Counts()
    for row, got in zip(rows, draftsmith(program, rows, TINY), strict=True):
        expected, error = reference(by_text(row["template"], special), row)
        counts.add("expression", repr(row["template"]), expected, error, got)
    out.append(counts.line(f"{len(snippets)} expressions"))
    return counts.different


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=pathlib.Path, metavar="PATH")
    parser.add_argument("--draftsmith", default=str(ROOT / "target" / "release" / "draftsmith"))
    parser.add_argument("--no-expressions", action="store_true")
    args = parser.parse_args()
    out = []
    different = 0 if args.no_expressions else compare_expressions(args.draftsmith, out)
    different += compare_templates(args.draftsmith, args.paths, out) if args.paths else 0
    print("\n".join(out))
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()

"""Loads a running `draftsmith serve` with clients that behave and clients that do not.

Usage: serve_load.py URL --pid PID [--key KEY] [--clients 64] [--seconds 300] [--max-tokens 64] [--json FILE]

Each client asks one request after the other. Two in three are streamed chats that are read to their end; the others read
slowly, want JSON by a schema, leave in mid-stream, leave in mid-request, send too much, send no JSON, or bring a wrong key.
Held against the server: every accepted request is answered to its `[DONE]` or cut with an error event; what is wrong is
refused with its status; one request and seed has one text, with and without a draft; the process (PID) lives, its memory
does not grow, and nothing is left running. Prints the findings and the measured times; ends with 1 if something does not
hold. Needs Python 3.11 and nothing else.
"""

import argparse
import asyncio
import collections
import json
import random
import socket
import sys
import time
import urllib.parse

QUESTIONS = [
    "Calculate 22 + 20.",
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper and a gull.",
    "List five things to take on a hike.",
    "Explain how a bicycle stays upright.",
    "Write a Python function that reverses a list.",
    "What is the capital of France, and what is it known for?",
    "Summarise in two sentences why people keep gardens.",
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
# Out of a hundred requests.
MIX = {"read": 66, "slow": 8, "schema": 5, "leave": 8, "half": 3, "oversize": 3, "malformed": 4, "key": 3}
MALFORMED = [b"", b"{", b"[1, 2]", b'"text"', b'{"messages": 3}', b"\xff\xfe\x00", b"[" * 100_000, b'{"messages": [{}]}']
# A server that runs beside other work may be slow, but not silent; it sends comments while it has nothing to say.
SILENCE_S = 60.0


class Wrong(Exception):
    """Something that the server must not do."""


class Load:
    def __init__(self, args):
        parts = urllib.parse.urlsplit(args.url)
        self.host, self.port, self.args = parts.hostname, parts.port, args
        self.outcomes = collections.Counter()
        self.wrong = collections.Counter()
        self.texts = {}
        self.ttft, self.token_times, self.gaps = [], [], []
        self.tokens = 0

    async def connect(self, receive_buffer=None):
        plug = socket.socket(socket.AF_INET)
        plug.setblocking(False)
        if receive_buffer:
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(plug, (self.host, self.port))
        return await asyncio.open_connection(sock=plug, limit=1 << 20)

    def head(self, path, length, key):
        lines = [f"POST {path} HTTP/1.1" if length is not None else f"GET {path} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        if key:
            lines.append(f"Authorization: Bearer {key}")
        if length is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        return "\r\n".join(lines + ["Connection: close", "", ""]).encode()

    async def status_of(self, reader):
        line = await asyncio.wait_for(reader.readline(), SILENCE_S)
        if not line:
            raise Wrong("closed without an answer")
        headers = {}
        while (header := (await reader.readline()).strip()):
            name, _, value = header.decode().partition(":")
            headers[name.lower()] = value.strip()
        return int(line.split()[1]), headers

    async def whole(self, path, body=None, key=None):
        """The status and JSON of one request that is not streamed."""
        reader, writer = await self.connect()
        try:
            writer.write(self.head(path, None if body is None else len(body), key) + (body or b""))
            status, _ = await self.status_of(reader)
            text = await asyncio.wait_for(reader.read(), SILENCE_S)
            return status, json.loads(text) if text else None
        finally:
            writer.close()

    async def events(self, reader, headers, pause):
        """The data of server-sent events; `pause` is waited after each piece."""
        chunked = headers.get("transfer-encoding") == "chunked"
        held = b""
        while True:
            if chunked:
                size_line = await asyncio.wait_for(reader.readline(), SILENCE_S)
                if not size_line:
                    raise Wrong("a stream ended without its last chunk")
                size = int(size_line, 16)
                piece = await reader.readexactly(size + 2)
                held += piece[:-2]
                if size == 0:
                    return
            else:
                piece = await asyncio.wait_for(reader.read(1 << 16), SILENCE_S)
                held += piece
                if not piece:
                    return
            while b"\n\n" in held:
                event, held = held.split(b"\n\n", 1)
                if event.startswith(b"data: "):
                    yield event[6:].decode()
            if pause:
                await asyncio.sleep(pause)

    async def chat(self, kind, draws):
        number = draws.randrange(32)
        question, seed = QUESTIONS[number % len(QUESTIONS)], number
        draft = draws.choice(["auto", "auto", "none"])
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.args.max_tokens,
            "temperature": [0.0, 0.7, 1.0][number % 3],
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            "draftsmith": {"draft": draft},
        }
        if kind == "schema":
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        data = json.dumps(body).encode()
        reader, writer = await self.connect(4096 if kind == "slow" else None)
        leave_after = draws.randrange(1, 20) if kind == "leave" else None
        try:
            started = time.monotonic()
            writer.write(self.head("/v1/chat/completions", len(data), self.args.key) + data)
            status, headers = await self.status_of(reader)
            if status == 429:
                await asyncio.sleep(float(headers.get("retry-after", 1)))
                return "429 queue full"
            if status != 200:
                raise Wrong(f"{kind}: status {status}")
            text, times, usage, reason, done = "", [], None, None, False
            async for event in self.events(reader, headers, 0.05 if kind == "slow" else 0):
                if event == "[DONE]":
                    done = True
                    continue
                part = json.loads(event)
                if "error" in part:
                    return f"cut: {part['error']['code']}"
                usage = part.get("usage") or usage
                for choice in part["choices"]:
                    reason = choice["finish_reason"] or reason
                    if piece := choice["delta"].get("content"):
                        text += piece
                        times.append(time.monotonic())
                if leave_after is not None and len(times) >= leave_after:
                    return "left in mid-stream"
            if not done:
                raise Wrong("a stream ended without `[DONE]` and without an error")
            if reason not in ("stop", "length") or usage is None:
                raise Wrong(f"an answer ended with {reason} and usage {usage}")
            known = self.texts.setdefault((number, kind == "schema"), (text, reason))
            if known != (text, reason):
                raise Wrong(f"seed {seed} gave two texts: {known} and {(text, reason)}")
            if kind == "schema" and reason == "stop":
                person = json.loads(text)
                if list(person) != ["name", "age"] or not 0 <= person["age"] <= 120:
                    raise Wrong(f"not by the schema: {text}")
            self.tokens += usage["completion_tokens"]
            if kind == "read" and times:
                self.ttft.append(times[0] - started)
                self.gaps += [b - a for a, b in zip(times, times[1:])]
                if usage["completion_tokens"] > 1:
                    self.token_times.append((times[-1] - times[0]) / (usage["completion_tokens"] - 1))
            return f"answered ({kind})"
        finally:
            writer.close()

    async def misbehave(self, kind, draws):
        path, key = "/v1/chat/completions", self.args.key
        good = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}).encode()
        if kind == "half":
            _, writer = await self.connect()
            writer.write(self.head(path, len(good), key) + good[: draws.randrange(len(good))])
            await writer.drain()
            await asyncio.sleep(draws.random())
            writer.close()
            return "left in mid-request"
        body, wanted = {
            "oversize": lambda: (b'{"x": "' + b"x" * self.args.oversize_bytes + b'"}', 413),
            "malformed": lambda: (draws.choice(MALFORMED), 400),
            "key": lambda: (good, 401),
        }[kind]()
        status, answer = await self.whole(path, body, "wrong" if kind == "key" else key)
        if status != wanted or not (answer or {}).get("error", {}).get("message"):
            raise Wrong(f"{kind}: status {status} and {answer}, expected {wanted}")
        await asyncio.sleep(0.2)
        return f"refused with {status} ({kind})"

    async def client(self, number, until):
        draws = random.Random(self.args.seed * 1000 + number)
        kinds = [kind for kind in MIX if kind != "key" or self.args.key]
        weights = [MIX[kind] for kind in kinds]
        while time.monotonic() < until:
            kind = draws.choices(kinds, weights)[0]
            try:
                chats = kind in ("read", "slow", "schema", "leave")
                outcome = await (self.chat if chats else self.misbehave)(kind, draws)
                self.outcomes[outcome] += 1
            except Wrong as error:
                self.wrong[str(error)] += 1
            except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
                self.wrong[f"{kind}: {type(error).__name__}: {error}"] += 1

    def memory_kib(self):
        with open(f"/proc/{self.args.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    async def watch(self, until):
        samples = []
        while time.monotonic() < until:
            samples.append(self.memory_kib())
            await asyncio.sleep(1)
        return samples

    async def idle(self):
        """What the server says is left, once everybody is gone."""
        for _ in range(100):
            status, state = await self.whole("/api/state", key=self.args.key)
            if status == 200 and state["running"] == 0 and state["queued"] == 0:
                return
            await asyncio.sleep(0.1)
        raise Wrong(f"after the load still {state}")

    async def run(self):
        begun = time.monotonic()
        until = begun + self.args.seconds
        watch = asyncio.create_task(self.watch(until))
        await asyncio.gather(*(self.client(number, until) for number in range(self.args.clients)))
        seconds = time.monotonic() - begun
        try:
            memory = await watch
            await self.idle()
        except (Wrong, OSError) as error:
            self.wrong[f"at the end: {error}"] += 1
            memory = []
        growth = None
        if len(memory) >= 20:
            quarter = len(memory) // 4
            middle = lambda part: sorted(part)[len(part) // 2]
            growth = middle(memory[-quarter:]) - middle(memory[quarter : 2 * quarter])
            if growth > self.args.growth_mib * 1024:
                self.wrong[f"memory grew by {growth} KiB between the second and the last quarter"] += 1
        return {
            "clients": self.args.clients,
            "seconds": round(seconds, 1),
            "requests": sum(self.outcomes.values()) + sum(self.wrong.values()),
            "outcomes": dict(self.outcomes.most_common()),
            "wrong": dict(self.wrong.most_common()),
            "answer_tokens": self.tokens,
            "tokens_per_s": round(self.tokens / seconds, 1),
            "ttft_ms": percentiles(self.ttft),
            "time_per_token_ms": percentiles(self.token_times),
            "gap_between_parts_ms": percentiles(self.gaps),
            "distinct_texts": len(self.texts),
            "memory_kib": {
                "first": memory[0] if memory else None,
                "last": memory[-1] if memory else None,
                "max": max(memory, default=None),
                "growth": growth,
            },
        }


def percentiles(seconds):
    if not seconds:
        return None
    ordered = sorted(seconds)
    at = lambda share: round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)
    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "count": len(ordered)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True, help="process of the server")
    parser.add_argument("--key", help="an API key of the server")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--oversize-bytes", type=int, default=5 << 20, help="more than the server's --max-body")
    parser.add_argument("--growth-mib", type=int, default=32, help="growth of memory that is let pass")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the result here too")
    args = parser.parse_args()
    load = Load(args)
    result = asyncio.run(load.run())
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(text)
    if args.json:
        with open(args.json, "w") as file:
            file.write(text + "\n")
    sys.exit(1 if load.wrong else 0)


main()

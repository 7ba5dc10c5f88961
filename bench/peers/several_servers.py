#!/usr/bin/env python3
"""How much faster `regenerate` goes over several servers than over one.

Servers of our own stand in for engines: each answers a request after a fixed time with a fixed text, and one that is
told to be slow after four times as long. Nothing computes, so what is measured is what draftsmith makes of the servers. A
run's rate is that of the servers' own clock: answers after the first one, over the time that they took.

Usage: several_servers.py [--draftsmith BINARY] [--latency S] [--rows N] [--batch N] [--out FILE]
Run it from the root of the repository. One JSON object goes to stdout or to FILE.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TEXT = "It is a short answer."


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, latency):
        super().__init__(("127.0.0.1", 0), Handler)
        self.latency, self.dead, self.dies_after = latency, False, None
        self.ended, self.lock = [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A connection that ends in the middle is what is wanted here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.server.dead:
            self.close_connection = True
            return
        self.send("application/json", json.dumps({"data": [{"id": "stand-in"}]}).encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if server.dead:
            self.close_connection = True
            return
        if not asked.get("stream"):
            choice = {"index": 0, "text": "x", "finish_reason": "length"}
            self.send("application/json", json.dumps({"choices": [choice]}).encode())
            return
        time.sleep(server.latency)
        with server.lock:
            if server.dies_after is not None and len(server.ended) >= server.dies_after:
                server.dead = True
            if server.dead:
                self.close_connection = True
                return
            server.ended.append(time.monotonic())
        event = {"choices": [{"index": 0, "text": TEXT, "finish_reason": "stop"}]}
        self.send("text/event-stream", f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode())


def run(args, folder, name, servers, dies_after):
    def regenerate(rows):
        urls = json.dumps([server.url() for server in servers])
        command = [
            args.draftsmith, "regenerate", "recipes/smoke.toml", f"run.dir={folder / name}",
            f"regenerate.max_rows={rows}", f"regenerate.batch_size={args.batch}", f"regenerate.server.urls={urls}",
        ]
        ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if ended.returncode != 0:
            sys.exit(ended.stderr)

    # The held-out rows are answered before the others, and kept: they are not measured.
    regenerate(1)
    for server in servers:
        server.ended.clear()
    servers[-1].dies_after = dies_after
    regenerate(args.rows)
    lines = (folder / name / "regenerate/answers.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    main = sorted(moment for server in servers for moment in server.ended)
    return {
        "servers": len(servers),
        "latency_s": [server.latency for server in servers],
        "dies_after": [server.dies_after for server in servers],
        "rows": len(ids),
        "doubled": len(ids) - len(set(ids)),
        "answers": len(main),
        "answers_by_server": [len(server.ended) for server in servers],
        "seconds": main[-1] - main[0],
        "answers_per_s": (len(main) - 1) / (main[-1] - main[0]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draftsmith", default="target/release/draftsmith")
    parser.add_argument("--latency", type=float, default=0.25)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    page = {"command": " ".join(sys.argv), "batch_size": args.batch, "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name, latencies, dies in [
            ("one", [1], None),
            ("three", [1, 1, 1], None),
            ("three, one slow", [1, 1, 4], None),
            ("three, one slow, one dies", [1, 4, 1], args.rows // 10),
        ]:
            servers = [Server(args.latency * factor) for factor in latencies]
            place = name.replace(" ", "-").replace(",", "")
            page["runs"][name] = run(args, folder, place, servers, dies)
            for server in servers:
                server.shutdown()
    one = page["runs"]["one"]["answers_per_s"]
    for run_ in page["runs"].values():
        run_["times_one_server"] = run_["answers_per_s"] / one
    text = json.dumps(page, indent=2) + "\n"
    args.out.write_text(text) if args.out else print(text, end="")


if __name__ == "__main__":
    main()

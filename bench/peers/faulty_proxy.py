"""A proxy that fails on purpose, for `regenerate-through-faults.sh`.

Usage: faulty_proxy.py PORT UPSTREAM_PORT [RATE] [SEED]

Passes requests on to 127.0.0.1:UPSTREAM_PORT and lets RATE of the POSTs go wrong, in turn: silence, 429 with
`Retry-After`, 500, a hang-up before the answer, an answer cut in the middle, a page of HTML with status 200, and a broken
event. Ends with SIGTERM and prints what it did as one JSON object.
"""

import http.client
import http.server
import json
import random
import signal
import sys
import threading
import time

port, upstream = int(sys.argv[1]), int(sys.argv[2])
rate = float(sys.argv[3]) if len(sys.argv) > 3 else 0.25
draws = random.Random(int(sys.argv[4]) if len(sys.argv) > 4 else 1)
FAULTS = ["silence", "429", "500", "hang-up", "cut", "html", "garbled"]
SILENCE_S = 15.0
counts = {"requests": 0, "passed": 0, **{fault: 0 for fault in FAULTS}}
lock = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, kind, body, headers=()):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def pass_on(self, cut):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=600)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        if "event-stream" not in answer.headers.get("Content-Type", ""):
            self.reply(answer.status, answer.headers.get("Content-Type", ""), answer.read())
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        events = 0
        while True:
            line = answer.readline()
            if not line:
                break
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
            events += line.startswith(b"data:")
            if cut and events == 5:
                # Dropping the connection also tells the server that nobody listens any more.
                connection.close()
                self.close_connection = True
                return
        self.wfile.write(b"0\r\n\r\n")

    def do_GET(self):
        self.pass_on(cut=False)

    def do_POST(self):
        with lock:
            counts["requests"] += 1
            fault = FAULTS[sum(counts[f] for f in FAULTS) % len(FAULTS)] if draws.random() < rate else "passed"
            counts[fault] += 1
        if fault == "passed":
            return self.pass_on(cut=False)
        if fault == "cut":
            return self.pass_on(cut=True)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "silence":
            time.sleep(SILENCE_S)
        if fault in ("silence", "hang-up"):
            self.close_connection = True
        elif fault == "429":
            self.reply(429, "application/json", b'{"error": {"message": "slow down"}}', [("Retry-After", "1")])
        elif fault == "500":
            self.reply(500, "text/plain", b"worker died")
        elif fault == "html":
            self.reply(200, "text/html", b"<html>Bad gateway</html>")
        else:
            self.reply(200, "text/event-stream", b'data: {"choices": [{"text": \n\n')


server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
server.daemon_threads = True
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
print(json.dumps(counts), flush=True)

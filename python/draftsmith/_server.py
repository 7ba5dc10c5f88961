"""`draftsmith serve` for the length of a `with`."""

from __future__ import annotations

import collections
import json
import queue
import signal
import subprocess
import threading
import time
import weakref
from types import TracebackType
from typing import Any, Deque, List, Optional, Sequence

from ._errors import Error, from_stderr
from ._program import Option, PathLike, Progress, Reader, arguments, program, start

#: Lines of the server's log that are kept.
LOG_LINES = 1000


class Server:
    """A server of this machine: `with draftsmith.serve(bundle=…) as server:`, or `start()` and `stop()`.

    After the start it has `base_url` (with `/v1`, as OpenAI's clients want it), `url` (the web page), `model` (its name in
    requests), `draft` (name of the draft, or `None`) and `cache_tokens`.
    """

    url: str
    model: str
    draft: Optional[str]
    cache_tokens: Optional[int]

    def __init__(
        self, words: Sequence[str], *, start_timeout: float, stop_timeout: float, progress: Progress, cwd: PathLike | None
    ) -> None:
        self._words, self._cwd, self._progress = list(words), cwd, progress
        self._start_timeout, self._stop_timeout = start_timeout, stop_timeout
        self._child: subprocess.Popen[str] | None = None
        self._log: Deque[str] = collections.deque(maxlen=LOG_LINES)
        self._last_resort: Any = None

    @property
    def base_url(self) -> str:
        """The address of the API."""
        return self.url + "/v1"

    @property
    def log(self) -> List[str]:
        """The last lines that the server wrote."""
        return list(self._log)

    @property
    def running(self) -> bool:
        """True from the start to the end."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> Server:
        """Starts it, and comes back once the model answers; raises `Error` if it does not."""
        if self.running:
            return self
        command = [str(program()), *self._words, "--json"]
        self._log.clear()
        child = start(command, cwd=self._cwd)
        self._child = child
        # Nothing stays behind, even if nobody calls `stop`.
        self._last_resort = weakref.finalize(self, _end, child, self._stop_timeout)
        reader = Reader(child.stderr, self._log, self._progress)
        told: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_first_line, args=(child.stdout, told), daemon=True).start()
        try:
            line = told.get(timeout=self._start_timeout)
        except queue.Empty:
            self.stop()
            raise Error(
                f"the server did not answer within {self._start_timeout:g} seconds",
                "give `start_timeout` more seconds; `progress=True` shows what it does",
                command=command,
            ) from None
        except BaseException:
            self.stop()
            raise
        if not line:
            code = child.wait()
            reader.join()
            self._last_resort.detach()
            raise from_stderr(self.log, code, command)
        ready = json.loads(line)
        self.url, self.model = ready["url"], ready["model"]
        self.draft, self.cache_tokens = ready.get("draft"), ready.get("cache_tokens")
        return self

    def stop(self) -> None:
        """Ends it after the answers under way; what takes longer than `stop_timeout` is killed. May be called again."""
        if self._last_resort is not None:
            self._last_resort()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<draftsmith.Server {self.url if self.running else 'not running'}>"


def _first_line(stream: Any, told: "queue.Queue[str]") -> None:
    with stream:
        told.put(stream.readline())
        for _ in stream:
            pass


def _end(child: "subprocess.Popen[str]", timeout: float) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        # Not one `wait(timeout)`: an interrupt in it would leave the server behind.
        until = time.monotonic() + timeout
        try:
            while child.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def serve(
    *,
    bundle: PathLike | None = None,
    target: PathLike | None = None,
    draft_model: PathLike | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    model_name: str | None = None,
    kv_budget: str | None = None,
    max_running: int | None = None,
    max_new_tokens: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    start_timeout: float = 600.0,
    stop_timeout: float = 40.0,
    progress: Progress = False,
    offline: bool = False,
    cwd: PathLike | None = None,
    extra: Sequence[str] = (),
) -> Server:
    """A server with OpenAI's HTTP API, started by `with` or `start()`.

    >>> with draftsmith.serve(bundle="runs/smoke/bundle") as server:
    ...     client = openai.OpenAI(base_url=server.base_url, api_key="none")

    Port 0 takes a free one. Options are those of `draftsmith serve`; `extra` takes those that have no argument here. It ends
    with the `with`, with `stop()`, or with the interpreter, whichever comes first.
    """
    options: dict[str, Option] = {
        "bundle": bundle,
        "target": target,
        "draft_model": draft_model,
        "host": host,
        "port": port,
        "model_name": model_name,
        "kv_budget": kv_budget,
        "max_running": max_running,
        "max_new_tokens": max_new_tokens,
        "device": device,
        "threads": threads,
        "offline": offline,
    }
    words = ["serve", *arguments(options), *extra]
    return Server(
        words, start_timeout=start_timeout, stop_timeout=stop_timeout, progress=progress, cwd=cwd
    )

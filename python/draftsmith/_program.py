"""Finds the program, runs it, reads its answer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List, Mapping, Sequence, Union

from ._errors import Error, NotHeld, from_stderr

#: Anything that names a file or folder.
PathLike = Union[str, "os.PathLike[str]"]
#: What is told of work under way: nothing, lines on `sys.stderr`, or lines to a function.
Progress = Union[bool, Callable[[str], None]]
#: What an option may be: left out, a flag, a value, or several values.
Option = Union[None, bool, int, float, str, "os.PathLike[str]", Sequence[Union[int, float, str, "os.PathLike[str]"]]]

#: Names another program to use than the one of this wheel.
VARIABLE = "DRAFTSMITH_PROGRAM"


def program() -> Path:
    """The program that is run: the one that `DRAFTSMITH_PROGRAM` names, that of this wheel, or one on the path."""
    named = os.environ.get(VARIABLE)
    if named:
        if not os.access(named, os.X_OK):
            raise Error(f"`{VARIABLE}` names `{named}`, which is no program", f"correct or unset {VARIABLE}")
        return Path(named).absolute()
    name = "draftsmith" + (sysconfig.get_config_var("EXE") or "")
    for folder in _script_folders():
        if os.access(folder / name, os.X_OK):
            return folder / name
    found = shutil.which(name)
    if found is None:
        raise Error(
            "the program `draftsmith` was not found beside this module, nor on the path",
            f"install the wheel again (`pip install --force-reinstall draftsmith`), or name it in {VARIABLE}",
        )
    return Path(found)


def _script_folders() -> Iterator[Path]:
    """Where installers put scripts, the most likely first."""
    yield Path(sysconfig.get_path("scripts"))
    # `pip install --target` and `--prefix` put `bin` beside the packages, or some folders above.
    for parent in list(Path(__file__).resolve().parents)[1:5]:
        yield parent / ("Scripts" if os.name == "nt" else "bin")
    scheme = f"{os.name}_user"
    if scheme in sysconfig.get_scheme_names():
        yield Path(sysconfig.get_path("scripts", scheme=scheme))


def arguments(options: Mapping[str, Option]) -> List[str]:
    """`max_new_tokens=64` is `--max-new-tokens 64`, `True` a flag alone, several values the option several times."""
    written: List[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            written.append(flag)
            continue
        single = isinstance(value, (str, int, float, os.PathLike))
        # Joined by `=`: values may begin with a dash.
        written += [f"{flag}={_text(one)}" for one in ([value] if single else value)]  # type: ignore[union-attr]
    return written


def _text(value: object) -> str:
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def call(*words: PathLike, progress: Progress = False, cwd: PathLike | None = None) -> Any:
    """Runs any verb with `--json` and returns what it prints, as JSON reads it; several lines are a list.

    >>> draftsmith.call("inspect", "runs/smoke/bundle")

    Raises `Error` where the program ends with one, and `NotHeld` where what was checked does not hold. An interrupt is handed
    on: the program stops at the next safe point, a second one stops it at once.
    """
    command = [str(program()), *(os.fspath(word) for word in words), "--json"]
    if progress is False:
        command.append("--quiet")
    child = start(command, cwd=cwd)
    lines: List[str] = []
    # What an exception will say is not shown before it.
    readers = [Reader(child.stderr, lines, progress, errors=False)]
    answer: List[str] = []
    readers.append(Reader(child.stdout, answer, False))
    interrupted = False
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
            child.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        except BaseException:
            child.kill()
            raise
    for reader in readers:
        reader.join()
    if interrupted:
        raise KeyboardInterrupt
    if code not in (0, 1):
        raise from_stderr(lines, code, command)
    try:
        parsed = [json.loads(line) for line in answer if line.strip()]
    except ValueError as error:
        raise Error(
            f"the program's answer is no JSON: {error}",
            f"the module is of another version than `{command[0]}`: install both anew",
            command=command,
        ) from None
    result = parsed[0] if len(parsed) == 1 else parsed
    if code == 1:
        ending = from_stderr(lines, code, command)
        told = ending.message if any(line.startswith("error: ") for line in lines) else "what was checked does not hold"
        raise NotHeld(told, ending.hint, result=result, command=command)
    return result


def start(command: Sequence[str], cwd: PathLike | None = None) -> subprocess.Popen[str]:
    """Starts the program, with a session of its own: an interrupt of the terminal reaches it once, from us."""
    try:
        return subprocess.Popen(
            list(command),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=os.name == "posix",
        )
    except OSError as error:
        raise Error(
            f"`{command[0]}` does not start: {error}", "install the wheel of this machine again", command=command
        ) from None


class Reader(threading.Thread):
    """Collects the lines of a stream, so that the program never waits for us, and shows them if wanted, errors among them or not."""

    def __init__(self, stream: Any, lines: Any, progress: Progress, errors: bool = True) -> None:
        super().__init__(daemon=True)
        self.stream, self.lines, self.progress, self.errors = stream, lines, progress, errors
        self.start()

    def run(self) -> None:
        in_error = False
        with self.stream:
            for line in self.stream:
                line = line.rstrip("\n")
                self.lines.append(line)
                in_error = line.startswith("error: ") or (in_error and line.startswith("hint: "))
                if in_error and not self.errors:
                    continue
                if self.progress is True:
                    print(line, file=sys.stderr)
                elif self.progress:
                    self.progress(line)

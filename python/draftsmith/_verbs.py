"""The verbs that end with an answer."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Mapping, Sequence, Union

from ._program import Option, PathLike, Progress, arguments, call
from ._records import BenchRecord, Generation, RunRecord

#: What a key of a run file may be set to.
Value = Union[bool, int, float, str, Sequence[Union[bool, int, float, str]]]


def run(
    run_file: PathLike,
    overrides: Mapping[str, Value] | None = None,
    *,
    progress: Progress = True,
    offline: bool = False,
    cwd: PathLike | None = None,
    extra: Sequence[str] = (),
) -> RunRecord:
    """Does all stages of a run file, from conversations to a measured bundle.

    `overrides` sets keys that differ from the file (`{"train.lr": 5e-5}`). Interrupted or killed, the same call goes on where
    it stopped. `progress=True` prints what happens to `sys.stderr`, a function gets each line, `False` is silent. Relative
    paths count from `cwd` (default: the current folder).
    """
    words = [f"{key}={_toml(value)}" for key, value in (overrides or {}).items()]
    value = call(
        "run", run_file, *words, *arguments({"offline": offline}), *extra, progress=progress, cwd=cwd
    )
    return RunRecord.of(value, Path(cwd) if cwd is not None else Path())


def bench(
    *,
    workload: PathLike | Sequence[PathLike],
    bundle: PathLike | None = None,
    draft_model: PathLike | None = None,
    target: PathLike | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    repeats: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    auto: bool = False,
    depth: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    report: PathLike | None = None,
    progress: Progress = False,
    offline: bool = False,
    cwd: PathLike | None = None,
    extra: Sequence[str] = (),
) -> BenchRecord:
    """Measures accept length and speedup against target-only decoding, interleaved.

    The draft is a `bundle` or a smaller model (`draft_model`); rows of a workload are `{"id", "turns": [...]}`. Options are
    those of `draftsmith bench`; `extra` takes those that have no argument here, as the command line writes them. Raises
    `NotHeld` if an answer differs from target-only decoding.
    """
    options: dict[str, Option] = {
        "workload": workload if isinstance(workload, (str, os.PathLike)) else list(workload),
        "bundle": bundle,
        "draft_model": draft_model,
        "target": target,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "temperature": temperature,
        "seed": seed,
        "auto": auto,
        "depth": depth,
        "device": device,
        "threads": threads,
        "report": report,
        "offline": offline,
    }
    return BenchRecord.from_json(call("bench", *arguments(options), *extra, progress=progress, cwd=cwd))


def generate(
    prompt: str | None = None,
    *,
    target: PathLike,
    bundle: PathLike | None = None,
    draft_model: PathLike | None = None,
    prompt_ids: Sequence[int] | None = None,
    messages: PathLike | Sequence[Mapping[str, Any]] | None = None,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    auto: bool = False,
    depth: int | None = None,
    prove: bool = False,
    device: str | None = None,
    threads: int | None = None,
    progress: Progress = False,
    offline: bool = False,
    cwd: PathLike | None = None,
    extra: Sequence[str] = (),
) -> Generation:
    """Decodes one answer, with a draft if a bundle or a smaller model is given.

    The prompt is a user message, token ids (`prompt_ids`), or messages: a list of them or a JSON file. `prove=True` decodes
    both ways and raises `NotHeld` if they differ. Every call loads the model: for many answers use `serve`.
    """
    options: dict[str, Option] = {
        "target": target,
        "bundle": bundle,
        "draft_model": draft_model,
        "prompt": prompt,
        "prompt_ids": None if prompt_ids is None else ",".join(str(token) for token in prompt_ids),
        "max_new_tokens": max_new_tokens,
        "stop": stop if stop is None or isinstance(stop, str) else list(stop),
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "auto": auto,
        "depth": depth,
        "prove": prove,
        "device": device,
        "threads": threads,
        "offline": offline,
    }
    with contextlib.ExitStack() as stack:
        if messages is not None and not isinstance(messages, (str, os.PathLike)):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="draftsmith-"))
            options["messages"] = Path(folder) / "messages.json"
            Path(folder, "messages.json").write_text(json.dumps(list(messages)), encoding="utf-8")
        else:
            options["messages"] = messages
        return Generation.from_json(call("generate", *arguments(options), *extra, progress=progress, cwd=cwd))


def _toml(value: Value) -> str:
    """A value as the command line takes it: TOML, texts in quotes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
    if isinstance(value, os.PathLike):
        return _toml(os.fspath(value))
    if isinstance(value, (int, float)):
        return repr(value)
    return "[" + ", ".join(_toml(one) for one in value) + "]"

"""Lets `pip install .` make the wheel: cargo builds the program, `cargo xtask dist` packs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Makes the wheel and returns its name."""
    if shutil.which("cargo") is None:
        _stop("the program is built by cargo, which is not on the path", "install Rust (https://rustup.rs)")
    with tempfile.TemporaryDirectory() as folder:
        # `cargo xtask` is compiled with this profile, and shares what the program is made of.
        command = ["cargo", "xtask", "dist", "--profile", "release", "--wheel-only", "--out", folder]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            _stop("the program was not built", "the lines above say why; `pip install -v .` shows all of them")
        (made,) = Path(folder).glob("*.whl")
        shutil.move(str(made), os.path.join(wheel_directory, made.name))
        return made.name


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> NoReturn:
    """Refused: the repository is the source."""
    _stop("there is no source distribution", "build a wheel, or clone the repository")


def _stop(message: str, hint: str) -> NoReturn:
    raise SystemExit(f"error: {message}\nhint: {hint}")

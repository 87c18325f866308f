"""Writes results so that they are there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["new_directory", "write_json", "write_text"]


@contextmanager
def new_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A scratch directory beside ``path`` that takes its place when the block ends without an error.

    Raises:
        ValueError: if ``path`` is a file, or has content and ``overwrite`` is off.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; expected a directory that does not exist yet")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path} exists and is not empty; choose another directory or overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield scratch
        scratch.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-old-"))
            path.rename(old / path.name)
            scratch.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_json(path: str | Path, document: object) -> None:
    """Write JSON under a temporary name, then rename."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text under a temporary name, then rename."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file name that is not UTF-8 reaches the report as surrogates; a backslash escape of one is valid JSON.
    scratch = {"dir": path.parent, "prefix": f".{path.name}-", "delete": False}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", errors="backslashreplace", **scratch) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise

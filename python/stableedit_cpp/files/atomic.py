"""Writes results so that they are there whole or not at all, and finds out beforehand whether they can be written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_new_directory", "check_writable_file", "new_directory", "new_file", "write_json", "write_text"]


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
            try:
                path.rename(old / path.name)
                try:
                    scratch.rename(path)
                except BaseException:
                    (old / path.name).rename(path)
                    raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A scratch file beside ``path``, there already and empty, that takes its place when the block ends without an
    error; it is on the disk then. Parents are made.

    Raises:
        OSError: if it cannot be written; ``path`` is as it was.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(number)
    try:
        yield Path(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_json(path: str | Path, document: object) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with new_file(path) as scratch:
        # A file name that is not UTF-8 reaches the report as surrogates; a backslash escape of one is valid JSON.
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_new_directory(path: str | Path, *, overwrite: bool) -> None:
    """Find out before hours of work that the result cannot be saved.

    Raises:
        ValueError: if ``path`` is a file, a directory with content and ``overwrite`` is off, or cannot be written to.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output {path} is a file; expected a directory that does not exist yet")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"--output {path} exists and is not empty; choose another or add --overwrite")
    _check_parent(path)


def check_writable_file(path: str | Path, option: str = "--output") -> None:
    """The same for a single file; messages name the ``option`` that it was given with."""
    if Path(path).is_dir():
        raise ValueError(f"{option} {path} is a directory; expected a file name")
    _check_parent(Path(path), option)


def _check_parent(path: Path, option: str = "--output") -> None:
    # Parents are made when there is something to save, so that a run that fails leaves nothing behind.
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        # Asking for permission is not enough: root is allowed everything, also on a read-only file system.
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".stableedit-"):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be made in {parent}: {error.strerror}") from None
    if path.is_dir() and not os.access(path, os.W_OK):
        raise ValueError(f"{option} {path} is read-only; choose another directory")

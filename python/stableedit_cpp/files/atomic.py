"""Writes results so that they are there whole or not at all, and finds out beforehand whether they can be written."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "check_new_directory",
    "check_replaceable",
    "check_writable_file",
    "new_directory",
    "new_file",
    "write_json",
    "write_text",
]

# Files by which a directory is a model, an export or a session; others in it are results that may be written again.
_ESSENTIAL = re.compile(
    r"\.(safetensors|bin|gguf|model|jinja)$|^(.*config|.*index|tokenizer.*|vocab|manifest|stableedit_.*)\.json$|^journal$"
)


@contextmanager
def new_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A scratch directory beside ``path`` that takes its place when the block ends without an error.

    Raises:
        ValueError: if ``path`` is a file, or has content and ``overwrite`` is off, or the current directory or the
            user's home in it.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; expected a directory that does not exist yet")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"{path} exists and is not empty; choose another directory or overwrite it")
        check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield scratch
        for made in scratch.rglob("*"):  # safetensors writes files that only their owner can read
            made.chmod(0o755 if made.is_dir() else 0o644)
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


def check_replaceable(path: str | Path, inputs: Iterable[str | Path] = (), option: str = "") -> None:
    """Refuse to replace what must not go: a directory with the current directory, the user's home or an input of the
    command in it, a file that is an input, or by which an input directory is what it is.

    Args:
        path: what would be replaced, a directory as a whole; nothing is refused where there is nothing.
        inputs: files and directories that the command reads.
        option: that it was given with, for the message.

    Raises:
        ValueError: with what would be lost.
    """
    place, what = Path(path).resolve(), f"{option} {path}".strip()
    sources = [Path(source).resolve() for source in inputs if Path(source).exists()]
    if place.is_dir():
        for kept, name in ((Path.cwd(), "the current directory"), (Path.home(), "your home directory")):
            if kept.resolve() == place or place in kept.resolve().parents:
                raise ValueError(
                    f"{what} would be replaced as a whole, and {name} lies in it; choose another directory"
                )
        lost = next((source for source in sources if source == place or place in source.parents), None)
        if lost is not None:
            raise ValueError(
                f"{what} would be replaced as a whole, and {lost}, which is read, lies in it; choose another directory"
            )
    elif place.exists():
        inside = [source for source in sources if source in place.parents and _ESSENTIAL.search(place.name)]
        if place in sources or inside:
            whose = f"a part of {inside[0]}, which is read" if inside else "a file that is read"
            raise ValueError(f"{what} would replace {whose}; choose another name")


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

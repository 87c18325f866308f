"""Before a command runs: what it would replace is not what it reads, nor where it is called."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from stableedit_cpp.files.atomic import check_replaceable

__all__ = ["check_outputs"]

_OUTPUTS = ("output", "patch")


def check_outputs(options: argparse.Namespace) -> None:
    """Look at all options of a command that name something on the disk.

    A directory is replaced as a whole only with ``--overwrite``; a file always.

    Raises:
        ValueError: where an input, or the current directory, would be lost.
    """
    inputs = [path for name, value in vars(options).items() if name not in _OUTPUTS for path in _paths(value)]
    for name in _OUTPUTS:
        path = getattr(options, name, None)
        if isinstance(path, str) and (getattr(options, "overwrite", False) or not Path(path).is_dir()):
            check_replaceable(path, inputs, f"--{name}")


def _paths(value: object) -> Iterator[Path]:
    """What there is on the disk of a value, or of a list, also as NAME=FILE."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, str) and value:
        for text in (value, value.partition("=")[2]):
            try:
                if text and Path(text).exists():
                    yield Path(text)
            except OSError:  # a name that is too long, say
                continue

"""What a person reads where a command warns or fails, and the exit status."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from stableedit_cpp.errors import DriftLimitReached, StableEditError

__all__ = ["plain_warnings", "quiet_imports", "sentence"]

_GUARD = "--turn-size, --step-size auto, --edit-modules (stableedit choose-modules measures); --guard-limit, --no-guard"


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings are sentences for people, without the line of our code that they come from."""

    def show(message, *_arguments, **_names) -> None:
        print(f"stableedit: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def quiet_imports() -> Iterator[None]:
    """What libraries say of themselves when they are imported is for their developers: torchao names kernels that it
    was not built with, wherever transformers finds it installed."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def sentence(error: Exception) -> tuple[str, int]:
    """One line for a person, and the exit status."""
    if isinstance(error, OSError) and error.strerror:  # the operating system's errors carry a number and a name
        return (f"{error.filename}: {error.strerror}" if error.filename else error.strerror), 2
    # C++ errors carry a stack trace after the first paragraph when that is switched on.
    lines = [line.strip() for line in str(error).split("\nException raised from")[0].strip().splitlines()]
    text = " ".join([*lines[:1], "; ".join(lines[1:])]).strip()
    if isinstance(error, DriftLimitReached):
        text += f". {_done(error.report)}Options: {_GUARD}"
    if isinstance(error, (ValueError, OSError, ImportError, StableEditError)):
        return text, 2
    if torch := sys.modules.get("torch"):  # its errors can only come where it is loaded
        if isinstance(error, torch.OutOfMemoryError):
            return f"{lines[0]} Use a smaller max_tokens_per_forward, or a smaller dtype.", 2
        if isinstance(error, torch.linalg.LinAlgError):
            return text, 2
    if os.environ.get("STABLEEDIT_TRACEBACK"):
        traceback.print_exception(error)
    kind = type(error).__name__ + (f": {text}" if text else "")
    return (
        f"{kind}; this is a defect of stableedit: please report it with the output of `stableedit env` and what this "
        "command prints with STABLEEDIT_TRACEBACK=1",
        1,
    )


def _done(report) -> str:
    """What was edited before, and how much of it holds, as far as anybody looked."""
    if report is None or not report.turns:
        return ""
    looked = [turn for turn in report.turns if turn.failed is not None]
    took = sum(turn.requests - len(turn.failed) for turn in looked)
    held = f", of which {took} took" if len(looked) == len(report.turns) else ""
    return f"The {report.edits} requests before it are edited{held}. "

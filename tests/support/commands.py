"""What a command left behind, on the disk and on the screen."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def started(command: list[str], **how: object) -> Iterator[subprocess.Popen]:
    """A process that Ctrl-C ends, also where the test run itself was started with it ignored, as jobs in the background
    are; a test that fails does not wait for it."""
    ended = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, **ended, **how) as process:
        try:
            yield process
        finally:
            process.kill()


def tree(directory: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


def assert_one_error(err: str) -> str:
    """One line for a person and no traceback; bars of the model's loading may come before it."""
    assert "Traceback" not in err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and not re.search(r"\d+%\|", line)]
    assert len(lines) == 1, lines
    assert lines[0].startswith("stableedit: error: ")
    assert not re.search(r"Exception raised from|\bC\+\+\b", lines[0])
    return lines[0]

"""Several processes test at once (pytest-xdist), and what is costly is made by one of them for all."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def one_process_at_a_time(path: Path) -> Iterator[None]:
    """For whoever makes ``path`` unless it is there: the others wait, and find it."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

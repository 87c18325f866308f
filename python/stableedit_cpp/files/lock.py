"""One writer a directory: a lock that the system takes back when its process ends, however it ends.

Two files, because whoever asks for the writer must not be taken for one. ``lock`` is held by the writer; nobody but
a writer ever tries to hold it. ``.writing`` is held beside it for others to see: they try it for a moment, and a
writer who finds it tried waits for that moment to pass.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from stableedit_cpp.errors import SessionBusy
from stableedit_cpp.files.words import now

__all__ = ["HeldElsewhere", "WriterLock", "writer"]

_OWNER_SIZE = 256  # bytes, padded with spaces
_PATIENCE = 1.0  # seconds for those who ask; they need microseconds, unless one was stopped just then


class WriterLock:
    """Holds a directory (a session, a run) for writing, until ``release``.

    Raises:
        SessionBusy: naming who holds it.
        OSError: if the directory cannot be written to.
    """

    def __init__(self, directory: Path) -> None:
        self._descriptors: list[int] = []
        try:
            self._descriptors.append(_opened(directory / "lock"))
            fcntl.flock(self._descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_owner(directory)
        except BlockingIOError:
            self.release()
            raise SessionBusy(
                f"the session {directory} is open for writing {_owner(directory)}; close it there first, or only read "
                "it (status, log, verify)"
            ) from None
        except OSError as error:
            self.release()
            raise OSError(
                f"the session {directory} cannot be opened for writing ({error.strerror}); it can only be read "
                "(status, log, verify)"
            ) from None
        self._show(directory)

    def release(self) -> None:
        for descriptor in self._descriptors:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile has the descriptor as well
            os.close(descriptor)
        self._descriptors = []

    def _show(self, directory: Path) -> None:
        """For people to read, so that what goes wrong here is no reason to refuse."""
        with contextlib.suppress(OSError):
            self._descriptors.append(_opened(directory / ".writing"))
            end = time.monotonic() + _PATIENCE
            while time.monotonic() < end:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(self._descriptors[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                time.sleep(0.001)


class HeldElsewhere:
    """Stands for a lock that another process holds for this one, too."""

    def release(self) -> None:
        """Nothing is held here."""


def writer(directory: Path) -> str | None:
    """Who has a directory open for writing, "by process 17 on host, since ..."; None if nobody seems to."""
    try:
        with (directory / ".writing").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return _owner(directory)
    return None


def _opened(path: Path) -> int:
    # Not for writing: a file system can be made read-only while a session is open.
    return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _write_owner(directory: Path) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
    try:
        with (directory / "lock").open("r+b", buffering=0) as file:
            file.write(json.dumps(owner).ljust(_OWNER_SIZE).encode())  # in one piece over that of the one before
    except OSError as error:
        if error.errno != errno.ENOSPC:  # nobody needs it but people
            raise


def _owner(directory: Path) -> str:
    try:
        owner = json.loads((directory / "lock").read_bytes())
        return f"by process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "by a process that did not say who it is"

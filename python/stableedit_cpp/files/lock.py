"""One writer a session: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from stableedit_cpp.errors import SessionBusy

__all__ = ["SessionLocked", "WriterLock"]


SessionLocked = SessionBusy  # its earlier name


class WriterLock:
    """Holds the session of a directory for writing, until ``release``.

    Raises:
        SessionLocked: naming who holds it.
        OSError: if the directory cannot be written to.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "lock"
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        except BlockingIOError:
            self.release()
            raise SessionLocked(
                f"the session {directory} is open for writing {writer(directory) or 'elsewhere'}; close it there "
                "first, or only read it (status, log, verify)"
            ) from None
        except OSError as error:
            if self._descriptor is not None and error.errno == errno.ENOSPC:
                return  # who holds it is only there to be read by people
            self.release()
            raise OSError(
                f"the session {directory} cannot be opened for writing ({error.strerror}); it can only be read "
                "(status, log, verify)"
            ) from None

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def writer(directory: Path) -> str | None:
    """Who has a session open for writing, "by process 17 on host, since ..."; None if nobody seems to."""
    try:
        with (directory / "lock").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                owner = json.loads(file.read())
                return f"by process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return "by a process that did not say who it is"

"""What is worked out in one pass over a long stream and needed in the next: on the disk, in its order."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import suppress
from tempfile import TemporaryFile

__all__ = ["Shelf"]


class Shelf:
    """Takes things, one after the other, and then gives them back in that order; a context manager.

    They are in a temporary file (where: ``TMPDIR``) that is gone with the context or the process, and none of them is
    in memory. Only what pickle reads back as it was may be put here.
    """

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115 (closed with the context)

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_exception: object) -> None:
        with suppress(OSError):  # what did not fit is written once more, and has been said
            self._file.close()

    def put(self, thing: object) -> None:
        """
        Raises:
            OSError: if the temporary file cannot be written.
        """
        try:
            pickle.dump(thing, self._file, protocol=5)
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"the tokens of the stream cannot be kept in a temporary file ({error}); they take fewer bytes than "
                "its texts, in the directory that TMPDIR names"
            ) from error

    def __iter__(self) -> Iterator:
        """From the first to the last; nothing can be put any more."""
        self._file.seek(0)
        while True:
            try:
                yield pickle.load(self._file)
            except EOFError:
                return

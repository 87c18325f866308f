"""Ctrl-C during a stream of edits: finish the turn in flight, then stop; a second Ctrl-C drops the turn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from stableedit_cpp.editors.edit_report import EditReport

__all__ = ["EditInterrupted", "InterruptGuard"]


class EditInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a stream of edits between two turns. ``report`` says what was applied."""

    def __init__(self, message: str, report: EditReport) -> None:
        super().__init__(message)
        self.report = report


class InterruptGuard:
    """Context manager that turns the first SIGINT into ``requested``; the second raises KeyboardInterrupt, but only
    within ``droppable()``: from the first weight written to the end of the turn, nothing may cut it in half.

    Outside the main thread, or where the application handles SIGINT itself, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._urgent = False
        self._droppable = False
        self._installed = False

    def __enter__(self) -> InterruptGuard:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """Work that can be thrown away: nothing has been applied yet, or the caller takes it back."""
        self._droppable = True
        try:
            self._drop_if_urgent()
            yield
        finally:
            self._droppable = False

    def _drop_if_urgent(self) -> None:
        if self._urgent and self._droppable:
            raise KeyboardInterrupt("the turn in flight was dropped; the turns before it are applied")

    def _handle(self, _signal: int, _frame: object) -> None:
        self._urgent = self.requested
        self.requested = True
        self._drop_if_urgent()

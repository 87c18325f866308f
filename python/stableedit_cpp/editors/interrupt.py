"""Ctrl-C during a stream of edits: finish the turn in flight, then stop; a second Ctrl-C drops the turn. And what no
signal may cut in half."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import torch

from stableedit_cpp.editors.edit_report import EditReport
from stableedit_cpp.model.ranks import ranks

__all__ = ["EditInterrupted", "InterruptGuard", "undisturbed"]


class EditInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a stream of edits between two turns. ``report`` says what was applied."""

    def __init__(self, message: str, report: EditReport) -> None:
        super().__init__(message)
        self.report = report


class InterruptGuard:
    """Context manager that turns the first SIGINT into ``requested``; the second raises KeyboardInterrupt, but only
    within ``droppable()``: from the first weight written to the end of the turn, nothing may cut it in half.

    Where processes share the work (``ranks``), Ctrl-C in one of them counts for all, at the next point where all come
    by: ``asked``, and the beginning of what is droppable.

    Outside the main thread, or where the application handles SIGINT itself, it does nothing but one thing: whatever a
    signal cuts off, gradients are switched on or off afterwards as they were. ``torch.no_grad()`` leaves them off where
    an exception comes just when it is entered.
    """

    def __init__(self) -> None:
        self.requested = False
        self._urgent = False
        self._droppable = False
        self._installed = False
        self._ranks = ranks()

    def asked(self) -> bool:
        """Whether to stop here, between two turns."""
        return self._ranks.any("ending a turn", self.requested)

    def __enter__(self) -> InterruptGuard:
        self._gradients = torch.is_grad_enabled()
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_grad_enabled(self._gradients)

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """Work that can be thrown away: nothing has been applied yet, or the caller takes it back."""
        self._droppable = True
        try:
            self._urgent = self._ranks.any("beginning a pass", self._urgent)
            self._drop_if_urgent(here=True)
            yield
        finally:
            self._droppable = False

    def _drop_if_urgent(self, here: bool = False) -> None:
        if self._urgent and self._droppable and (here or self._ranks.size == 1):
            raise KeyboardInterrupt("the turn in flight was dropped; the turns before it are applied")

    def _handle(self, _signal: int, _frame: object) -> None:
        self._urgent = self.requested
        self.requested = True
        self._drop_if_urgent()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals wait until the end of this context, whoever handles them: an application's handler may raise, and would
    leave in halves what is to be written as a whole. Keep it short.

    Python runs handlers in the main thread alone, so elsewhere this does nothing.
    """
    held = _Held()
    try:
        if threading.current_thread() is threading.main_thread():
            held.install()
        yield
    finally:
        held.holds = False  # what comes from now on goes where it belongs, also before the next line
        held.remove()


class _Held:
    """A handler in place of all others, that notes what comes, to hand it on later."""

    def __init__(self) -> None:
        self.holds = True
        self._handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._came: list[tuple[int, FrameType | None]] = []

    def install(self) -> None:
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):  # not what is ignored, or ends the process
                self._handlers[number] = handler
                signal.signal(number, self)

    def remove(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        with ExitStack() as stack:  # all of them, also after one that raises
            for number, frame in reversed(self._came):
                stack.callback(self._handlers[number], number, frame)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.holds:
            self._came.append((number, frame))
        else:
            self._handlers[number](number, frame)

"""Errors that are states, not values: what a caller may want to tell apart, and to answer.

A bad argument is a ``ValueError`` with a sentence. What is here says that something stands in the way: a session that
another process has, a journal with turns lost, a model that answers NaN. ``except StableEditError`` catches all of
them; each is also the built-in error that it was before it had a name (``ValueError`` most often), so that older code
catches what it caught. Ctrl-C is ``EditInterrupted``, a ``KeyboardInterrupt``, and none of these.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "DamagedJournal",
    "DamagedSnapshot",
    "DriftLimitReached",
    "ModelBroken",
    "OtherBits",
    "RankLost",
    "RanksDiffer",
    "SessionBusy",
    "SessionClosed",
    "SessionWriteError",
    "StableEditError",
]


class StableEditError(Exception):
    """Base of all errors here.

    Attributes:
        report: where the error ended a stream of edits, the ``EditReport`` of the turns before it, which are applied;
            else None.
    """

    report: Any = None


class ModelBroken(StableEditError, ValueError):
    """The model answers NaN or infinity: a loss, a gradient, a logit or a drift is not a finite number."""


class DriftLimitReached(StableEditError, RuntimeError):
    """A stream of edits was stopped because the model would have drifted beyond the limit of the editor's guard; the
    turn in flight was taken back.

    Attributes:
        drift: mean drift that the last attempt would have led to, in nats.
    """

    def __init__(self, message: str, drift: float) -> None:
        super().__init__(message)
        self.drift = drift


class SessionBusy(StableEditError, ValueError):
    """Another process, or another object of this one, has the session open for writing."""


class SessionClosed(StableEditError, ValueError):
    """The session was closed; open it again."""


class DamagedJournal(StableEditError, ValueError):
    """Turns that were done are lost or cannot be trusted; going on without them needs a person's consent."""


class DamagedSnapshot(StableEditError, ValueError):
    """A snapshot cannot be used; an earlier one and the journal give the same state."""


class OtherBits(StableEditError, ValueError):
    """Doing the turns again gave another state than the one that was recorded."""


class RankLost(StableEditError, RuntimeError):
    """Of the processes that edit together one has gone, failed or did not answer in time. The turn in flight was
    dropped; the turns before it stand, where a session has written them down."""


class RanksDiffer(StableEditError, ValueError):
    """Processes that edit together have other requests, settings, models or weights than the first of them."""


class SessionWriteError(StableEditError, OSError):
    """The disk did not take something; what it was to record was taken back, and the session stands as before."""

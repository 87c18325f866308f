"""The answer to a model that drifts."""

from __future__ import annotations

from stableedit_cpp.editors.edit_report import EditReport

__all__ = ["DriftLimitReached"]


class DriftLimitReached(RuntimeError):
    """A stream of edits was stopped because the model would have drifted beyond the limit of the editor's guard; the
    turn in flight was taken back.

    Attributes:
        drift: mean drift that the last attempt would have led to, in nats.
        report: the turns before it, which are applied.
    """

    def __init__(self, message: str, drift: float) -> None:
        super().__init__(message)
        self.drift = drift
        self.report: EditReport | None = None

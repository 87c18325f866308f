"""Failures at every step of something, and signals at any moment of it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch

from stableedit_cpp.core import LifelongNormalizer, LowRankUpdate, MasterWeight, ModuleEditor, PastKeys
from stableedit_cpp.editors import turn as turns
from stableedit_cpp.editors import weights
from support.editors import assert_same_bits

# What a change goes through, one after the other.
STEPS = [
    (MasterWeight, "check"),
    (MasterWeight, "apply"),
    (LifelongNormalizer, "observe"),
    (LifelongNormalizer, "effective_mode"),
    (LifelongNormalizer, "normalize_value_gradients"),
    (PastKeys, "update"),
    (ModuleEditor, "compute_update"),
    (LowRankUpdate, "norm"),
    (turns, "capture"),
    (turns, "answer_scores"),
    (weights, "checksum"),
]
ERRORS = [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, OSError, torch.linalg.LinAlgError]


def everything(editor) -> dict[str, torch.Tensor]:
    """All that an edit may change, whiteners and past keys included; copies."""
    state = {f"model {name}": tensor for name, tensor in editor.model.state_dict().items()}
    for part, fields in editor.state_dict().items():
        state |= {f"{part} {name}": tensor for name, tensor in fields.items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


class Faults:
    """Counts the calls of ``STEPS``, and raises instead of one of them or right after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.at: float | None = None  # n: instead of call n; n + 0.5: after it
        for owner, name in STEPS:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, real: Callable) -> Callable:
        def call(*args, **how):
            number = self.calls
            self.calls += 1
            self._fail(number)
            result = real(*args, **how)
            self._fail(number + 0.5)
            return result

        return call

    def _fail(self, moment: float) -> None:
        if moment == self.at:
            raise ERRORS[int(2 * moment) % len(ERRORS)]("injected")

    def moments(self, action: Callable[[], object]) -> Iterator[float]:
        """Every moment at which ``action`` can fail; the caller puts back what it changes."""
        self.calls, self.at = 0, None
        action()
        for step in range(2 * self.calls):
            yield step / 2

    @contextlib.contextmanager
    def failing(self, moment: float) -> Iterator[None]:
        """Within this the action fails at that moment."""
        self.calls, self.at = 0, moment
        with pytest.raises(tuple(ERRORS), match="injected"):
            yield
        self.at = None


def fails_without_a_trace(editor, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Let an action fail at each of its steps: nothing has changed; and then it does what it would have done.

    Returns:
        At how many moments it was made to fail.
    """
    before, here = everything(editor), editor.checkpoint()
    with monkeypatch.context() as patch:
        faults = Faults(patch)
        moments = list(faults.moments(action))
        after = everything(editor)
        here.restore()
        assert_same_bits(everything(editor), before)
        for moment in moments:
            with faults.failing(moment):
                action()
            assert_same_bits(everything(editor), before)
    action()
    assert_same_bits(everything(editor), after)
    return len(moments)


class Alarm(BaseException):
    """What an application's handler raises."""


@contextlib.contextmanager
def alarms() -> Iterator[Callable[[float], None]]:
    """Within this SIGALRM raises Alarm, whatever runs; yields what sets it, in seconds from then on (0: never)."""

    def handler(_number, _frame) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def instants(seconds: float, count: int, seed: int = 0) -> list[float]:
    """Random instants of something that takes so long."""
    draw = Random(seed)
    return [draw.uniform(1e-6, seconds) for _ in range(count)]

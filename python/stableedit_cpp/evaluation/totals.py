"""Means of scores: of values that are there, or of as many as there may be, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Score", "Totals", "mean_and_error"]


class Score(NamedTuple):
    """
    Attributes:
        mean: over the requests that have the prompt for it; None where none has.
        standard_error: of the mean. scored, skipped: requests with and without the prompt.
    """

    mean: float | None
    standard_error: float | None
    scored: int
    skipped: int


class _Sum(NamedTuple):
    """Of some values: how many, their mean, and the sum of their squared distances from it."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __add__(self, values: Sequence[float]) -> _Sum:
        """With some more values (Chan, Golub and LeVeque 1983, the update for two samples)."""
        if not values:
            return self
        count, mean = len(values), math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        whole, apart = self.count + count, mean - self.mean
        between = apart**2 * self.count * count / whole
        return _Sum(whole, self.mean + apart * count / whole, self.squares + squares + between)


class Totals:
    """Adds up the records of requests, and keeps none of them.

    Attributes:
        requests: how many were added. broken: how many of them a broken model answered.

    Args:
        names: of the scores.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.requests = 0
        self.broken = 0
        self._sums = {name: _Sum() for name in names}

    def add(self, records: Sequence[Mapping[str, object]]) -> None:
        self.requests += len(records)
        self.broken += sum("broken" in record for record in records)
        for name, total in self._sums.items():
            self._sums[name] = total + [record[name] for record in records if record[name] is not None]

    def score(self, name: str) -> Score:
        """As ``mean_and_error`` has it, up to rounding."""
        count, mean, squares = self._sums[name]
        if not count:
            return Score(None, None, 0, self.requests)
        error = math.sqrt(squares / (count - 1) / count) if count > 1 else 0.0
        return Score(mean, error, count, self.requests - count)


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error (unbiased; 0 for a single value)."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))

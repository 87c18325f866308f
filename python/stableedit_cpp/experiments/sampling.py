"""Which of the edits so far are scored, and how old they are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

__all__ = ["age_bins", "sample_positions"]


def age_bins(edits: int, turn_size: int) -> list[tuple[int, int]]:
    """Ages of edits, youngest first, as ``[begin, end)``: the last turn, as much again, then twice as much each.

    The age of an edit is the number of edits since: 0 for the last.
    """
    edges = [0, turn_size]
    while edges[-1] < edits:
        edges.append(edges[-1] * 2)
    return [(begin, min(end, edits)) for begin, end in pairwise(edges) if begin < edits]


def sample_positions(begin: int, end: int, size: int | None, seed: int) -> list[int]:
    """``size`` positions of ``[begin, end)``, drawn without replacement; all of them for None.

    Every position of the stream has a fixed random rank and the lowest are taken. So the samples of a growing range
    overlap as far as they can: curves are smoother, and what a trunk cache keeps is used again.
    """
    if size is None or size >= end - begin:
        return list(range(begin, end))
    ranks = np.random.default_rng(seed).random(end)[begin:]  # the first numbers do not depend on how many are drawn
    return sorted((np.argpartition(ranks, size)[:size] + begin).tolist())

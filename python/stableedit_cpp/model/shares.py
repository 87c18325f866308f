"""Forward passes that are shared out among processes, and what the trunk cache keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from stableedit_cpp.model.ranks import ranks
from stableedit_cpp.model.tokens import TokenSequence, fixed_cost
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["shared_passes"]

_T = TypeVar("_T")


def shared_passes(
    label: str,
    run: Sequence[Sequence[int]],
    sequences: Sequence[TokenSequence],
    work: Callable[[Sequence[int]], _T],
    *,
    max_tokens: int,
    device: torch.device,
    trunk: TrunkCache | None = None,
    skip: int = 0,
    on_done: Callable[[Sequence[int]], object] | None = None,
) -> list[_T]:
    """What ``work`` makes of each batch, in order; where processes share, each runs some of the batches, and all have
    all of what came out, and of what the trunk cache keeps.

    Args:
        label: what the passes are for.
        run: indices of the sequences of each batch (``pack_apart``, called with the other arguments).
        skip: tokens at the head of each sequence that are left out.
        on_done: called with the batch when it is done.
    """
    group = ranks()

    def one(number: int) -> tuple[_T, dict]:
        chosen = [sequences[index] for index in run[number]]
        before = None if group.size == 1 or trunk is None else [one for one in chosen if one not in trunk]
        found = work(run[number])
        if on_done is not None:
            on_done(run[number])
            seen.add(number)
        return found, {} if before is None else trunk.states(before)

    if group.size > 1:
        group.serve(device)
    seen: set[int] = set()
    fixed = fixed_cost(max_tokens, device)
    costs = [len(batch) * (max(len(sequences[index]) for index in batch) - skip) + fixed for batch in run]
    kept_by_all = trunk is not None and group.size > 1
    try:
        done = group.shared(label, costs, one)
    except BaseException:
        if kept_by_all:
            trunk.clear()  # it may hold here what others do not
        raise
    if kept_by_all:
        trunk.take([kept for _, kept in done])
    if on_done is not None:
        for number in range(len(run)):
            if number not in seen:
                on_done(run[number])
    return [found for found, _ in done]

"""What turns need of their requests, made a few turns ahead on a thread while the model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.model.tokens import TokenSequence

__all__ = ["AHEAD", "PreparedTurn", "ahead", "prepared"]

AHEAD = 3  # turns
_T = TypeVar("_T")
_END = object()


class PreparedTurn(NamedTuple):
    """The requests of a turn, where they are in the stream, and their statements' tokens."""

    whole: slice
    requests: Sequence[EditRequest]
    sequences: list[TokenSequence]


def prepared(
    requests: Sequence[EditRequest],
    turns: Iterable[slice],
    tokenize: Callable[[Sequence[EditRequest], int], list[TokenSequence]],
) -> Iterator[PreparedTurn]:
    """Each turn when it is its turn.

    Args:
        tokenize: called with requests and the number of the first one in the stream.
    """
    for whole in turns:
        part = requests[whole]
        yield PreparedTurn(whole, part, tokenize(part, whole.start))


@contextmanager
def ahead(items: Iterator[_T], count: int) -> Iterator[Iterator[_T]]:
    """The same items, the next ``count`` of them made on a thread meanwhile.

    What the thread raises is raised here, behind the items before it. When the context ends, after an error or Ctrl-C,
    too, the item that is being made is the last.
    """
    with ThreadPoolExecutor(1, "stableedit-ahead") as pool:
        waiting = deque(pool.submit(next, items, _END) for _ in range(count))

        def in_order() -> Iterator[_T]:
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(pool.submit(next, items, _END))
                yield item

        try:
            yield in_order()
        finally:
            for one in waiting:
                one.cancel()

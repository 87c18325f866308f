"""Ids for requests that come without one, so that each can be found again, skipped, and taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Sequence
from hashlib import blake2b

from stableedit_cpp.data.request import EditRequest

__all__ = ["cut_at_contradictions", "with_ids"]


def with_ids(requests: Iterable[EditRequest], taken: Container[str] = ()) -> list[EditRequest]:
    """Name requests by a digest of prompt and target; the second of the same gets "-2", and so on.

    The names depend on the list alone, so that a file gives the same ones each time.

    Args:
        taken: names that must not be given again.
    """
    named: list[EditRequest] = []
    given = {request.id for request in requests if request.id is not None}
    for request in requests:
        if request.id is None:
            stem = "r-" + blake2b(f"{request.prompt}\0{request.target}".encode(), digest_size=6).hexdigest()
            name, number = stem, 1
            while name in given or name in taken:
                number += 1
                name = f"{stem}-{number}"
            given.add(name)
            request = dataclasses.replace(request, id=name)
        named.append(request)
    return named


def cut_at_contradictions(requests: Sequence[EditRequest], turn_size: int) -> list[list[EditRequest]]:
    """Cut a stream so that no turn holds two requests with one prompt: the later one has to see the earlier one done.

    Within each piece, turns are cut by size from its beginning.
    """
    pieces: list[list[EditRequest]] = [[]]
    turn: set[str] = set()
    for request in requests:
        if len(turn) == turn_size:
            turn = set()
        elif request.question in turn:
            turn = set()
            pieces.append([])
        turn.add(request.question)
        pieces[-1].append(request)
    return [piece for piece in pieces if piece]

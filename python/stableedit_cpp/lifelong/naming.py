"""Ids for requests that come without one, so that each can be found again, skipped, and taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from hashlib import blake2b

from stableedit_cpp.data.request import EditRequest

__all__ = ["asks_for", "with_ids"]


def with_ids(requests: Sequence[EditRequest], taken: Container[str] = ()) -> list[EditRequest]:
    """Name requests by a digest of prompt and target; the second of the same gets "-2", and so on.

    The names depend on the list alone, so that a file gives the same ones each time.

    Args:
        taken: names that must not be given again; a request that has one of them gets a number, too.
    """
    named: list[EditRequest] = []
    given = {request.id for request in requests if request.id is not None}
    for request in requests:
        stem = request.id
        if stem is None:
            stem = "r-" + blake2b(f"{request.prompt}\0{request.target}".encode(), digest_size=6).hexdigest()
        name, number = stem, 1
        while name in taken or (name in given and name != request.id):
            number += 1
            name = f"{stem}-{number}"
        given.add(name)
        named.append(request if name == request.id else dataclasses.replace(request, id=name))
    return named


def asks_for(request: EditRequest, edited: EditRequest) -> bool:
    """Whether a request asks for what was edited: the same answer to the same question, with the same variants, and, if
    it has an id, under that id, or under that with the number that ``with_ids`` gave it."""
    if request.question != edited.question or request.answers != edited.answers:
        return False
    stem, _dash, number = edited.id.rpartition("-")
    return request.id in (None, edited.id) or (request.id == stem and number.isdigit())

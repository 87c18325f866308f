"""Ids for requests that come without one, so that each can be found again, skipped, and taken back."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator, Sequence
from hashlib import blake2b

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.spool import Seen
from stableedit_cpp.data.statements import content_digest

__all__ = ["asks_for", "named", "with_ids"]


def with_ids(requests: Sequence[EditRequest], taken: Container[str] = ()) -> list[EditRequest]:
    """Name requests by a digest of prompt and target; the second of the same gets "-2", and so on.

    The names depend on the list alone, so that a file gives the same ones each time.

    Args:
        taken: names that must not be given again; a request that has one of them gets a number, too.
    """
    return list(named(requests, {request.id for request in requests if request.id is not None}, taken))


def named(requests: Iterable[EditRequest], given: set[str] | Seen, taken: Container[str]) -> Iterator[EditRequest]:
    """One after the other.

    Args:
        given: the ids that any of the requests have; names that are given are added. taken: see ``with_ids``.
    """
    for request in requests:
        stem = request.id
        if stem is None:
            stem = "r-" + blake2b(f"{request.prompt}\0{request.target}".encode(), digest_size=6).hexdigest()
        name, number = stem, 1
        while name in taken or (name in given and name != request.id):
            number += 1
            name = f"{stem}-{number}"
        given.add(name)
        yield request if name == request.id else _renamed(request, name)


def _renamed(request: EditRequest, name: str) -> EditRequest:
    """Not made anew, as ``dataclasses.replace`` does: it was checked when it was made."""
    found = copy.copy(request)
    object.__setattr__(found, "id", name)
    return found


def asks_for(request: EditRequest, id: str, content: bytes) -> bool:
    """Whether a request asks for what was edited under an id: the same answer to the same question, with the same
    variants (``content_digest``), and, if it has an id, under that id, or under that with the number that ``with_ids``
    gave it."""
    if content_digest(request) != content:
        return False
    stem, _dash, number = id.rpartition("-")
    return request.id in (None, id) or (request.id == stem and number.isdigit())

"""What requests state, as digests: enough to tell who takes a question from whom, in a fraction of the memory."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

from stableedit_cpp.data.request import EditRequest

__all__ = ["Statement", "content_digest", "digest", "statements_of", "takes", "without"]


class Statement(NamedTuple):
    """One question of a request with its answer.

    Attributes:
        question, answer: 16 bytes each, of the texts without white space around them.
        own: whether it is the request's own question, not that of a variant.
    """

    question: bytes
    own: bool
    answer: bytes


def digest(text: str) -> bytes:
    """16 bytes."""
    return blake2b(text.encode(), digest_size=16).digest()


def statements_of(request: EditRequest) -> list[Statement]:
    """Of each question that the request answers, its own first."""
    own = request.question
    return [
        Statement(digest(question), question == own, digest(answer)) for question, answer in request.answers.items()
    ]


def content_digest(request: EditRequest) -> bytes:
    """Equal for requests with the same question and the same answers, in whatever order their variants stand."""
    own, *rest = statements_of(request)
    whole = blake2b(own.question + own.answer, digest_size=16)
    for one in sorted(rest):
        whole.update(one.question + one.answer)
    return whole.digest()


def takes(later: Statement, earlier: Statement) -> bool:
    """``data.superseding.replaces`` for two statements of one question."""
    return later.answer != earlier.answer or (later.own and earlier.own)


def without(request: EditRequest, lost: Container[bytes]) -> EditRequest:
    """The request without the variants whose questions, as digests, are ``lost`` to others."""
    left = tuple(pair for pair in request.variants if digest(pair[0].strip()) not in lost)
    return request if len(left) == len(request.variants) else replace(request, variants=left)

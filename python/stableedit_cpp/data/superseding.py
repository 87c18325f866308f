"""Of several answers to one question the last is to hold: what that leaves of the requests before it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from stableedit_cpp.data.request import EditRequest

__all__ = ["current_part", "current_parts", "replaces", "warn_of_contradictions"]


def replaces(later: EditRequest, earlier: EditRequest, question: str) -> bool:
    """Whether a request takes a question from an earlier one, both of which ask it: where it answers otherwise, and
    where it is the prompt of both. What agrees stands side by side, the same consequence of two facts say."""
    return later.answers[question] != earlier.answers[question] or question == later.question == earlier.question


def current_parts(requests: Sequence[EditRequest]) -> dict[int, EditRequest]:
    """What is to hold of requests that were edited in this order, by index.

    A request whose prompt a later one takes, with its prompt or a variant, is not there: it is superseded. One of which
    a later request takes only variants stays, without these.
    """
    last = {question: request for request in requests for question in request.answers}
    return {index: part for index, request in enumerate(requests) if (part := current_part(request, last)) is not None}


def current_part(request: EditRequest, last: Mapping[str, EditRequest]) -> EditRequest | None:
    """What is to hold of a request; None if it is superseded.

    Args:
        last: the request that asked a question last, this one or a later, for each of its questions.
    """
    taken = {q for q in request.answers if last[q] is not request and replaces(last[q], request, q)}
    if request.question in taken:
        return None
    left = tuple(pair for pair in request.variants if pair[0].strip() not in taken)
    return request if len(left) == len(request.variants) else replace(request, variants=left)


def warn_of_contradictions(requests: Sequence[EditRequest]) -> None:
    """Say once how many requests give a question another answer than a request before them, which they replace."""
    answers: dict[str, str] = {}
    found: dict[int, tuple[str, str, str]] = {}
    for index, request in enumerate(requests):
        for question, target in request.answers.items():
            before = answers.get(question, target)
            if before != target:
                found.setdefault(index, (question, before, target))
            answers[question] = target
    if found:
        index, (question, before, target) = next(iter(found.items()))
        count = f"{len(found)} requests contradict" if len(found) > 1 else "one request contradicts"
        warnings.warn(
            f"{count} an earlier one of the same call, and the later wins; request {index} answers {question!r:.60} "
            f"with {target!r:.40} instead of {before!r:.40}",
            stacklevel=4,
        )

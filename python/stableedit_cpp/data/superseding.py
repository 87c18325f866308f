"""Of several answers to one question the last is to hold: what that leaves of the requests before it."""

from __future__ import annotations

import warnings
from collections.abc import Container, Sequence
from dataclasses import replace

from stableedit_cpp.data.request import EditRequest

__all__ = ["current_parts", "warn_of_contradictions", "without_questions"]


def current_parts(requests: Sequence[EditRequest]) -> dict[int, EditRequest]:
    """What is to hold of requests that were edited in this order, by index.

    A request whose prompt a later one asks, as its prompt or as a variant, is not there: it is superseded. One of which
    a later request asks only variants stays, without these.
    """
    last = {question: index for index, request in enumerate(requests) for question in request.answers}
    return {
        index: without_questions(request, {question for question in request.answers if last[question] != index})
        for index, request in enumerate(requests)
        if last[request.question] == index
    }


def without_questions(request: EditRequest, gone: Container[str]) -> EditRequest:
    """The request without the variants that ask one of these questions; itself where there is none."""
    left = tuple(pair for pair in request.variants if pair[0].strip() not in gone)
    return request if len(left) == len(request.variants) else replace(request, variants=left)


def warn_of_contradictions(requests: Sequence[EditRequest]) -> None:
    """Say once how many requests give a question another answer than a request before them, which they replace."""
    answers: dict[str, str] = {}
    found: dict[int, tuple[str, str, str]] = {}
    for index, request in enumerate(requests):
        for question, target in request.answers.items():
            before = answers.get(question, target)
            if before.strip() != target.strip():
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

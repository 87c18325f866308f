"""Of several answers to one question the last is to hold: what that leaves of the requests before it."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.spool import Spool
from stableedit_cpp.data.statements import digest, takes, without

__all__ = ["Current", "current_part", "current_parts", "replaces", "warn_of_contradictions"]


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
    found = _contradictions_on_disk(requests) if isinstance(requests, Spool) else _contradictions(requests)
    if found is not None:
        number, (index, question, before, target) = found
        count = f"{number} requests contradict" if number > 1 else "one request contradicts"
        warnings.warn(
            f"{count} an earlier one of the same call, and the later wins; request {index} answers {question!r:.60} "
            f"with {target!r:.40} instead of {before!r:.40}",
            stacklevel=4,
        )


def _contradictions(requests: Sequence[EditRequest]) -> tuple[int, tuple[int, str, str, str]] | None:
    """How many requests contradict an earlier one; of the first its index, the question, and both answers."""
    answers: dict[str, str] = {}
    found: dict[int, tuple[str, str, str]] = {}
    for index, request in enumerate(requests):
        for question, target in request.answers.items():
            before = answers.get(question, target)
            if before != target:
                found.setdefault(index, (question, before, target))
            answers[question] = target
    return (len(found), next((index, *what) for index, what in found.items())) if found else None


def _contradictions_on_disk(requests: Spool) -> tuple[int, tuple[int, str, str, str]] | None:
    """The same in constant memory."""
    marked = bytearray(len(requests))
    first: tuple[int, int, bytes] | None = None
    for group in requests.questions():
        for (before, one), (after, other) in pairwise(group):
            if one.answer != other.answer:
                marked[after] = 1
                if first is None or after < first[0]:
                    first = (after, before, other.question)
    if first is None:
        return None
    index, earlier, asked = first
    later = requests[index].answers
    question = next(text for text in later if digest(text) == asked)
    return sum(marked), (index, question, requests[earlier].answers[question], later[question])


class Current:
    """What is to hold of the requests of a stream on the disk, as ``current_parts`` says it of a list.

    Attributes:
        numbers: of the requests that are not superseded, in order.
    """

    def __init__(self, requests: Spool) -> None:
        self._requests = requests
        superseded = bytearray(len(requests))
        self._lost: dict[int, set[bytes]] = {}  # of requests that stay, variants that they have lost
        for group in requests.questions():
            last = group[-1][1]
            for number, statement in group[:-1]:
                if not takes(last, statement):
                    continue
                if statement.own:
                    superseded[number] = 1
                else:
                    self._lost.setdefault(number, set()).add(statement.question)
        self.numbers = array("Q", (number for number, gone in enumerate(superseded) if not gone))

    def parts(self, numbers: Sequence[int]) -> list[EditRequest]:
        """What is to hold of each of these."""
        return [self._part(number) for number in numbers]

    def _part(self, number: int) -> EditRequest:
        return without(self._requests[number], self._lost.get(number, ()))

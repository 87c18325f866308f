"""What a file of requests still asks for, after what was edited."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.spool import Seen, Spool
from stableedit_cpp.data.stream import as_stream
from stableedit_cpp.lifelong.index import Index
from stableedit_cpp.lifelong.naming import asks_for, named, with_ids

__all__ = ["pending", "renamed", "with_ids_on_disk"]


def pending(
    index: Index, requests: Iterable[EditRequest | Mapping[str, object]], known: Container[str], *, warm_up: bool
) -> Sequence[EditRequest]:
    """What is left of a file, as a list or, of a long one, on the disk.

    Question by question: what was edited last is compared with how the file's requests begin, and those that it ends
    with are done. So a file that contradicts itself goes on where it was, and what was reverted, or superseded by a
    request of another file, is asked for again.

    Args:
        index: of what was edited. known: ids that were used.
        warm_up: what was warmed up, instead.
    """
    requests = as_stream(requests)
    spool = requests if isinstance(requests, Spool) else Spool(("", request) for request in requests)
    left = bytearray(len(spool))
    for group in spool.questions():
        edited = _edited(index, group[0][1].question, warm_up)
        asked = [number for number, statement in group if statement.own]
        for number in asked[_done([one for one in edited if one[0]], spool, asked) :]:
            left[number] = 1
        number, last = group[-1]
        if not edited or edited[-1][1] != last.answer:  # what a variant of another file has replaced since
            left[number] = 1
    if spool is not requests:
        return with_ids([request for request, wanted in zip(requests, left, strict=True) if wanted], known)
    return with_ids_on_disk(spool, known, left)


def with_ids_on_disk(
    requests: Spool, taken: Container[str] = (), chosen: Sequence[int] | None = None
) -> Sequence[EditRequest]:
    """``with_ids`` for a long stream.

    Args:
        chosen: for each request, whether it is wanted; None takes all.
    """

    def wanted() -> Iterator[EditRequest]:
        return (r for number, r in enumerate(requests) if chosen is None or chosen[number])

    given, unnamed = Seen(), False
    for request in wanted():
        if request.id is None:
            unnamed = True
        else:
            given.add(request.id)
    if chosen is None and not unnamed:
        return requests
    return as_stream(Spool(("", request) for request in named(wanted(), given, taken)))


def renamed(requests: Sequence[EditRequest], left: Sequence[EditRequest]) -> list[str]:
    """Ids that requests of a file got in ``pending`` in the place of their own, which were used before."""
    ids, named = Seen() if isinstance(requests, Spool) else set(), False
    for request in requests:
        if request.id is not None:
            ids.add(request.id)
            named = True
    if not named:
        return []
    return [request.id for request in left if request.id not in ids and request.id.rpartition("-")[0] in ids]


def _edited(index: Index, question: bytes, warm_up: bool) -> list[tuple[bool, bytes, str, bytes]]:
    """What was edited about a question, the last at the end: whether as its own, the answer, the id, and the digest of
    the whole request."""
    query = (
        "SELECT own, answer, id, content FROM statements JOIN requests USING (number) "
        "WHERE question = ? AND statements.warm_up = ? AND gone_in IS NULL ORDER BY number"
    )
    return index.rows.execute(query, (question, int(warm_up))).fetchall()


def _done(edited: Sequence[tuple[bool, bytes, str, bytes]], spool: Spool, asked: Sequence[int]) -> int:
    """How many of the wanted requests, from the first on, are those that were edited last."""
    most = min(len(edited), len(asked))
    wanted = [spool[number] for number in asked[:most]]
    for count in range(most, 0, -1):
        if all(asks_for(one, id, content) for one, (*_, id, content) in zip(wanted, edited[-count:], strict=False)):
            return count
    return 0

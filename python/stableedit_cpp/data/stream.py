"""Requests as they come, a file, a generator, a list: checked as a whole, and in memory only while they are few."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import chain, islice
from os import PathLike
from pathlib import Path

from tqdm.auto import tqdm

from stableedit_cpp.data.formats import Format
from stableedit_cpp.data.frames import is_table
from stableedit_cpp.data.reading import placed_in
from stableedit_cpp.data.request import EditRequest, as_requests, checked
from stableedit_cpp.data.spool import Seen, Spool

__all__ = ["LISTED", "as_stream", "digest_of", "open_requests", "parts_of"]

LISTED = 10_000  # requests of a file or an iterator that are a list in memory; more are on the disk
_PART = 4096  # requests of a long stream that are worked on at a time


def open_requests(
    source: str | Path,
    limit: int | None = None,
    *,
    format: str | Format | Mapping[str, str] | None = None,
    seed: int = 0,
    variants: Sequence[str] = (),
    progress: bool | None = None,
) -> Sequence[EditRequest]:
    """The requests of a data set of any length, checked as a whole: a list of up to 10,000; more are read once, and
    kept in a temporary file (``TMPDIR``) that takes about twice the bytes of their texts.

    Args:
        progress: show a bar while a long one is read; None shows it on a terminal. The others: see ``iter_requests``.

    Returns:
        What ``edit``, ``warm_up``, ``evaluate``, ``audit`` and ``session.pending`` take.

    Raises: as ``read_requests``; OSError if the temporary file cannot be written.
    """
    seen = Seen()
    return _kept(placed_in(source, limit, seen, format=format, seed=seed, variants=variants), progress)


def as_stream(
    items: str | Path | Iterable[EditRequest | Mapping[str, object]], *, progress: bool | None = None
) -> Sequence[EditRequest]:
    """Any requests, checked as a whole: a sequence or a table as a list, a ``Path`` as ``open_requests``, and so any
    other iterable, which is read once, to its end.

    Raises:
        ValueError: naming the item that is wrong, or the id that occurs twice. Others: as ``open_requests``.
    """
    if isinstance(items, Spool):
        return items
    if isinstance(items, PathLike):
        return open_requests(items, progress=progress)
    if isinstance(items, (Sequence, Mapping, EditRequest)) or is_table(items):
        return as_requests(items)
    return _kept(checked(items, Seen()), progress)


def parts_of(requests: Sequence[EditRequest]) -> Iterator[tuple[int, Sequence[EditRequest]]]:
    """A list as a whole, and a long stream in parts; each with the number of its first request.

    What a part took is given back before the next one, so that resident memory does not grow along a stream.
    """
    if not isinstance(requests, Spool):
        yield 0, requests
        return
    from stableedit_cpp.files.environment import give_back_freed  # which loads torch; --help reads requests' formats

    for begin in range(0, len(requests), _PART):
        yield begin, requests[begin : begin + _PART]
        give_back_freed()


def digest_of(requests: Iterable[EditRequest]) -> str:
    """Of all that requests say, in their order: 32 hexadecimal digits."""
    digest = blake2b(digest_size=16)
    for request in requests:
        digest.update(repr(sorted(vars(request).items())).encode())
    return digest.hexdigest()


def _kept(placed: Iterator[tuple[str, EditRequest]], progress: bool | None) -> Sequence[EditRequest]:
    first = list(islice(placed, LISTED + 1))
    if len(first) <= LISTED:
        return [request for _, request in first]
    shown = None if progress is None else not progress
    return Spool(tqdm(chain(first, placed), desc="Reading", unit="request", disable=shown))

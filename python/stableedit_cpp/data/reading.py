"""From a data set to edit requests: one by one in constant memory, or as a list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path

from stableedit_cpp.data.file_types import read_records
from stableedit_cpp.data.formats import Format, choose_format, detect
from stableedit_cpp.data.frames import rows_of
from stableedit_cpp.data.hub import HUB_PREFIX, read_hub_records
from stableedit_cpp.data.names import with_known_names
from stableedit_cpp.data.nested import expand
from stableedit_cpp.data.notes import Notes
from stableedit_cpp.data.request import EditRequest, requests_of
from stableedit_cpp.data.variants import check_movable

__all__ = ["format_of_training", "iter_requests", "name_of", "placed_in", "read_requests", "source_records"]


def source_records(source: object, notes: Notes | None = None) -> Iterator[tuple[str, dict[str, object]]]:
    """``(place, record)`` for each record of a file, of a hub data set, or of a table in memory."""
    if not isinstance(source, (str, PathLike)):
        rows = rows_of(source)
        if rows is source:
            raise ValueError(f"a data set is a file, hub:NAME or a DataFrame, not {type(source).__name__}")
        return ((f"row {index}", row) for index, row in enumerate(rows))
    return read_hub_records(source) if str(source).startswith(HUB_PREFIX) else read_records(source, notes)


def iter_requests(
    source: str | Path,
    limit: int | None = None,
    *,
    format: str | Format | Mapping[str, str] | None = None,
    seed: int = 0,
    variants: Sequence[str] = (),
) -> Iterator[EditRequest]:
    """Yield edit requests in constant memory, however large the data set is.

    Nothing is kept of what was yielded, so ids are not compared with each other; ``read_requests`` does that.

    Args:
        source: a file (see ``read_records``), a hub name (see ``read_hub_records``) or a DataFrame.
        limit: read at most this many records.
        format: name of a published format, or a mapping from the fields of EditRequest to those of the records; None
            tells the format from the first record.
        seed: for formats with several rephrased prompts, of which one is drawn.
        variants: questions of the data set that are to be edited with their requests, of "rephrase", "persona" and
            "multi_hop": they become ``EditRequest.variants``, and are no longer there to be scored.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as the operating system says, with the path.
        ValueError: for a file that is empty, damaged or lacks a field; with the file, the record and its fields.
    """
    for _, request in _placed_requests(source, limit, choose_format(format), seed, check_movable(variants)):
        yield request


def read_requests(
    source: str | Path,
    limit: int | None = None,
    *,
    format: str | Format | Mapping[str, str] | None = None,
    seed: int = 0,
    variants: Sequence[str] = (),
) -> list[EditRequest]:
    """The requests of ``iter_requests`` as a list, checked as a whole.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as the operating system says, with the path.
        ValueError: as ``iter_requests``; also for an id that occurs twice.
    """
    return [request for _, request in placed_in(source, limit, {}, format=format, seed=seed, variants=variants)]


def placed_in(
    source: str | Path,
    limit: int | None,
    seen: MutableMapping[str, str],
    *,
    format: str | Format | Mapping[str, str] | None = None,
    seed: int = 0,
    variants: Sequence[str] = (),
) -> Iterator[tuple[str, EditRequest]]:
    """``("FILE, line 3", request)`` for each request of a data set.

    Args:
        seen: takes where each id was first seen. The others, and what is raised: as ``read_requests``.
    """
    whose = name_of(source)
    for place, request in _placed_requests(source, limit, choose_format(format), seed, check_movable(variants)):
        if request.id is not None:
            earlier = seen.get(request.id)
            if earlier is not None:
                raise ValueError(f"{whose}, {place}: the id {request.id!r} was used before, in {earlier}")
            seen[request.id] = place
        yield f"{whose}, {place}", request


def _placed_requests(
    source: str | Path, limit: int | None, format_: Format | None, seed: int, variants: Sequence[str]
) -> Iterator[tuple[str, EditRequest]]:
    nothing, notes = True, Notes(whose := name_of(source))
    for place, record in islice(source_records(source, notes), limit):
        try:
            # One format for the whole file: a ZsRE record without its answer would else pass for one of WikiFactDiff.
            format_ = format_ or detect(expand(record)[0])
            found = requests_of(record, format_, seed, variants, notes)
        except ValueError as error:
            raise ValueError(f"{whose}, {place}: {error}") from None
        nothing = False
        for request in found:
            yield place, request
    notes.say()
    if nothing:
        raise ValueError(f"{whose} holds no edit requests")


def format_of_training(
    source: str | Path, format: str | Format | Mapping[str, str] | None
) -> str | Format | Mapping[str, str] | None:
    """The format of a training stream that goes with a stream of the given format: the same where its first record has
    the fields for it, else None, which tells it from that record.

    Raises: as ``iter_requests``.
    """
    chosen = choose_format(format)
    _, record = next(source_records(source, Notes()), ("", None))
    if chosen is None or record is None or chosen.fits(with_known_names(expand(record)[0], chosen.names)):
        return format
    return None


def name_of(source: object) -> str:
    """What messages call a data set."""
    return str(source) if isinstance(source, (str, PathLike)) else f"the {type(source).__name__}"

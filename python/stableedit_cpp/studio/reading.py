"""From what was typed or dropped to edit requests, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from stableedit_cpp.data import read_requests
from stableedit_cpp.data.formats import detect
from stableedit_cpp.data.nested import expand
from stableedit_cpp.data.notes import Notes
from stableedit_cpp.data.reading import source_records
from stableedit_cpp.data.request import EditRequest, requests_of

__all__ = ["read_fact", "read_file"]

_NAMED = 5  # bad records whose reason is said


def read_fact(prompt: str, target: str, subject: str = "", paraphrases: str = "") -> EditRequest:
    """The request of a form.

    Args:
        paraphrases: one a line.

    Raises:
        ValueError: as ``EditRequest``.
    """
    variants = [line.strip() for line in paraphrases.splitlines() if line.strip()]
    return EditRequest(prompt.strip(), target.strip(), subject=subject.strip() or None, variants=variants or None)


def read_file(path: str | Path, check: Callable[[Sequence[EditRequest]], object]) -> list[EditRequest]:
    """The requests of a file.

    Args:
        check: raises ValueError for requests that cannot be edited.

    Raises:
        ValueError: for a bad file, with the numbers of all records that are bad, and why the first of them are.
    """
    try:
        requests = read_requests(path)
        check(requests)
    except ValueError as error:
        bad = _bad_records(path, check)
        if not bad:
            raise
        rest = list(bad)[_NAMED:]
        said = [f"{place}: {reason}" for place, reason in list(bad.items())[:_NAMED]]
        said += [f"also {', '.join(rest)}"] if rest else []
        what = "a record" if len(bad) == 1 else f"{len(bad)} records"
        raise ValueError(f"{Path(path).name}: nothing is edited, because of {what}: {'; '.join(said)}") from error
    return requests


def _bad_records(path: str | Path, check: Callable[[Sequence[EditRequest]], object]) -> dict[str, str]:
    """Place and reason of each bad record; none where the file breaks off before its end, whose error says more."""
    bad, notes, format_ = {}, Notes(), None
    try:
        for place, record in source_records(path, notes):
            try:
                format_ = format_ or detect(expand(record)[0])
                check(requests_of(record, format_, notes=notes))
            except ValueError as error:
                bad[place] = str(error)
    except ValueError:
        return {}
    return bad

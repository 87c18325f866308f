"""What is in a data set: its format, its first requests, and which fields its records lack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from stableedit_cpp.data.formats import Format, choose_format, detect
from stableedit_cpp.data.nested import expand
from stableedit_cpp.data.reading import source_records
from stableedit_cpp.data.request import EditRequest, requests_of
from stableedit_cpp.data.variants import check_movable

__all__ = ["Description", "describe"]

_CHEAP = 64 * 2**20  # bytes of a file that is read to its end without being asked for


@dataclass(frozen=True)
class Description:
    """A data set at a glance; ``str()`` is for people.

    Attributes:
        source: file or hub name. format: as found or given.
        records: how many were read. complete: these are all there are.
        filled: by field of EditRequest, how many of them fill it. first: the first requests.
        unused: fields of the first record that make up no part of a request.
    """

    source: str
    format: Format
    records: int
    complete: bool
    filled: dict[str, int]
    first: list[EditRequest]
    unused: list[str]

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        format_ = {"format": self.format.name, "fields": dict(self.format.fields)}
        rest = {"filled": self.filled, "unused": self.unused, "first": [one.to_dict() for one in self.first]}
        return {"source": self.source, **format_, "records": self.records, "complete": self.complete, **rest}

    def __str__(self) -> str:
        counted = f"{self.records:,}" if self.complete else f"the first {self.records:,} of more; --count reads all"
        lines = [self.source, f"format   {self.format.name}", f"records  {counted}", ""]
        lines.append(f"{'field of a request':<20}{'field of a record':<24}filled in")
        moved = {} if "variants" in self.format.fields or "variants" not in self.filled else {"variants": "(see below)"}
        for name, own in {**self.format.fields, **moved}.items():
            count = self.filled.get(name, 0)
            lacking = f", missing in {self.records - count:,}" if count < self.records else ""
            lines.append(f"{name:<20}{own:<24}{count:,}{lacking}")
        if self.unused:
            lines.append(f"not used: {', '.join(self.unused)}")
        for index, request in enumerate(self.first):
            lines += ["", f"request {index}"]
            own = request.to_dict() | {"variants": None}
            lines += [f"  {name:<18}{value}" for name, value in own.items() if value is not None]
            lines += [f"  {'variant':<18}{prompt} -> {target}" for prompt, target in request.variants]
        return "\n".join(lines)


def describe(
    source: str | Path,
    *,
    first: int = 3,
    format: str | Format | Mapping[str, str] | None = None,
    seed: int = 0,
    variants: Sequence[str] = (),
    count: bool | None = None,
    progress: bool | None = None,
) -> Description:
    """Look into a data set.

    Args:
        source, format, seed, variants: as for ``iter_requests``.
        first: how many requests to keep.
        count: read to the end; None does so for files up to 64 MB.
        progress: show a bar; None shows it on a terminal.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError, ValueError: as ``iter_requests``.
    """
    if count is None:
        count = Path(source).is_file() and Path(source).stat().st_size <= _CHEAP
    chosen, variants = choose_format(format), check_movable(variants)
    filled: Counter[str] = Counter()
    kept: list[EditRequest] = []
    unused: list[str] = []
    records, complete = 0, True
    bar = tqdm(desc="Reading", unit="record", leave=False, disable=None if progress is None else not progress)
    with bar:
        for place, record in source_records(source):
            if not count and records == max(first, 1):
                complete = False
                break
            try:
                chosen = chosen or detect(expand(record)[0])
                found = requests_of(record, chosen, seed, variants)
            except ValueError as error:
                raise ValueError(f"{source}, {place}: {error}") from None
            if records == 0:
                unused = chosen.unused(record)
            for request in found:
                if records < first:
                    kept.append(request)
                filled.update(name for name, value in request.to_dict().items() if value)
                records += 1
            bar.update()
    if records == 0 or chosen is None:
        raise ValueError(f"{source} holds no edit requests")
    return Description(str(source), chosen, records, complete, dict(filled), kept, unused)

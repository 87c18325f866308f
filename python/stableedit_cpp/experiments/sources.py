"""Where the streams of an experiment come from: data sets by name, file or hub name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

from tqdm.auto import tqdm

from stableedit_cpp.data import iter_requests
from stableedit_cpp.data.file_types import SUFFIXES
from stableedit_cpp.data.hub import HUB_PREFIX
from stableedit_cpp.data.reading import format_of_training
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.variants import check_movable
from stableedit_cpp.files.words import with_nearest

__all__ = ["DATASETS", "Source", "find_source"]

DATASETS = ("zsre", "fever", "wikibigedit", "ultraeditbench", "counterfact", "wikifactdiff", "entityquestions")


@dataclass(frozen=True)
class Source:
    """A stream of edit requests and the training stream for its warm-up. It is read anew whenever it is needed, so
    its length costs no memory.

    Attributes:
        name: what tables call it.
        edits, warm_up: file or hub name; there need not be a training stream.
        format: as for ``iter_requests``; of the training stream only where it fits.
        seed: of the choice among paraphrases, and of the shuffle.
        shuffle: records in the shuffle's buffer; 0 keeps the order of the file.
        variants: questions that are edited with their requests, as for ``iter_requests``; those of the warm-up, too.
    """

    name: str
    edits: str
    warm_up: str | None = None
    format: str | Mapping[str, str] | None = None
    seed: int = 0
    shuffle: int = 0
    variants: tuple[str, ...] = ()

    def requests(self, begin: int = 0, end: int | None = None) -> Iterator[EditRequest]:
        """Those of the stream from one position to another. Their ids are their positions in the stream."""
        stream = iter_requests(self.edits, **self._reading)
        for index, request in enumerate(islice(shuffled(stream, self.shuffle, self.seed), begin, end), begin):
            yield replace(request, id=str(index))  # ids of a data set need not be unique

    def warm_up_requests(self, begin: int = 0, end: int | None = None) -> Iterator[EditRequest]:
        how = {**self._reading, "format": format_of_training(self.warm_up, self.format)}
        stream = iter_requests(self.warm_up, **how)
        for index, request in enumerate(islice(stream, begin, end), begin):
            yield replace(request, id=f"warm-up {index}")

    @property
    def _reading(self) -> dict[str, object]:
        return {"format": self.format, "seed": self.seed, "variants": self.variants}

    def pick(self, positions: list[int]) -> list[EditRequest]:
        """The requests at some positions, in order, from one reading of the stream."""
        wanted = set(positions)
        return [
            request for index, request in enumerate(self.requests(end=max(wanted, default=-1) + 1)) if index in wanted
        ]

    def count(self, limit: int | None, *, progress: bool | None = None) -> int:
        """How many requests there are, up to ``limit``. All of them are looked at.

        Raises:
            OSError, ValueError: as ``iter_requests``, for whatever is wrong with any record.
        """
        stream = iter_requests(self.edits, limit, **self._reading)
        disable = None if progress is None else not progress
        return sum(1 for _ in tqdm(stream, f"Reading {self.name}", limit, unit="record", leave=False, disable=disable))


def find_source(
    dataset: str,
    *,
    data: str | Path | None = None,
    warm_up: str | None = None,
    format: str | Mapping[str, str] | None = None,
    seed: int = 0,
    shuffle: int = 0,
    variants: Sequence[str] = (),
) -> Source:
    """A data set by name, file or hub name.

    Args:
        dataset: a file, ``hub:OWNER/NAME[:SPLIT]``, or the name of a directory of ``data``. Of the files there the one
            with "train" in its name is the training stream; the other is the stream.
        data: directory of data sets.
        warm_up: file or hub name of the training stream; None takes the one found.
        format, seed, shuffle, variants: see ``Source``.

    Raises:
        ValueError: for a name that is not known (with the list, and the nearest), or a directory in which it cannot
            be told which file is which. FileNotFoundError: for a file that is not there.
    """
    settings = {"format": format, "seed": seed, "shuffle": shuffle, "variants": check_movable(variants)}
    if warm_up is not None:
        _check_there(warm_up)
    if _is_file_name(dataset):
        _check_there(dataset)
        name = dataset.removeprefix(HUB_PREFIX).rsplit("/", 1)[-1].split(".")[0].split(":")[0]
        return Source(name, dataset, warm_up, **settings)
    found = [path for path in sorted(Path(data).iterdir()) if path.is_dir()] if data and Path(data).is_dir() else []
    known = [*DATASETS, *(path.name for path in found if path.name not in DATASETS)]
    if dataset not in known:
        raise ValueError(f"unknown data set {with_nearest(dataset, known)}; or a file, or hub:OWNER/NAME")
    if data is None:
        raise ValueError(f"the data set {dataset!r} is looked for in a directory of data sets: give --data DIR")
    directory = Path(data) / dataset
    if not directory.is_dir():
        raise ValueError(f"there is no directory {directory} with the files of the data set {dataset!r}")
    files = [path for path in sorted(directory.iterdir()) if _is_file_name(path.name)]
    training = [path for path in files if "train" in path.name]
    streams = [path for path in files if path not in training]
    if len(streams) != 1 or len(training) > 1:
        raise ValueError(
            f"{directory} must hold one file for the stream and at most one with 'train' in its name, not "
            f"{', '.join(path.name for path in files) or 'none'}; name the files instead"
        )
    return Source(dataset, str(streams[0]), warm_up or (str(training[0]) if training else None), **settings)


def shuffled(requests: Iterator[EditRequest], buffer: int, seed: int) -> Iterator[EditRequest]:
    """Draw the next from a buffer of so many, which is filled up again from the stream."""
    if buffer <= 1:
        yield from requests
        return
    draw = Random(seed)
    held = list(islice(requests, buffer))
    for request in requests:
        place = draw.randrange(buffer)
        held[place], request = request, held[place]
        yield request
    draw.shuffle(held)
    yield from held


def _is_file_name(text: str) -> bool:
    suffixes = [suffix.lower() for suffix in Path(text).suffixes if suffix.lower() != ".gz"]
    return text.startswith(HUB_PREFIX) or "/" in text or bool(suffixes and suffixes[-1] in SUFFIXES)


def _check_there(source: str) -> None:
    if not source.startswith(HUB_PREFIX) and not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source}")

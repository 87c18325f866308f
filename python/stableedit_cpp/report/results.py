"""Reads what ``stableedit bench`` has written: run directories, and the theory computed from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean

__all__ = ["Group", "Results", "Run", "read_results", "thinned"]

_RUN, _THEORY = "stableedit-bench-run", "stableedit-bench-theory"
_VERSION = 1
_POINTS = 100  # more turns than this are averaged over: nobody could see them apart
_NEEDED = ("name", "status", "settings.editor", "settings.dataset", "settings.model", "settings.seed")
_NEEDED += ("settings.data.edits", "settings.config", "provenance", "checkpoints", "cost")


@dataclass
class Run:
    """One run directory.

    Attributes:
        document: ``run.json``. turns: the lines of ``turns.jsonl``. label: its name among the runs of its group.
    """

    path: Path
    document: dict
    turns: list[dict]
    label: str = ""

    @property
    def settings(self) -> dict:
        return self.document["settings"]

    @property
    def checkpoints(self) -> list[dict]:
        return self.document["checkpoints"]

    @property
    def last(self) -> dict:
        return self.checkpoints[-1]

    @property
    def unedited(self) -> dict | None:
        """The checkpoint before the first edit."""
        return next((found for found in self.checkpoints if found["edits"] == 0 and not found.get("warm_up")), None)

    @property
    def finished(self) -> bool:
        return self.document["status"] == "done"

    def side_effects(self, part: str) -> list[tuple[int, dict]]:
        """``(edits, figures)`` of each checkpoint where a part of the side effects was measured."""
        found = ((checkpoint["edits"], (checkpoint.get("side_effects") or {})) for checkpoint in self.checkpoints)
        return [(edits, effects[part]) for edits, effects in found if effects.get(part)]

    @cached_property
    def geometry(self) -> list[dict]:
        """Of the turns that have it: its fields and ``position``, the edits up to there, warm-up included."""
        turns = [turn for turn in self.turns if turn.get("geometry")]
        return [{"position": turn["edits"] + turn["warm_up"], **turn["geometry"]} for turn in turns]


@dataclass
class Group:
    """Runs that can be compared: one data set, one model."""

    dataset: str
    model: str
    runs: list[Run] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.dataset}, {self.model}"

    def lines(self, points_of: Callable[[Run], list[tuple]]) -> list[tuple[int, Run, list[tuple]]]:
        """(place, run, points) of the runs that have points; the place among all runs decides how its line looks."""
        found = ((index, run, points_of(run)) for index, run in enumerate(self.runs))
        return [line for line in found if line[2]]


@dataclass
class Results:
    groups: list[Group]
    theories: list[tuple[Path, dict]]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]


def read_results(paths: Iterable[str | Path]) -> Results:
    """Find the runs, and theory files, in directories and below them.

    Raises:
        ValueError: for a path that is no directory or holds no results, and for a file that is damaged, lacks something
            or comes from a newer version.
    """
    runs, theories = [], []
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path} is not a directory; expected one that stableedit bench has written")
        found = _below(path, "run.json")
        others = _below(path, "theory.json")
        if not found and not others:
            raise ValueError(f"{path} holds no results: there is no run.json and no theory.json in it or below it")
        runs += [_read_run(file) for file in found]
        theories += [(file.parent, _read(file, _THEORY, ("runs",))) for file in others]
    unique = {run.path.resolve(): run for run in runs}
    return Results(_grouped(list(unique.values())), list({path.resolve(): (path, t) for path, t in theories}.values()))


def _below(path: Path, name: str) -> list[Path]:
    """Not in hidden directories: there results are only being written."""
    found = sorted(path.rglob(name))
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _read_run(path: Path) -> Run:
    document = _read(path, _RUN, _NEEDED)
    if not document["checkpoints"]:
        raise ValueError(f"{path}: the run has no checkpoint yet; wait for the first one")
    for number, checkpoint in enumerate(document["checkpoints"]):
        missing = [name for name in ("edits", "scores") if name not in checkpoint]
        if missing:
            raise ValueError(f"{path}: checkpoint {number} lacks {', '.join(missing)}")
    return Run(path.parent, document, _read_turns(path.parent / "turns.jsonl", document["status"] == "done"))


def _read(path: Path, format_: str, needed: tuple[str, ...]) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != format_:
        raise ValueError(f"{path} is not of the format {format_!r} that stableedit bench writes")
    if document.get("version") != _VERSION:
        raise ValueError(f"{path} has version {document.get('version')!r}; this stableedit reads version {_VERSION}")
    for name in needed:
        value: object = document
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"{path} lacks {name}")
            value = value[part]
    return document


def _read_turns(path: Path, finished: bool) -> list[dict]:
    if not path.exists():
        return []
    turns = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            turns.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) and not finished:  # being written, or cut off by a kill: resuming drops it too
                break
            raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
    return turns


def _grouped(runs: list[Run]) -> list[Group]:
    groups: dict[tuple[str, str], Group] = {}
    for run in sorted(runs, key=lambda run: [run.settings[name] for name in ("dataset", "model", "editor", "seed")]):
        key = (run.settings["dataset"], run.settings["model"])
        groups.setdefault(key, Group(*key)).runs.append(run)
    for group in groups.values():
        _label(group.runs)
    return list(groups.values())


def _label(runs: list[Run]) -> None:
    """The editor's name, and more only where that does not tell runs apart."""
    ways = (
        lambda run: run.settings["editor"],
        lambda run: f"{run.settings['editor']}, seed {run.settings['seed']}",
        lambda run: run.document["name"],
        lambda run: str(run.path),
    )
    for run in runs:
        for way in ways:
            run.label = way(run)
            if sum(way(other) == run.label for other in runs) == 1:
                break


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most ``_POINTS`` points: means over stretches of the stream, each placed at its end."""
    size = max(1, -(-len(points) // _POINTS))
    chunks = [points[begin : begin + size] for begin in range(0, len(points), size)]
    return [(chunk[-1][0], fmean(y for _, y in chunk)) for chunk in chunks]

"""Runs that can be compared, and what to call each among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from stableedit_cpp.experiments.results import Run

__all__ = ["Group", "grouped"]


@dataclass
class Group:
    """Runs of one data set and one model."""

    dataset: str
    model: str
    runs: list[Run] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.dataset}, {self.model}"

    @property
    def checkpoints(self) -> list[dict]:
        """Those of all runs."""
        return [checkpoint for run in self.runs for checkpoint in run.checkpoints]

    def lines(self, points_of: Callable[[Run], list[tuple]]) -> list[tuple[int, Run, list[tuple]]]:
        """(place, run, points) of the runs that have points; the place among all runs decides how its line looks."""
        found = ((index, run, points_of(run)) for index, run in enumerate(self.runs))
        return [line for line in found if line[2]]


def grouped(runs: Iterable[Run]) -> list[Group]:
    """In the order of the runs, whose labels it sets."""
    groups: dict[tuple[str, str], Group] = {}
    for run in runs:
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
        lambda run: f"{run.settings['editor']} in {run.path.parent.name}",
        lambda run: run.document["name"],
        lambda run: str(run.path),
    )
    for run in runs:
        for way in ways:
            run.label = way(run)
            if sum(way(other) == run.label for other in runs) == 1:
                break

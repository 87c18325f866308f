"""Editors x data sets x models x seeds, from a mapping as YAML or the command line gives it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from stableedit_cpp import sideeffects
from stableedit_cpp.editors import NamedEditor, named_editor
from stableedit_cpp.evaluation import DEFAULT_METRICS
from stableedit_cpp.experiments.after_stream import Step
from stableedit_cpp.experiments.search_settings import SearchSettings
from stableedit_cpp.experiments.settings import RunSettings, WarmUp
from stableedit_cpp.experiments.sources import Source, find_source
from stableedit_cpp.files.words import check_whole, with_nearest

__all__ = ["Matrix", "read_yaml"]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What to run; every combination is one run.

    Attributes:
        editors: names of ``EDITORS``, config files, or mappings with "name", "editor", "after", "search" (fields of the
            config, each with a list of values to try before the stream) and fields of a config.
        datasets: names, files or hub names, or mappings with "name", "edits", "warm_up", "format" or "fields".
        data: directory of data sets, for their names. warm_up_data: training stream for all of them.
        models, dtype: as for ``load_model``.
        seeds: of the choice among paraphrases, the shuffle and the samples.
        edits: length of the stream; None takes the whole data set.
        warm_up, warm_up_size: where in the stream, and how many.
        checkpoints: how many, evenly spaced. checkpoint_at: after how many edits, instead.
        editor_options: fields of the config of every editor, e.g. turn_size.
        format, shuffle, variants: as for ``find_source``.
        after: steps after the stream, as for ``Step.parse``, of every editor that has none of its own.
        search: "edits" and "score" of all searches (``SearchSettings``).

    All other fields are those of ``RunSettings``.

    Raises:
        ValueError: for a value that cannot be, with what could.
    """

    editors: list = field(default_factory=lambda: ["stableedit"])
    datasets: list = field(default_factory=list)
    models: list = field(default_factory=list)
    seeds: list = field(default_factory=lambda: [0])
    data: str | None = None
    warm_up_data: str | None = None
    format: str | Mapping[str, str] | None = None
    dtype: str = "auto"
    edits: int | None = None
    shuffle: int = 0
    variants: list = field(default_factory=list)
    warm_up: str = "start"
    warm_up_size: int = 500
    checkpoints: int = 5
    checkpoint_at: list | None = None
    sample: int | None = None
    age_sample: int = 100
    metrics: list = field(default_factory=lambda: [*DEFAULT_METRICS, "locality"])
    side_effects: Mapping[str, object] | None = None
    geometry: int = 4
    cumulative: int = 0
    convergence: bool = False
    after: list = field(default_factory=list)
    search: Mapping[str, object] = field(default_factory=dict)
    editor_options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("editors", "datasets", "models", "seeds", "metrics"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not value:
                option = "--metrics" if name == "metrics" else f"--{name.removesuffix('s')}"
                raise ValueError(f"{name} must be a list with at least one entry ({option}), not {value!r}")
        wholes = {"edits": 1, "shuffle": 0, "checkpoints": 1, "sample": 1, "age_sample": 1, "geometry": 0}
        for name, least in {**wholes, "cumulative": 0}.items():
            check_whole(name, getattr(self, name), least, none=name in ("edits", "sample"))
        for value in self.checkpoint_at or []:
            check_whole("checkpoint_at", value)
        for value in self.seeds:
            check_whole("seeds", value, 0)
        if self.side_effects is not None:
            _check_side_effects(self.side_effects)

    @classmethod
    def from_mapping(cls, content: Mapping[str, object]) -> Matrix:
        """Raises ValueError for an unknown key, with the nearest; otherwise as the class."""
        known = [one.name for one in fields(cls)]
        content = {str(key).replace("-", "_"): value for key, value in content.items()}
        for key in content:
            if key not in known:
                raise ValueError(f"unknown setting {with_nearest(key, known)}")
        return cls(**content)

    def runs(self, *, progress: bool | None = None) -> list[RunSettings]:
        """All combinations; reads every data set once, so whatever is wrong with its records is found here.

        Raises:
            OSError, ValueError: as ``named_editor``, ``find_source`` and ``iter_requests``; also for two runs of one
                name.
        """
        editors = [self._editor(item) for item in self.editors]
        warm_up = WarmUp(self.warm_up, self.warm_up_size)
        found = []
        for item in self.datasets:
            for seed in self.seeds:
                source = self._source(item, seed)
                total = self._length(source, progress)
                if warm_up and source.warm_up is not None and any(editor.warm_up for editor, _, _ in editors):
                    _check_warm_up(source, warm_up)
                for model in self.models:
                    found += [self._run(source, model, total, warm_up, *editor) for editor in editors]
        names = [run.name for run in found]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two runs would be called {name}; give the editors names of their own, with 'name:'")
        return found

    def _run(
        self,
        source: Source,
        model: str,
        total: int,
        warm_up: WarmUp,
        editor: NamedEditor,
        after: tuple[Step, ...],
        search: SearchSettings | None,
    ) -> RunSettings:
        return RunSettings(
            editor=editor,
            model=str(model),
            dtype=self.dtype,
            source=source,
            edits=total,
            warm_up=warm_up,
            checkpoints=self._checkpoints(total, editor.config.turn_size),
            sample=self.sample,
            age_sample=self.age_sample,
            metrics=tuple(self.metrics),
            side_effects=self.side_effects,
            geometry=self.geometry,
            cumulative=self.cumulative,
            convergence=self.convergence,
            after=after,
            search=search,
        )

    def _checkpoints(self, total: int, turn_size: int) -> tuple[int, ...]:
        """At the ends of turns; the last at the end of the stream."""
        wanted = self.checkpoint_at or [total * number // self.checkpoints for number in range(1, self.checkpoints + 1)]
        ends = {min(-(-edits // turn_size) * turn_size, total) for edits in wanted if edits > 0}
        return tuple(sorted(ends | {total}))

    def _editor(self, item: str | Mapping[str, object]) -> tuple[NamedEditor, tuple[Step, ...], SearchSettings | None]:
        """The editor, what it does after its stream, and what is searched for before."""
        if isinstance(item, str):
            return named_editor(item, self.editor_options), _steps(self.after), None
        own = _mapping("editors", item, None)
        after, values = _steps(own.pop("after", self.after)), own.pop("search", None)
        search = None if values is None else SearchSettings(values=values, **self._search_options)
        name, base = own.pop("name", None), own.pop("editor", None)
        if base is None and name is None:
            raise ValueError(f"an editor needs an 'editor:' or a 'name:', not only {', '.join(own)}")
        for tried in reversed([*search.grid()] if search else [{}]):  # all can be tried; the first is the config's
            found = named_editor(str(base or name), {**self.editor_options, **own, **tried})
        return NamedEditor(str(name or base), found.config, found.warm_up, found.summary), after, search

    @property
    def _search_options(self) -> dict[str, object]:
        return _mapping("search", self.search, ("edits", "score"))

    def _source(self, item: str | Mapping[str, object], seed: int) -> Source:
        how = {"data": self.data, "seed": seed, "shuffle": self.shuffle, "variants": self.variants}
        if isinstance(item, str):
            return find_source(item, warm_up=self.warm_up_data, format=self.format, **how)
        own = _mapping("datasets", item, ("name", "edits", "warm_up", "format", "fields"))
        place = own.get("edits") or own.get("name")
        if place is None:
            raise ValueError("a data set needs an 'edits:' (a file or hub name) or a 'name:'")
        format_ = own.get("fields") or own.get("format") or self.format
        source = find_source(str(place), warm_up=own.get("warm_up") or self.warm_up_data, format=format_, **how)
        return Source(**{**vars(source), "name": str(own.get("name") or source.name)})

    def _length(self, source: Source, progress: bool | None) -> int:
        searches = [search.edits for _, _, search in map(self._editor, self.editors) if search is not None]
        more = {"for the cumulative effect": self.cumulative, "for the search": max(searches, default=0)}
        beyond = sum(more.values())
        wanted = None if self.edits is None else self.edits + beyond
        there = source.count(wanted, progress=progress)
        total = there - beyond if self.edits is None else min(self.edits, there)
        if total < 1 or there < total + beyond:
            what = " and ".join(f"{count} more {why}" for why, count in more.items() if count)
            raise ValueError(
                f"{source.edits} holds {there} requests, too few for a stream of {total} and {what}; give fewer --edits"
            )
        return total


def read_yaml(path: str | Path) -> dict[str, object]:
    """A YAML (or JSON) file with one mapping.

    Raises:
        OSError: if it cannot be read. ValueError: if it holds something else, with the line.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} must hold a mapping of settings, e.g. 'editors: [stableedit]'")
    return content


def _steps(items: object) -> tuple[Step, ...]:
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"after must be a list of steps, e.g. [repair, shrink=0.9], not {items!r}")
    return tuple(map(Step.parse, items))


def _check_warm_up(source: Source, warm_up: WarmUp) -> None:
    there = sum(1 for _ in source.warm_up_requests(0, warm_up.size))
    if there < warm_up.size:
        raise ValueError(f"{source.warm_up} holds {there} requests, fewer than the warm-up of {warm_up.size}")


def _check_side_effects(options: object) -> None:
    if not isinstance(options, Mapping):
        raise ValueError(f"side_effects must be a mapping of options, not {options!r}")
    sideeffects.check(options)


def _mapping(what: str, item: object, known: Iterable[str] | None) -> dict:
    if not isinstance(item, Mapping):
        raise ValueError(f"an entry of {what} must be a name or a mapping, not {item!r}")
    for key in item if known is not None else ():
        if key not in known:
            raise ValueError(f"unknown setting of an entry of {what} {with_nearest(key, known)}")
    return dict(item)

"""What determines the figures of a run, and whether two runs are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from stableedit_cpp.data.hub import HUB_PREFIX
from stableedit_cpp.editors import EditorConfig, NamedEditor
from stableedit_cpp.editors.config import LATER_FIELDS
from stableedit_cpp.evaluation.scores import DEFAULT_METRICS, check_metrics
from stableedit_cpp.experiments.after_stream import Step
from stableedit_cpp.experiments.search_settings import SearchSettings
from stableedit_cpp.experiments.sources import Source
from stableedit_cpp.files.digest import file_digest
from stableedit_cpp.files.words import check_whole, with_nearest

__all__ = ["RunSettings", "WarmUp", "baseline", "differences"]

Position = Literal["start", "q1", "middle", "q3", "end", "none"]
_QUARTERS = {"start": 0, "q1": 1, "middle": 2, "q3": 3, "end": 4}


@dataclass(frozen=True)
class WarmUp:
    """Warm-up edits: where in the stream, and how many."""

    position: Position = "start"
    size: int = 500

    def __post_init__(self) -> None:
        if self.position not in get_args(Position):
            raise ValueError(f"unknown warm-up position {with_nearest(self.position, get_args(Position))}")
        check_whole("the size of the warm-up", self.size, 0)

    def __bool__(self) -> bool:
        return self.position != "none" and self.size > 0

    def place(self, edits: int, turn_size: int) -> int:
        """After how many edits of a stream it comes; between two turns."""
        place = edits * _QUARTERS[self.position] // 4
        return edits if self.position == "end" else place // turn_size * turn_size


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One run: an editor, a model, a stream.

    Attributes:
        model, dtype: as for ``load_model``.
        edits: length of the stream; all of it is there.
        checkpoints: after how many edits the model is scored, ascending; the last is the end of the stream.
        sample: how many of the edits so far are scored at a checkpoint, drawn with the seed; None scores all.
        age_sample: how many are scored in each bin of ages.
        metrics: of ``evaluation.METRICS``, locality included.
        side_effects: options of the measurement of side effects; None measures none.
        geometry: how many random earlier updates each turn's is compared with; 0 looks at no update.
        cumulative: so many requests after the end of the stream are edited at every checkpoint, scored and taken back,
            to see whether a model with prior edits takes new ones better; 0 does not.
        convergence: keep running covariances along the stream and compare them with the last in the end.
        after: what is done to the model at the end of the stream; it is scored after each step.
        search: which fields of the editor's config are searched for before the stream; None searches for none.
    """

    editor: NamedEditor
    model: str
    dtype: str
    source: Source
    edits: int
    warm_up: WarmUp
    checkpoints: tuple[int, ...]
    sample: int | None = None
    age_sample: int = 100
    metrics: tuple[str, ...] = (*DEFAULT_METRICS, "locality")
    side_effects: Mapping[str, object] | None = None
    geometry: int = 4
    cumulative: int = 0
    convergence: bool = False
    after: tuple[Step, ...] = ()
    search: SearchSettings | None = None

    def __post_init__(self) -> None:
        for step in self.after:
            step.config(self.editor.config)
        object.__setattr__(self, "metrics", check_metrics(self.metrics, reference=object()))
        if self.warm_up and not self.editor.warm_up:
            object.__setattr__(self, "warm_up", WarmUp("none", 0))
        if self.warm_up and self.source.warm_up is None:
            raise ValueError(
                f"the data set {self.source.name} has no training stream to warm up with; give --warm-up-data FILE, or "
                "--warm-up none"
            )

    @property
    def name(self) -> str:
        model = self.model.rstrip("/").rsplit("/", 1)[-1]
        return f"{self.editor.name}-{self.source.name}-{model}-seed{self.source.seed}"

    def with_found(self, found: Mapping[str, object]) -> RunSettings:
        """The run with what its search has found."""
        editor = replace(self.editor, config=replace(self.editor.config, **found))
        return replace(self, editor=editor, search=replace(self.search, found=dict(found)))

    @property
    def warm_up_place(self) -> int:
        return self.warm_up.place(self.edits, self.editor.config.turn_size)

    @property
    def turns(self) -> tuple[object, ...]:
        """What the batches of the turns depend on, whatever the editor makes of them."""
        config = self.editor.config
        return self.source, config.turn_size, config.max_tokens_per_forward

    def to_dict(self, model_digest: str | None = None, config: EditorConfig | None = None) -> dict[str, object]:
        """Ready for JSON; what is known only once the model is loaded is None until it is given.

        Args:
            config: of the editor, with the modules and the form that it decided on.
        """
        source, warm = self.source, self.warm_up
        known = json.loads(self.editor.config.to_json())
        if config is not None:
            decided = json.loads(config.to_json())
            known |= {name: decided[name] for name in _DECIDED if name in decided}
        return {
            "editor": self.editor.name,
            "config": known if config is not None else known | {"edit_modules": None},
            "model": self.model,
            "dtype": self.dtype,
            "model_digest": model_digest,
            "dataset": source.name,
            "data": {
                "source": source.edits,
                "digest": _digest(source.edits),
                "format": dict(source.format) if isinstance(source.format, Mapping) else source.format,
                "edits": self.edits,
                "variants": list(source.variants) or None,
            },
            "warm_up": {
                "position": warm.position if warm else "none",
                "size": warm.size if warm else 0,
                "source": source.warm_up if warm else None,
                "digest": _digest(source.warm_up) if warm else None,
            },
            "seed": source.seed,
            "shuffle": source.shuffle,
            "checkpoints": list(self.checkpoints),
            "sample": self.sample,
            "age_sample": self.age_sample,
            "metrics": list(self.metrics),
            "side_effects": dict(self.side_effects) if self.side_effects is not None else None,
            "geometry": self.geometry,
            "cumulative": self.cumulative,
            "convergence": self.convergence,
            "after": [step.to_dict() for step in self.after] or None,
            "search": self.search.to_dict() if self.search else None,
        }


# The same data elsewhere gives the same figures; a hub data set has no digest, so its name has to do.
_PLACES = ("data.source", "warm_up.source")
# Fields of its config that an editor decides on when it is made.
_DECIDED = ("edit_modules", "chat_template", "contexts")
# Not known before the model is loaded.
_LATE = ("model_digest", *(f"config.{name}" for name in _DECIDED))


# What the figures of the unedited model depend on.
_BASELINE = ("model_digest", "dtype", "data.digest", "data.source", "data.format", "data.edits")
_BASELINE += ("data.variants", "seed", "shuffle", "sample", "metrics", "side_effects", "cumulative")
_FORM = ("chat_template", "split_special_tokens")  # of the editor, in which all is asked


def baseline(settings: Mapping[str, object]) -> dict[str, object] | None:
    """What of a ``to_dict`` the figures of the unedited model depend on; None where they are of this run only: the
    cumulative effect is one of the editor."""
    if settings["model_digest"] is None or settings["cumulative"]:
        return None
    known = {**settings, **{f"data.{key}": value for key, value in settings["data"].items()}}
    config = {**LATER_FIELDS, **settings["config"]}
    return {key: known.get(key) for key in _BASELINE} | {key: config[key] for key in _FORM}


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What sets two ``to_dict`` apart, e.g. "config.step_size (0.0003 there, 0.0005 here)"."""
    later = {name: value for name, value in LATER_FIELDS.items() if name in now["config"]}
    before = {**before, "config": {**later, **before["config"]}}
    old, new = dict(_flat(before)), dict(_flat(now))
    found = []
    for key in {**old, **new}:
        there, here = old.get(key), new.get(key)
        moved = key in _PLACES and old.get(key.replace("source", "digest")) is not None
        if there != here and not moved and not (key in _LATE and None in (there, here)):
            found.append(f"{key} ({_short(there)} there, {_short(here)} here)")
    return found


def _flat(document: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for key, value in document.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return pairs


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _digest(source: str) -> str | None:
    return None if source.startswith(HUB_PREFIX) else file_digest(source)

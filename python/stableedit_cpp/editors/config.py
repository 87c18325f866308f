"""Configuration of the editors: plain dataclasses, checked when made, with a JSON round trip."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

__all__ = ["EditorConfig", "StableEditConfig", "UltraEditConfig", "load_config", "parse_config"]

_FORMAT_VERSION = 1
_Config = TypeVar("_Config", bound="EditorConfig")


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """What every editor needs. Use StableEditConfig or UltraEditConfig.

    Attributes:
        edit_modules: names or patterns (``*``, ``?``, ``[..]``, ``{22,24}``, ``{22..28}``) of the linear maps to edit;
            None takes the MLP output projections of four layers in the last third of the model.
        step_size: the paper's eta, > 0.
        ridge: weight of the norm penalty in the least-squares solution, > 0.
        statistics: "shared" pools the running statistics of modules of one shape, as the published code does;
            "per_module" keeps them apart, as the paper has it.
        turn_size: edit requests a turn.
        micro_batch: requests over whose answer tokens the loss is averaged (sets the scale of the value gradients).
        max_passes: solve again, up to this often a turn, for the requests that have not taken yet (not in a warm-up).
        take_probability: a request has taken when every answer token is the model's top choice and has at least this
            probability, in [0, 1). A margin lasts longer than a narrow win, and costs more drift.
        frozen_statistics: running statistics are those of the warm-up (without one, of the first turn); no later turn
            counts in them. For experiments.
        retries_feed_statistics: whether the later passes of a turn, and repairs, count in the running statistics.
        past_key_weight: weight of the second moment C of the keys of earlier turns in the least-squares solution,
            D = (H^T H + past_key_weight C + ridge I)^(-1) H^T V, >= 0; protects what was edited before. 0 as published.
        past_key_rank: keep C as a Frequent Directions sketch of this rank, ``2 * rank * k`` numbers a module; None
            keeps it exactly, ``2 * k * k`` numbers with its factorisation.
        max_tokens_per_forward: how many tokens, padding included, one forward pass may hold. Affects speed and
            memory, not results.
    """

    editor: ClassVar[str]

    edit_modules: list[str] | None = None
    step_size: float = 3.5e-4
    ridge: float = 10.0
    statistics: Literal["shared", "per_module"] = "shared"
    turn_size: int = 100
    micro_batch: int = 10
    max_passes: int = 1
    take_probability: float = 0.0
    retries_feed_statistics: bool = True
    frozen_statistics: bool = False
    past_key_weight: float = 0.0
    past_key_rank: int | None = None
    max_tokens_per_forward: int = 2048

    def __post_init__(self) -> None:
        modules = self.edit_modules
        if modules is not None:
            modules = [modules] if isinstance(modules, str) else modules
            modules = list(modules) if isinstance(modules, Iterable) else []
            if not modules or not all(isinstance(name, str) and name for name in modules):
                raise ValueError(f"edit_modules must be a list of module names or patterns, not {self.edit_modules!r}")
            object.__setattr__(self, "edit_modules", modules)
        self._check_positive("step_size", self.step_size)
        self._check_positive("ridge", self.ridge)
        self._check_choice("statistics", ("shared", "per_module"))
        self._check_number("take_probability", self.take_probability)
        if not 0 <= self.take_probability < 1:
            raise ValueError(f"take_probability must be at least 0 and less than 1, not {self.take_probability!r}")
        self._check_flag("retries_feed_statistics")
        self._check_flag("frozen_statistics")
        self._check_number("past_key_weight", self.past_key_weight)
        if self.past_key_weight < 0:
            raise ValueError(f"past_key_weight must be at least 0, not {self.past_key_weight!r}")
        counts = ["turn_size", "micro_batch", "max_passes", "max_tokens_per_forward"]
        for name in counts if self.past_key_rank is None else [*counts, "past_key_rank"]:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, not {value!r}")

    def _check_number(self, name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} must be a finite number, not {value!r}")

    def _check_positive(self, name: str, value: float) -> None:
        self._check_number(name, value)
        if value <= 0:
            raise ValueError(f"{name} must be greater than 0, not {value!r}")

    def _check_flag(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {getattr(self, name)!r}")

    def to_json(self) -> str:
        """JSON text with the format version; ``from_json`` reads it back."""
        document = {"format": "stableedit-config", "version": _FORMAT_VERSION, "editor": self.editor, **asdict(self)}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls: type[_Config], text: str) -> _Config:
        """Read what ``to_json`` wrote; fields that are absent take their defaults.

        Raises:
            ValueError: for text that is not JSON, another editor's config, a newer version or an unknown field.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
        if not isinstance(document, dict):
            raise ValueError(f"expected a JSON object with the fields of {cls.__name__}")
        version = document.pop("version", _FORMAT_VERSION)
        if document.pop("format", "stableedit-config") != "stableedit-config" or version != _FORMAT_VERSION:
            raise ValueError(f"this is not a stableedit-config of version {_FORMAT_VERSION} (version is {version!r})")
        editor = document.pop("editor", cls.editor)
        if editor != cls.editor:
            raise ValueError(f"this is a config of the editor {editor!r}; {cls.__name__} is for {cls.editor!r}")
        known = [field.name for field in fields(cls)]
        for name in document:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known fields are {', '.join(known)}"
                raise ValueError(f"{cls.__name__} has no field {name!r}; {hint}")
        return cls(**document)


@dataclass(frozen=True, kw_only=True)
class StableEditConfig(EditorConfig):
    """StableEdit (Algorithm 1): Lifelong Normalization with full whitening of the value gradients.

    Attributes:
        whitening: "full" (Sigma^(-1/2)), "diagonal" (ULTRAEDIT's) or "none" (the no-LN ablation).
        warm_up_whitening: the same for the warm-up turns; the published code whitens these diagonally.
        floor: lower bound on the eigenvalues of the covariance, >= 0.
        refresh: reuse a whitening transform until the number of samples has grown by this fraction, in [0, 1]; 0
            computes it anew every turn, as published.
        floor_mode: "relative" to the mean eigenvalue, which suits any model and loss scale, or "absolute" (published).
    """

    editor: ClassVar[str] = "stableedit"

    whitening: Literal["full", "diagonal", "none"] = "full"
    warm_up_whitening: Literal["full", "diagonal", "none"] | None = None
    floor: float = 0.1
    floor_mode: Literal["relative", "absolute"] = "relative"
    refresh: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        modes = ("none", "diagonal", "full")
        self._check_choice("whitening", modes)
        if self.warm_up_whitening is None:
            weaker = min(self.whitening, "diagonal", key=modes.index)
            object.__setattr__(self, "warm_up_whitening", weaker)
        self._check_choice("warm_up_whitening", modes[: modes.index(self.whitening) + 1])
        self._check_choice("floor_mode", ("relative", "absolute"))
        self._check_number("floor", self.floor)
        if self.floor < 0:
            raise ValueError(f"floor must be at least 0, not {self.floor!r}")
        self._check_number("refresh", self.refresh)
        if not 0 <= self.refresh <= 1:
            raise ValueError(f"refresh must be a fraction between 0 and 1, not {self.refresh!r}")

    @classmethod
    def closed_loop(cls, **changes) -> StableEditConfig:
        """Up to five passes of a smaller step a turn, a margin and past keys: nearly all edits hold, at several times
        the work; for a round of ``lifelong.repair`` afterwards, and ``editor.shrink`` where other answers
        matter more. Found on SmolLM2-135M with ZsRE (docs/closed-loop.md)."""
        preset = {"step_size": 2e-4, "max_passes": 5, "take_probability": 0.4, "past_key_weight": 0.02}
        return cls(**(preset | {"retries_feed_statistics": False} | changes))

    @classmethod
    def published(cls, *, edit_modules: list[str] | None = None, step_size: float, **changes) -> StableEditConfig:
        """The procedure of the published code: pooled statistics, diagonal warm-up turns, Psi0 = 0, division by
        nu - v - 1, absolute eigenvalue floor 1e-6, ridge 10, turns of 100 in micro-batches of 10."""
        preset = {"floor": 1e-6, "floor_mode": "absolute", "ridge": 10.0, "statistics": "shared"}
        preset |= {"whitening": "full", "warm_up_whitening": "diagonal", "refresh": 0.0}
        return cls(edit_modules=edit_modules, step_size=step_size, **(preset | changes))


@dataclass(frozen=True, kw_only=True)
class UltraEditConfig(EditorConfig):
    """ULTRAEDIT: Lifelong Normalization per dimension, ridge 1, no warm-up.

    Attributes:
        unbiased_batches: weight the unbiased variance of each micro-batch with its size in the running variance, as
            the published code does, instead of the exact update.
    """

    editor: ClassVar[str] = "ultraedit"

    ridge: float = 1.0
    unbiased_batches: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_flag("unbiased_batches")

    @classmethod
    def published(cls, *, edit_modules: list[str] | None = None, step_size: float, **changes) -> UltraEditConfig:
        """The procedure of the published code: pooled statistics, diagonal, ridge 1, variance unbiased within a
        micro-batch, turns of 100 in micro-batches of 10."""
        preset = {"ridge": 1.0, "statistics": "shared", "unbiased_batches": True}
        return cls(edit_modules=edit_modules, step_size=step_size, **(preset | changes))


def parse_config(text: str) -> EditorConfig:
    """Read the JSON of a config of any editor; raises as ``from_json``, and for an unknown editor."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        document = None  # from_json says what is wrong
    editor = document.get("editor", "stableedit") if isinstance(document, dict) else "stableedit"
    classes = {cls.editor: cls for cls in (StableEditConfig, UltraEditConfig)}
    if editor not in list(classes):
        raise ValueError(f"unknown editor {editor!r}; known are {', '.join(classes)}")
    return classes[editor].from_json(text)


def load_config(path: str | Path) -> EditorConfig:
    """Read a config file of any editor.

    Raises:
        OSError: if the file cannot be read.
        ValueError: with the path, as ``parse_config``.
    """
    try:
        return parse_config(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

"""Second moments of a model's keys and value gradients over plain text: what editors hold their updates off with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from stableedit_cpp.core import NormalInverseWishart, PastKeys, load_state, save_state
from stableedit_cpp.files.digest import model_digest, tokenizer_digest
from stableedit_cpp.files.words import check_format
from stableedit_cpp.model.modules import EditModule

__all__ = ["Place", "TextStatistics", "load_statistics"]

_FORMAT, _VERSION = "stableedit-text-statistics", 1
_WRITER = "stableedit statistics"


class Place(NamedTuple):
    """How far the text has been read: the next source, of it the next text, and of that the next window."""

    source: int = 0
    text: int = 0
    window: int = 0


@dataclass(frozen=True)
class TextStatistics:
    """What a model does with ordinary text, at some of its modules. Immutable; made by ``gather_statistics``.

    Attributes:
        model: what tells the model and its tokenizer from others, ``class``, ``dtype``, ``weights`` (digest) and
            ``tokenizer`` (digest).
        sources: the files or data sets that were read, ``name`` and ``bytes`` of each.
        window: tokens that the model saw together, at most.
        keys: by module name, sum of h h^T over the tokens, ``[k, k]`` float64.
        value_gradients: by module name, mean and scatter of the value gradients, ``[v]`` and ``[v, v]`` float64; empty
            where they were not asked for. Of the sum over tokens of the cross-entropy of the next token, in nats.
        place: where the reading of the sources goes on.
    """

    model: Mapping[str, str]
    sources: Sequence[Mapping[str, object]]
    window: int
    keys: Mapping[str, PastKeys]
    value_gradients: Mapping[str, NormalInverseWishart]
    place: Place

    @classmethod
    def empty(
        cls,
        model: torch.nn.Module,
        tokenizer,
        modules: Sequence[EditModule],
        sources: Sequence[Mapping[str, object]],
        window: int,
        *,
        value_gradients: bool,
    ) -> TextStatistics:
        """Of no text yet."""
        keys = {module.name: PastKeys(module.shape[0]) for module in modules}
        trackers = {module.name: NormalInverseWishart(module.shape[1]) for module in modules if value_gradients}
        return cls(_identity(model, tokenizer), list(sources), window, keys, trackers, Place())

    @property
    def tokens(self) -> int:
        """How many were read; each is a key, and a value gradient, of every module."""
        return next(iter(self.keys.values())).count

    def second_moment(self, module: str) -> torch.Tensor:
        """Mean of h h^T over the keys of a module, ``[k, k]`` float64: C0 of MEMIT, what ``core.NullSpace`` and
        ``core.PastKeys.seeded`` begin with.

        Raises:
            ValueError: for a module that nothing was gathered for, or before the first token.
        """
        return self._of(self.keys, module).second_moment / self.tokens

    def gradient_moment(self, module: str) -> torch.Tensor:
        """Mean of g g^T over the value gradients of a module, ``[v, v]`` float64: with ``second_moment`` the
        factors of K-FAC.

        Raises:
            ValueError: as ``second_moment``; also where only keys were gathered.
        """
        tracker = self._of(self.value_gradients, module)
        return tracker.psi() / tracker.count + torch.outer(tracker.mean(), tracker.mean())

    def _of(self, parts: Mapping[str, object], module: str):
        if module not in parts:
            has = f"they are of {', '.join(parts)}" if parts else "they are of keys alone"
            raise ValueError(f"there are no such statistics of {module}; {has}: gather them with {_WRITER}")
        if self.tokens == 0:
            raise ValueError("the statistics are of no token yet")
        return parts[module]

    def added(
        self, keys: Mapping[str, torch.Tensor], value_gradients: Mapping[str, torch.Tensor], place: Place
    ) -> TextStatistics:
        """With the rows of further tokens, ``[n, k]`` and ``[n, v]`` by module name; this one stays as it is."""
        sums = {name: past.copy() for name, past in self.keys.items()}
        trackers = {name: tracker.copy() for name, tracker in self.value_gradients.items()}
        for name, past in sums.items():
            past.update(keys[name].double())
        for name, tracker in trackers.items():
            tracker.update(value_gradients[name])
        return dataclasses.replace(self, keys=sums, value_gradients=trackers, place=place)

    def check(self, model: torch.nn.Module, tokenizer, modules: Sequence[EditModule] = (), whose: str = "") -> None:
        """Refuse another model, one that was edited since, another tokenizer, and modules that are not in it.

        Args:
            whose: the file, in the message.

        Raises:
            ValueError: with what differs.
        """
        whose, found = whose or "the statistics", _identity(model, tokenizer)
        for name, what in (
            ("class", "a {expected}, and the model is a {found}"),
            ("dtype", "a model in {expected}, and this one is in {found}"),
            ("weights", "a model with other weights (another one, or this one before it was edited)"),
            ("tokenizer", "another tokenizer"),
        ):
            if found[name] != self.model[name]:
                said = what.format(expected=self.model[name], found=found[name])
                raise ValueError(f"{whose}: gathered with {said}; gather them anew with {_WRITER}")
        for module in modules:
            past = self.keys.get(module.name)
            if past is None or past.dim != module.shape[0]:
                raise ValueError(
                    f"{whose}: has no statistics of {module.name}, only of {', '.join(self.keys)}; gather them with "
                    f"{_WRITER} --edit-modules"
                )

    def to(self, modules: Sequence[EditModule]) -> TextStatistics:
        """Each part on the device of its module, where further rows will come from."""
        devices = {module.name: module.device for module in modules}
        parts = {
            field: {
                name: type(part).from_state_dict({key: t.to(devices[name]) for key, t in part.state_dict().items()})
                for name, part in getattr(self, field).items()
            }
            for field in ("keys", "value_gradients")
        }
        return dataclasses.replace(self, **parts)

    def save(self, path: str | Path) -> None:
        """Write a state file (docs/file-formats.md), whole or not at all.

        Raises:
            OSError: as the system says; a file that was there is as it was.
        """
        components = {f"keys/{name}": part.state_dict() for name, part in self.keys.items()}
        components |= {f"value_gradients/{name}": part.state_dict() for name, part in self.value_gradients.items()}
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": dict(self.model),
            "sources": list(self.sources),
            "window": self.window,
            "tokens": self.tokens,
            "place": self.place._asdict(),
        }
        save_state(path, components, config=json.dumps(document))


def load_statistics(
    path: str | Path, model: torch.nn.Module | None = None, tokenizer=None, modules: Sequence[EditModule] = ()
) -> TextStatistics:
    """What ``stableedit statistics`` wrote, on the CPU.

    Args:
        model, tokenizer: refuse the file if it was not gathered with these; the model as it was then, unedited.
        modules: that must be in it.

    Raises:
        OSError: if the file cannot be read.
        ValueError: for a file that is damaged or of another kind, of another model, or without one of the modules.
    """
    components, config = load_state(path)
    try:
        document = json.loads(config or "null")
    except ValueError:
        document = None
    check_format(document, _FORMAT, _VERSION, str(path), _WRITER)
    parts: dict[str, dict[str, object]] = {"keys": {}, "value_gradients": {}}
    for name, state in components.items():
        kind, _, module = name.partition("/")
        parts[kind][module] = (PastKeys if kind == "keys" else NormalInverseWishart).from_state_dict(state)
    place = Place(**document["place"])
    found = TextStatistics(document["model"], document["sources"], document["window"], **parts, place=place)
    if model is not None:
        found.check(model, tokenizer, modules, str(path))
    return found


def _identity(model: torch.nn.Module, tokenizer) -> dict[str, str]:
    """Reads every weight once."""
    return {
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights": model_digest(model),
        "tokenizer": tokenizer_digest(tokenizer),
    }

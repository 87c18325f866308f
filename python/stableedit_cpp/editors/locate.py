"""What editors share that locate facts: the base of MEMIT, AlphaEdit and their like."""

from __future__ import annotations

import dataclasses
import errno
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch

from stableedit_cpp.core import LowRankUpdate, PolyakStep
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.contexts import sample_contexts
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.families import located_modules
from stableedit_cpp.editors.locate_config import LocateConfig
from stableedit_cpp.editors.locate_turn import LocateTurn
from stableedit_cpp.editors.locating import Locator, check_located_modules
from stableedit_cpp.editors.solver import Solver, Statistic
from stableedit_cpp.editors.stableedit import StableEditConfig
from stableedit_cpp.editors.stream import names_of
from stableedit_cpp.editors.text_mark import TextMark
from stableedit_cpp.editors.turn import Turn
from stableedit_cpp.editors.work import Guard
from stableedit_cpp.model.capture import CapturedTurn
from stableedit_cpp.model.gather import gather_statistics
from stableedit_cpp.model.modules import EditModule, find_modules
from stableedit_cpp.model.text_statistics import TextStatistics, load_statistics
from stableedit_cpp.model.tokens import TokenSequence

__all__ = ["LocateEditor", "LocateSolver"]


class LocateSolver(Solver):
    """Solves for what is located. Of value gradients it keeps nothing; ``solve``, which takes some, brings answers back
    that a revert has taken out.

    Attributes:
        past_keys: what earlier turns were solved with, by module name; empty while ``past_key_weight`` is 0.
    """

    config: LocateConfig

    def __init__(self, modules: Sequence[EditModule], config: LocateConfig) -> None:
        super().__init__(modules, config)
        self.normalizers = {}
        self.step = PolyakStep()
        self._mark = TextMark()

    @property
    def holds_keys(self) -> bool:
        """Whether keys take part in solutions beside those of the turn: of text or of earlier turns."""
        return any(past.count > 0 for past in self.past_keys.values())

    @abstractmethod
    def begin(self, name: str, moment: torch.Tensor, dtype: torch.dtype) -> None:
        """Take the second moment of a module's keys over text, mean of h h^T, ``[k, k]`` float64; the keys themselves
        will be of ``dtype``."""

    @abstractmethod
    def solve_located(
        self, name: str, keys: torch.Tensor, residuals: torch.Tensor, ridge: float = 1.0
    ) -> tuple[LowRankUpdate, torch.Tensor]:
        """The update that adds residuals ``[n, v]`` to a module's outputs for keys ``[n, k]``, with so many times the
        configured ridge; and the keys as past keys are to know them."""

    def begin_all(self, text: TextStatistics, modules: Sequence[EditModule]) -> None:
        """Take the statistics of all modules."""
        for module in modules:
            dtype = torch.float64 if module.dtype == torch.float64 else torch.float32
            self.begin(module.name, text.second_moment(module.name).to(module.device), dtype)
        self._mark.set({module.name: text.second_moment(module.name).diagonal() for module in modules})

    @property
    def holding_ridge(self) -> float:
        return StableEditConfig.ridge  # answers are brought back from value gradients

    def statistics(self) -> dict[str, Statistic]:
        past = {f"past_keys/{name}": past for name, past in self.past_keys.items()}
        return past | {"text_statistics": self._mark}

    def devices(self) -> dict[str, torch.device]:
        return super().devices() | {"text_statistics": torch.device("cpu")}

    def replay(self, kind: str, number: int, captured: CapturedTurn) -> None:
        """Nothing: all that a turn leaves here is what ``remember`` adds."""


class LocateEditor(Editor):
    """Base of the editors that write what the model is to say at the last token of a request's subject.

    A turn searches, for all of its requests at once, what the last edited layer is to give there (``find_targets``),
    and has the edited modules write it one after the other, each its share of what is still missing. Either all of
    that happens or nothing. Every request, and every variant of one, has its ``subject`` in the prompt.

    Args, attributes, errors as ``Editor``; moreover:

    Attributes:
        locator: looks at subjects in the model.

    Raises:
        ValueError: for modules that cannot be written to one after the other, and for text statistics that are not
            given, or of another model or other modules.
        OSError: where they cannot be read.
    """

    config_class: ClassVar[type[LocateConfig]]
    solver_class: ClassVar[type[LocateSolver]]
    solver: LocateSolver

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        config: LocateConfig | None = None,
        *,
        guard: Guard | Literal["default"] | None = "default",
    ) -> None:
        super().__init__(model, tokenizer, config, guard=guard)
        config = self._config
        self.solver.begin_all(self._text_statistics(config), self.modules)
        if config.contexts is None:
            config = dataclasses.replace(config, contexts=sample_contexts(model, tokenizer, config.seed))
        self._config = config
        self.locator = Locator(model, tokenizer, self.modules, self.form, config, config.contexts)

    @staticmethod
    def modules_of(model: torch.nn.Module, config: LocateConfig) -> list[EditModule]:
        modules = find_modules(model, config.edit_modules or located_modules(model), packed=True)
        check_located_modules(model, modules)
        return modules

    def tokenize(self, requests: Sequence[EditRequest], names: Sequence[str] | None = None) -> list[TokenSequence]:
        names = names or names_of(requests)
        sequences = super().tokenize(requests, names)
        self.locator.prefixes(requests, names)
        return sequences

    def _make_turn(self, *arguments: object) -> Turn:
        return LocateTurn(self.locator, *arguments)

    def _text_statistics(self, config: LocateConfig) -> TextStatistics:
        path = config.text_statistics
        patterns = " ".join(module.name for module in self.modules)
        if path is None:
            raise ValueError(
                f"{type(self).__name__} needs the second moments of keys over text: give text_statistics, a file that "
                f"`stableedit statistics --model M --text FILE --edit-modules {patterns} --output OUT` writes; with "
                "texts=[FILE, ...] it is gathered where it is not there yet"
            )
        if config.texts and not Path(path).exists():
            names = [module.name for module in self.modules]
            gather_statistics(self.model, self.tokenizer, config.texts, path, edit_modules=names, value_gradients=False)
        if not Path(path).exists():
            raise FileNotFoundError(
                errno.ENOENT,
                f"the text statistics that {type(self).__name__} rests on, as long as it edits, are not there; put the "
                "file there, or a link to it",
                str(path),
            )
        return load_statistics(path, self.model, self.tokenizer, self.modules)

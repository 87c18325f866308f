"""What the turns of a stream work on and with, and what they ask of a guard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from stableedit_cpp.editors.anchors import Anchors
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.replays import Replays
from stableedit_cpp.editors.solver import Solver
from stableedit_cpp.editors.weights import EditedWeights
from stableedit_cpp.evaluation.answers import token_accuracy
from stableedit_cpp.model.form import Form
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["Guard", "Work"]


class GuardLook(Protocol):
    """What a guard saw after a pass: how far other answers have drifted, and whether the pass may stay."""

    drift: float
    within: bool


class Guard(Protocol):
    """Looks after every pass whether it may stay (``LocalityGuard``)."""

    limit: float
    back_offs: int
    step_factor: float
    ridge_factor: float
    trunk: TrunkCache | None

    def begin(self, edited: Sequence[TokenSequence]) -> None: ...

    def look(self) -> GuardLook: ...

    def refusal(self, look: GuardLook) -> Exception: ...


@dataclass(frozen=True)
class Work:
    """What a stream works on, and with.

    Attributes:
        form: of prompts and answers.
        beside: anchors and replays, which add rows of their own to each pass (not in a warm-up).
        trunk: outputs of the layers below the edited ones; None where there is no use for them.
        trunk_is_lent: whether it belongs to the caller, who wants to find in it what the turns have put there.
        outcomes: find out which requests took. answers: and what the model answers to the others.
        passes: as many as a turn had that is edited again; None for as many as it takes.
    """

    model: torch.nn.Module
    tokenizer: object
    config: EditorConfig
    form: Form
    weights: EditedWeights
    solver: Solver
    guard: Guard | None
    beside: Sequence[Anchors | Replays]
    trunk: TrunkCache | None
    trunk_is_lent: bool
    outcomes: bool
    answers: bool
    passes: int | None = None

    def accuracy(self, sequences: Sequence[TokenSequence], most: int | None = None) -> torch.Tensor:
        """Share of each answer's tokens that are the model's top choice; NaN where the model is broken.

        Args:
            most: sequences in one forward pass.
        """
        limit = self.config.max_tokens_per_forward
        return token_accuracy(self.model, sequences, max_tokens=limit, most=most, trunk=self.trunk)

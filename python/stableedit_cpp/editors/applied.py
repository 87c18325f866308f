"""What a turn did to the weights, row by row, for those who keep a record of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from stableedit_cpp.core import LowRankUpdate, contribution
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.edit_report import TurnReport
from stableedit_cpp.model.capture import CapturedTurn

__all__ = ["AppliedPass", "AppliedTurn"]


@dataclass(frozen=True)
class AppliedPass:
    """One solution that was added to the weights.

    Attributes:
        captured: what it was computed from; its rows are those of the updates.
        updates: by module name; column i of ``left`` ``[v, n]`` and row i of ``right`` ``[n, k]`` belong to answer
            token i, so that ``update.select(rows)`` is the share of the requests that own these rows.
        request: index into the turn's requests that owns each row, -1 where none does, ``[n]`` int64 on the CPU. Rows
            of a request's variants are its own.
        ridge: that it was solved with; the configured one, unless a guard asked for a stronger.
        past_keys: whether the keys of earlier turns took part; if not, ``right`` holds the keys themselves.
        step_size: that it was solved with; NaN in the record of an earlier version, which had but the configured one.
    """

    captured: CapturedTurn
    updates: dict[str, LowRankUpdate]
    request: torch.Tensor
    ridge: float
    past_keys: bool
    step_size: float = math.nan

    def contribution(self, owned: torch.Tensor, ridges: Mapping[str, float] | None = None) -> dict[str, LowRankUpdate]:
        """What the rows that ``owned`` marks, ``[n]`` bool, added: subtracting it leaves the pass of the others alone.

        By module name; see ``core.contribution``.

        Args:
            ridges: of each module, where modules have ridges of their own; ``Editor.contribution`` knows.
        """
        return {
            name: contribution(update, owned, keys=self.captured.keys[name].to(update.left.device))
            if self.past_keys
            else contribution(update, owned, ridge=self.ridge if ridges is None else ridges[name])
            for name, update in self.updates.items()
        }


@dataclass(frozen=True)
class AppliedTurn:
    """One turn, applied as a whole: its passes in the order in which they were added to the weights.

    Attributes:
        kind: of the call that the turn belongs to.
    """

    kind: Literal["edit", "warm_up", "repair"]
    requests: Sequence[EditRequest]
    passes: Sequence[AppliedPass]
    report: TurnReport

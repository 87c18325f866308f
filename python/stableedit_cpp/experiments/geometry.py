"""The geometry of the updates along a stream, and the drift of the running statistics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from random import Random

import torch

from stableedit_cpp.core import LifelongNormalizer, LowRankUpdate
from stableedit_cpp.editors import AppliedTurn, Editor

__all__ = ["Geometry", "covariance_of"]

Update = dict[str, LowRankUpdate]  # by module name


class Geometry:
    """Compares the update of every turn with the last one and with random earlier ones; no update is ever formed.

    Args:
        editor: its ``on_turn`` is taken.
        earlier: how many earlier turns are kept, each turn with the same probability.
        seed: of the choice.

    Attributes:
        latest: what the last turn gave, ready for JSON; None before the first.
        seconds: how long that took.
    """

    def __init__(self, editor: Editor, earlier: int, seed: int) -> None:
        self.latest: dict[str, object] | None = None
        self.seconds = 0.0
        self._editor = editor
        self._earlier = earlier
        self._seed = seed
        self._last: Update | None = None
        self._kept: dict[int, Update] = {}  # by turn
        self._turns = 0
        self._statistics = _statistics(editor)
        editor.on_turn = self._observe

    def _observe(self, turn: AppliedTurn) -> None:
        """Called with each turn once it is applied."""
        begin = time.perf_counter()
        if not turn.passes:  # all of it held already
            self._turns, self.latest, self.seconds = self._turns + 1, None, 0.0
            return
        update = _whole(turn)
        norms = {name: part.norm() for name, part in update.items()}
        norm = _length(norms)
        last_inner = {name: part.inner(self._last[name]) for name, part in update.items()} if self._last else {}
        last_norms = {name: part.norm() for name, part in (self._last or {}).items()}
        earlier = {number: other for number, other in self._kept.items() if number != self._turns}  # the last is apart
        self.latest = {
            "norm": norm,
            "cumulative_norm": _length({n: float(c.norm()) for n, c in self._editor.weight_changes().items()}),
            "cosine_last": _ratio(sum(last_inner.values()), norm * _length(last_norms)) if self._last else None,
            "cosine_earlier": [_cosine(update, norm, other) for other in earlier.values()],
            "earlier": list(earlier),
            "modules": {
                name: {
                    "norm": norms[name],
                    "cosine_last": _ratio(last_inner[name], norms[name] * last_norms[name]) if self._last else None,
                }
                for name in update
            },
            "statistics": self._drift(),
        }
        self._turns += 1
        self._last = update
        self._keep(update)
        self.seconds = time.perf_counter() - begin

    def _keep(self, update: Update) -> None:
        """Reservoir sampling; the draw depends on the turn alone, so that a resumed stream goes on alike."""
        if len(self._kept) < self._earlier:
            self._kept[self._turns] = update
            return
        draw = Random(f"{self._seed}:{self._turns}")
        if draw.random() < self._earlier / self._turns:
            del self._kept[draw.choice(list(self._kept))]
            self._kept[self._turns] = update

    def _drift(self) -> dict[str, dict[str, float | int | None]]:
        now, drift = _statistics(self._editor), {}
        for group, (count, mean, covariance) in now.items():
            before_count, before_mean, before = self._statistics[group]
            moved = before_count > 0
            spread = float(covariance.diagonal().sum() if covariance.ndim == 2 else covariance.sum())
            drift[group] = {
                "samples": count,
                "mean_drift": _ratio(float((mean - before_mean).norm()), spread**0.5) if moved else None,
                "covariance_drift": _ratio(float((covariance - before).norm()), float(covariance.norm()))
                if moved and before.ndim == covariance.ndim == 2
                else None,
            }
        self._statistics = now
        return drift

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a later process needs to go on, as components of a state file."""
        updates = {str(turn): update for turn, update in self._kept.items()} | {"last": self._last or {}}
        state = {
            f"geometry/{label}/{name}": {"left": part.left, "right": part.right}
            for label, update in updates.items()
            for name, part in update.items()
        }
        return {**state, "geometry": {"turns": torch.tensor(self._turns, device="cpu")}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Go on from ``state_dict``; the editor's own state is there already."""
        homes = {module.name: module.home for module in self._editor.modules}
        updates: dict[str, Update] = {}
        for component, factors in state.items():
            if component.startswith("geometry/"):
                _, label, name = component.split("/")
                part = LowRankUpdate(factors["left"].to(homes[name]), factors["right"].to(homes[name]))
                updates.setdefault(label, {})[name] = part
        self._last = updates.pop("last", None)
        self._kept = {turn: updates[str(turn)] for turn in sorted(map(int, updates))}
        self._turns = int(state["geometry"]["turns"])
        self._statistics = _statistics(self._editor)


def covariance_of(normalizer: LifelongNormalizer) -> torch.Tensor | None:
    """The running covariance of the value gradients, ``[v, v]`` float64; None where there is none (yet)."""
    tracker = normalizer.value_tracker
    return tracker.covariance() if tracker is not None and tracker.has_covariance() else None


def _statistics(editor: Editor) -> dict[str, tuple[int, torch.Tensor, torch.Tensor]]:
    """By group: samples, mean of the value gradients, and their covariance, ``[v]`` where only variances are kept."""
    found = {}
    for group, normalizer in editor.normalizers.items():
        moments, covariance = normalizer.value_moments, covariance_of(normalizer)
        found[group] = (moments.count, moments.mean(), moments.variance() if covariance is None else covariance)
    return found


def _whole(turn: AppliedTurn) -> Update:
    """All passes of a turn as one update."""
    updates = [applied.updates for applied in turn.passes]
    return {
        name: LowRankUpdate(
            torch.cat([u[name].left for u in updates], 1), torch.cat([u[name].right for u in updates], 0)
        )
        for name in updates[0]
    }


def _cosine(update: Update, norm: float, other: Update) -> float | None:
    inner = sum(part.inner(other[name]) for name, part in update.items())
    return _ratio(inner, norm * _length({name: part.norm() for name, part in other.items()}))


def _length(norms: Mapping[str, float]) -> float:
    return sum(norm**2 for norm in norms.values()) ** 0.5


def _ratio(value: float, scale: float) -> float | None:
    return value / scale if scale > 0 else None

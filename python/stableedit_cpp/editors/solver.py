"""The mathematics of a turn: running statistics, past keys, and the update of every edited module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from stableedit_cpp.core import (
    LifelongNormalizer,
    LowRankUpdate,
    ModuleEditor,
    PastKeys,
    PolyakStep,
    WhiteningOptions,
    first_order_decrease,
)
from stableedit_cpp.editors.applied import AppliedPass
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.replays import PastRequests
from stableedit_cpp.model.capture import CapturedTurn
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.ranks import ranks
from stableedit_cpp.model.tokens import TokenSequence

__all__ = ["NoStep", "Solution", "Solver", "Statistic"]


# Of the loss that a step is to remove to first order. With 1.5, 1,000 requests of ZsRE take in 6 passes of SmolLM2
# instead of 7, and generalize a little better, for more drift elsewhere (docs/closed-loop.md).
_SHARE = 1.0


Statistic = LifelongNormalizer | PastKeys | PastRequests | PolyakStep


class NoStep(ValueError):
    """No multiple of an update lowers the loss to first order, or no update can be solved for."""


class Solution(NamedTuple):
    """What a pass adds to the weights.

    Attributes:
        updates: by module name, where the module's weight is changed.
        step_size, ridge: that they were solved with.
    """

    updates: dict[str, LowRankUpdate]
    step_size: float
    ridge: float


class Solver:
    """Folds turns into running statistics and solves them for updates. It touches no weight.

    Args:
        modules: the edited modules.
        config: of the editor.

    Attributes:
        normalizers: the running statistics, by group of modules.
        past_keys: second moments of the keys of earlier turns, by module name; empty while ``past_key_weight`` is 0.
        past_requests: the statements of earlier turns; None where none are replayed.
        step: chooses the step of each pass and remembers the recent ones; None where ``step_size`` is a number.
        module_editors: by module name, on these statistics; of step size 1 where the step is chosen.
        groups: the modules that share statistics.
    """

    def __init__(self, modules: Sequence[EditModule], config: EditorConfig) -> None:
        self.config = config
        self.normalizers: dict[str, LifelongNormalizer] = {}
        self.past_keys: dict[str, PastKeys] = {}
        self.groups: dict[str, list[EditModule]] = {}
        for module in modules:
            key_dim, value_dim = module.shape
            group = module.name if config.statistics == "per_module" else f"{key_dim} -> {value_dim}"
            self.groups.setdefault(group, []).append(module)
            if group not in self.normalizers:
                self.normalizers[group] = self._make_normalizer(key_dim, value_dim)
            if config.past_key_weight > 0:
                self.past_keys[module.name] = PastKeys(key_dim)
        self.past_requests = PastRequests() if config.replays > 0 else None
        self.step = PolyakStep(share=_SHARE) if config.step_size == "auto" else None
        self.module_editors = self._with_ridge(config.ridge)

    def _make_normalizer(self, key_dim: int, value_dim: int) -> LifelongNormalizer:
        """Fresh running statistics for modules of one shape; here those that normalise nothing."""
        return LifelongNormalizer(key_dim, value_dim, whitening=WhiteningOptions(mode="none", centred=False))

    def _warm_up_mode(self) -> str | None:
        """Whitening of warm-up turns, where it is not the configured one."""
        return None

    def _observe(self, group: str, modules: Sequence[EditModule], captured: CapturedTurn) -> None:
        """Fold a turn into the statistics of a group."""
        rows = [captured.rows_of(module)[:2] for module in modules]
        device = rows[0][0].device
        rows = [(keys.to(device), gradients.to(device)) for keys, gradients in rows if len(keys)]
        if rows:
            self.normalizers[group].observe(*map(list, zip(*rows, strict=True)))

    def statistics(self) -> dict[str, Statistic]:
        """All that a stream accumulates here, by the names that a state has for it."""
        found: dict[str, Statistic] = {f"normalizer/{group}": one for group, one in self.normalizers.items()}
        found |= {f"past_keys/{name}": past for name, past in self.past_keys.items()}
        rest = {"past_requests": self.past_requests, "step": self.step}
        return found | {name: part for name, part in rest.items() if part is not None}

    def devices(self) -> dict[str, torch.device]:
        """Where each part of the statistics lives, by the same names."""
        homes = {
            name: modules[0].device
            for group, modules in self.groups.items()
            for name in (f"normalizer/{group}", *(f"past_keys/{module.name}" for module in modules))
        }
        return homes | dict.fromkeys(("past_requests", "step"), torch.device("cpu"))

    def _with_ridge(self, ridge: float) -> dict[str, ModuleEditor]:
        """Module editors on these statistics with another ridge, by module name."""
        return {
            module.name: ModuleEditor(
                self.normalizers[group],
                step_size=1.0 if self.step is not None else self.config.step_size,
                ridge=ridge,
                past_key_weight=self.config.past_key_weight,
                past_keys=self.past_keys.get(module.name),
            )
            for group, modules in self.groups.items()
            for module in modules
        }

    @property
    def holding_ridge(self) -> float:
        """Ridge where answers are brought back."""
        return self.config.ridge

    def holding(self, past_keys: Mapping[str, PastKeys | None]) -> Mapping[str, ModuleEditor]:
        """Module editors on the running statistics that leave the outputs for these past keys as they are, both by
        module name; for ``solve``."""
        return {
            name: ModuleEditor(
                editor.normalizer,
                step_size=editor.step_size,
                ridge=self.holding_ridge,
                past_keys=past_keys[name],
                past_key_weight=0.0 if past_keys[name] is None else 1.0,
            )
            for name, editor in self.module_editors.items()
        }

    def contribution(self, applied: AppliedPass, owned: torch.Tensor) -> dict[str, LowRankUpdate]:
        """What the rows that ``owned`` marks, ``[n]`` bool, added in a pass, by module name."""
        return applied.contribution(owned)

    def mode(self, kind: str) -> str | None:
        """Whitening that overrides the configured one in turns of this kind ("edit", "warm_up" or "repair")."""
        return self._warm_up_mode() if kind == "warm_up" else None

    def observe(self, kind: str, number: int, captured: CapturedTurn) -> dict[str, str]:
        """Fold pass ``number`` of a turn into the statistics, if this pass is to feed them.

        Returns:
            The whitening that this turn gets, by group.

        Raises:
            NoStep: where the statistics would begin with value gradients that vanish, naming the modules.
        """
        feed = (number == 0 and kind != "repair") or self.config.retries_feed_statistics
        feed = feed and (kind == "warm_up" or not self.config.frozen_statistics)
        captured = captured.owned
        for group, modules in self.groups.items():
            if self.normalizers[group].count == 0 and not any(
                captured.value_gradients[module.name].any() for module in modules
            ):
                if all(module.is_expert for module in modules):  # which saw no token yet
                    continue
                names = ", ".join(module.name for module in modules)
                raise NoStep(
                    f"nothing can be solved for edit_modules {names}: the value gradients vanish there, since the "
                    "answers do not depend on them to first order; edit other modules"
                )
            if feed or self.normalizers[group].count == 0:  # there is nothing else to normalise with
                self._observe(group, modules, captured)
        return {group: normalizer.effective_mode(self.mode(kind)) for group, normalizer in self.normalizers.items()}

    def solve(
        self,
        captured: CapturedTurn,
        mode: str | None = None,
        *,
        step: float = 1.0,
        ridge: float = 1.0,
        editors: Mapping[str, ModuleEditor] | None = None,
    ) -> Solution:
        """Updates for what was captured, under the statistics as they are. ``accept`` it once it is applied.

        Args:
            mode: whitening that overrides the configured one.
            step, ridge: how many times the configured, or chosen, step size and ridge.
            editors: by module name, on these statistics, in the place of ``module_editors``.

        Raises:
            NoStep: where the step is chosen and no update would lower the loss, naming the modules.
        """
        if editors is None:
            editors = self.module_editors if ridge == 1.0 else self._with_ridge(self.config.ridge * ridge)
        modules = [module for group in self.groups.values() for module in group]
        devices = {m.name: captured.keys[group[0].name].device for group in self.groups.values() for m in group}

        def one(number: int) -> tuple[torch.Tensor, torch.Tensor, float]:
            module = modules[number]
            device = devices[module.name]  # that of the group's statistics
            keys, gradients, seen = captured.rows_of(module)
            keys, gradients, decrease = keys.to(device), gradients.to(device), 0.0
            if len(keys):
                update = editors[module.name].compute_update(keys, gradients, mode)
                decrease = first_order_decrease(update, keys, gradients) if self.step is not None else 0.0
            else:
                update = LowRankUpdate(gradients.t(), keys)
            update = update if seen is None else _spread(update, seen.to(device))
            home = module.home
            return update.left.to(home), update.right.to(home), decrease

        found = ranks().shared("solving", [module.shape[0] for module in modules], one)
        self._renew_whiteners(captured, mode)
        decrease = 0.0
        for _, _, part in found:
            decrease += part
        updates = {m.name: LowRankUpdate(left, right) for m, (left, right, _) in zip(modules, found, strict=True)}
        size = step * (self.config.step_size if self.step is None else self._choose(captured.loss, decrease))
        factor = step if self.step is None else size
        return Solution(
            updates if factor == 1.0 else {name: update.scaled(factor) for name, update in updates.items()},
            size,
            self.config.ridge * ridge,
        )

    def _renew_whiteners(self, captured: CapturedTurn, mode: str | None) -> None:
        """Where this process has solved for no module of a group, which other processes have, renew the whitener that
        solving renews where that is due."""
        if ranks().size > 1:
            for group, modules in self.groups.items():
                rows = [captured.rows_of(module)[1][:1] for module in modules]
                row = next((row for row in rows if len(row)), None)
                if row is not None:
                    device = captured.keys[modules[0].name].device
                    self.normalizers[group].normalize_value_gradients(row.to(device), mode)

    def _choose(self, loss: float, decrease: float) -> float:
        try:
            return self.step.choose(loss, decrease)
        except ValueError as error:
            names = ", ".join(module.name for modules in self.groups.values() for module in modules)
            raise NoStep(f"no step can be chosen for edit_modules {names}: {error}") from None

    def accept(self, step_size: float, ridge: float) -> None:
        """Remember the step of a pass that was applied; not that of one whose ridge was eased, which asks for steps of
        another size."""
        if self.step is not None and ridge >= self.config.ridge:
            self.step.accept(step_size)

    def replay(self, kind: str, number: int, captured: CapturedTurn) -> None:
        """Do to the statistics what observing and solving a pass did, bit for bit, without solving it.

        Solving changes nothing but the whitener, which it renews where that is due.
        """
        self.observe(kind, number, captured)
        for group, modules in self.groups.items():
            device = captured.keys[modules[0].name].device
            for module in modules:
                gradients = captured.rows_of(module)[1].to(device)
                if len(gradients):
                    self.normalizers[group].normalize_value_gradients(gradients, self.mode(kind))

    def remember(
        self, kind: str, captured: CapturedTurn | None, sequences: Sequence[TokenSequence], owners: Sequence[int]
    ) -> None:
        """Add the keys of a turn's first pass, if it has one, to the past keys, and its statements to the past
        requests."""
        if captured is not None and kind != "repair" and self.past_keys:
            self.fold_keys(captured.owned, self.past_keys)
        if kind != "warm_up" and self.past_requests is not None:
            self.past_requests.add(sequences, owners)

    def fold_keys(self, captured: CapturedTurn, into: Mapping[str, PastKeys]) -> None:
        """Add captured keys to second moments, by module name."""
        for modules in self.groups.values():
            device = captured.keys[modules[0].name].device  # that of the group's statistics
            for module in modules:
                keys = captured.rows_of(module)[0].to(device)
                if len(keys):
                    into[module.name].update(keys)


def _spread(update: LowRankUpdate, seen: torch.Tensor) -> LowRankUpdate:
    """An update of the rows that an expert has seen, ``[n]`` bool, as one of all rows: the others add nothing."""
    left = update.left.new_zeros(len(update.left), len(seen))
    right = update.right.new_zeros(len(seen), update.right.shape[1])
    left[:, seen], right[seen] = update.left, update.right
    return LowRankUpdate(left, right)

"""The mathematics of a turn: running statistics, past keys, and the update of every edited module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from stableedit_cpp.core import LifelongNormalizer, LowRankUpdate, ModuleEditor, PastKeys
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.model.capture import CapturedTurn
from stableedit_cpp.model.modules import EditModule

__all__ = ["Solver"]


class Solver(ABC):
    """Folds turns into running statistics and solves them for updates. It touches no weight.

    Args:
        modules: the edited modules.
        config: of the editor.

    Attributes:
        normalizers: the running statistics, by group of modules.
        past_keys: second moments of the keys of earlier turns, by module name; empty while ``past_key_weight`` is 0.
        module_editors: by module name, on these statistics.
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
        self.module_editors = self.with_strength(config.step_size, config.ridge)

    @abstractmethod
    def _make_normalizer(self, key_dim: int, value_dim: int) -> LifelongNormalizer:
        """Fresh running statistics for modules of one shape."""

    def _warm_up_mode(self) -> str | None:
        """Whitening of warm-up turns, where it is not the configured one."""
        return None

    def _observe(self, group: str, modules: Sequence[EditModule], captured: CapturedTurn) -> None:
        """Fold a turn into the statistics of a group."""
        keys = [captured.keys[module.name] for module in modules]
        gradients = [captured.value_gradients[module.name] for module in modules]
        device = keys[0].device
        self.normalizers[group].observe([key.to(device) for key in keys], [g.to(device) for g in gradients])

    def statistics(self) -> dict[str, LifelongNormalizer | PastKeys]:
        """All that a stream accumulates here, by the names that a state has for it."""
        normalizers = {f"normalizer/{group}": normalizer for group, normalizer in self.normalizers.items()}
        return normalizers | {f"past_keys/{name}": past for name, past in self.past_keys.items()}

    def devices(self) -> dict[str, torch.device]:
        """Where each part of the statistics lives, by the same names."""
        return {
            name: modules[0].weight.device
            for group, modules in self.groups.items()
            for name in (f"normalizer/{group}", *(f"past_keys/{module.name}" for module in modules))
        }

    def with_strength(self, step_size: float, ridge: float) -> dict[str, ModuleEditor]:
        """Module editors on these statistics with another step size and ridge, by module name."""
        return {
            module.name: ModuleEditor(
                self.normalizers[group],
                step_size=step_size,
                ridge=ridge,
                past_key_weight=self.config.past_key_weight,
                past_keys=self.past_keys.get(module.name),
            )
            for group, modules in self.groups.items()
            for module in modules
        }

    def mode(self, kind: str) -> str | None:
        """Whitening that overrides the configured one in turns of this kind ("edit", "warm_up" or "repair")."""
        return self._warm_up_mode() if kind == "warm_up" else None

    def observe(self, kind: str, number: int, captured: CapturedTurn) -> dict[str, str]:
        """Fold pass ``number`` of a turn into the statistics, if this pass is to feed them.

        Returns:
            The whitening that this turn gets, by group.
        """
        feed = (number == 0 and kind != "repair") or self.config.retries_feed_statistics
        feed = feed and (kind == "warm_up" or not self.config.frozen_statistics)
        for group, modules in self.groups.items():
            if feed or self.normalizers[group].count == 0:  # there is nothing else to normalise with
                self._observe(group, modules, captured)
        return {group: normalizer.effective_mode(self.mode(kind)) for group, normalizer in self.normalizers.items()}

    def solve(
        self, captured: CapturedTurn, editors: Mapping[str, ModuleEditor] | None = None, mode: str | None = None
    ) -> dict[str, LowRankUpdate]:
        """Updates for what was captured, under the statistics as they are; by module name, on the module's device.

        Args:
            editors: by module name, on these statistics; None takes ``module_editors``.
            mode: whitening that overrides the configured one.
        """
        editors = self.module_editors if editors is None else editors
        updates: dict[str, LowRankUpdate] = {}
        for modules in self.groups.values():
            device = captured.keys[modules[0].name].device  # that of the group's statistics
            for module in modules:
                keys, gradients = captured.keys[module.name], captured.value_gradients[module.name]
                update = editors[module.name].compute_update(keys.to(device), gradients.to(device), mode)
                home = module.weight.device
                if home != device:
                    update = LowRankUpdate(update.left.to(home), update.right.to(home))
                updates[module.name] = update
        return updates

    def replay(self, kind: str, number: int, captured: CapturedTurn) -> None:
        """Do to the statistics what observing and solving a pass did, bit for bit, without solving it.

        Solving changes nothing but the whitener, which it renews where that is due.
        """
        self.observe(kind, number, captured)
        for group, modules in self.groups.items():
            device = captured.keys[modules[0].name].device
            for module in modules:
                gradients = captured.value_gradients[module.name].to(device)
                self.normalizers[group].normalize_value_gradients(gradients, self.mode(kind))

    def remember(self, kind: str, captured: CapturedTurn) -> None:
        """Add the keys of a turn's first pass to the past keys."""
        if kind != "repair" and self.past_keys:
            self.fold_keys(captured, self.past_keys)

    def fold_keys(self, captured: CapturedTurn, into: Mapping[str, PastKeys]) -> None:
        """Add captured keys to second moments, by module name."""
        for modules in self.groups.values():
            device = captured.keys[modules[0].name].device  # that of the group's statistics
            for module in modules:
                into[module.name].update(captured.keys[module.name].to(device))

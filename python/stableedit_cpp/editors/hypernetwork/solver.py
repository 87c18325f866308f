"""The mathematics of a turn with a hypernetwork: its targets, solved with a ridge of each module's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from stableedit_cpp.core import LifelongNormalizer, LowRankUpdate, PastKeys, ridge_update
from stableedit_cpp.editors.applied import AppliedPass
from stableedit_cpp.editors.diagonal import DiagonalSolver
from stableedit_cpp.editors.hypernetwork.config import HypernetworkConfig
from stableedit_cpp.editors.hypernetwork.network import HyperNetwork
from stableedit_cpp.editors.solver import Statistic
from stableedit_cpp.model.modules import EditModule

__all__ = ["HyperModule", "HyperSolver"]


class HyperModule:
    """(keys, value gradients) of a turn -> the update of one module's weight: ``core.ModuleEditor`` with a network.

        D = (H^T H + past_key_weight C + ridge_factor exp(log_ridge_j) I)^(-1) H^T V,    W <- W + D^T

    with V of the network, from statistics that have observed the turn.

    Args:
        module: its number j in the network.
        ridge_factor: how many times the ridge of the network.
    """

    def __init__(
        self,
        normalizer: LifelongNormalizer,
        network: HyperNetwork,
        module: int,
        *,
        ridge_factor: float = 1.0,
        past_keys: PastKeys | None = None,
        past_key_weight: float = 0.0,
    ) -> None:
        self.normalizer = normalizer
        self.network = network
        self.module = module
        self.ridge_factor = ridge_factor
        self._past = {} if past_keys is None else {"past_keys": past_keys, "past_key_weight": past_key_weight}

    @property
    def log_ridge(self) -> torch.Tensor:
        """Of the network, a scalar."""
        return self.network.fields["log_ridge"][self.module]

    @property
    def ridge(self) -> float:
        return self.ridge_factor * self.network.ridge(self.module)

    @property
    def step_size(self) -> float:
        return float(self.network.fields["step"][self.module].detach())

    def targets(self, keys: torch.Tensor, value_gradients: torch.Tensor) -> torch.Tensor:
        """The ridge targets V ``[n, v]``, differentiable in the network's fields; the statistics are constants."""
        parts = self.normalizer.normalize_keys(keys), self.normalizer.normalize_value_gradients(value_gradients)
        return self.network.targets(keys, torch.cat(parts, dim=1), self.module)

    def compute_update(
        self, keys: torch.Tensor, value_gradients: torch.Tensor, mode: str | None = None
    ) -> LowRankUpdate:
        """As that of ``core.ModuleEditor``; there is one ``mode``."""
        with torch.no_grad():
            return ridge_update(keys, self.targets(keys, value_gradients), self.ridge, **self._past)


class HyperSolver(DiagonalSolver):
    """
    Attributes:
        networks: by group of modules, as ``normalizers``.
        module_editors: ``HyperModule`` by module name.
    """

    config: HypernetworkConfig
    module_editors: dict[str, HyperModule]

    def __init__(self, modules: Sequence[EditModule], config: HypernetworkConfig) -> None:
        self.networks: dict[str, HyperNetwork] = {}
        super().__init__(modules, config)

    def statistics(self) -> dict[str, Statistic | HyperNetwork]:
        networks = {f"hypernetwork/{group}": network for group, network in self.networks.items()}
        return super().statistics() | networks

    def devices(self) -> dict[str, torch.device]:
        homes = {f"hypernetwork/{group}": modules[0].device for group, modules in self.groups.items()}
        return super().devices() | homes

    def ridges(self, ridge: float) -> dict[str, float]:
        """The ridge of each module, by name, where that of the config would be ``ridge``."""
        return {name: one.ridge for name, one in self._with_ridge(ridge).items()}

    def holding(self, past_keys: Mapping[str, PastKeys | None]) -> dict[str, HyperModule]:
        return self._with_ridge(self.config.ridge, past_keys, 1.0)

    def contribution(self, applied: AppliedPass, owned: torch.Tensor) -> dict[str, LowRankUpdate]:
        return applied.contribution(owned, self.ridges(applied.ridge))

    def _with_ridge(
        self, ridge: float, past_keys: Mapping[str, PastKeys | None] | None = None, weight: float | None = None
    ) -> dict[str, HyperModule]:
        past_keys = self.past_keys if past_keys is None else past_keys
        return {
            module.name: HyperModule(
                self.normalizers[group],
                self._network(group),
                index,
                ridge_factor=ridge / self.config.ridge,
                past_keys=past_keys.get(module.name),
                past_key_weight=self.config.past_key_weight if weight is None else weight,
            )
            for group, modules in self.groups.items()
            for index, module in enumerate(modules)
        }

    def _network(self, group: str) -> HyperNetwork:
        if group not in self.networks:
            config, modules = self.config, self.groups[group]
            self.networks[group] = HyperNetwork.untrained(
                sum(modules[0].shape),
                len(modules),
                rank=config.rank,
                blocks=config.blocks,
                step_size=config.step_size,
                ridge=config.ridge,
                seed=config.seed,
                dtype=torch.float64 if modules[0].dtype == torch.float64 else torch.float32,
                device=modules[0].device,
            )
        return self.networks[group]

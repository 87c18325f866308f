"""The hypernetwork of MALMEN and RLEdit: residual blocks that make pseudo keys and gradients of the real ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

__all__ = ["HyperNetwork"]

_FIELDS = ("down", "up", "bias", "scale", "shift", "step", "log_ridge")


class HyperNetwork:
    """One for all edited modules of one shape (k, v), m of them; module j has a scale, a shift, a step and a ridge of
    its own. From x = [normalised key; normalised value gradient] ``[n, k + v]``,

        y_0 = x,    y_b = y_(b-1) + scale_bj * relu(y_(b-1) down_b up_b + bias_b) + shift_bj,    [h~; g~] = y_last
        V_i = - step_j <h_i, h~_i> g~_i        (h the key as it is, not the normalised one)

    and ``exp(log_ridge_j)`` is the ridge that V is solved with. The network as its released code has it (MALMEN, arXiv
    2311.04661; RLEdit, arXiv 2502.05759). Untrained it is the identity, since ``up`` is zero.

    Value semantics: ``copy`` costs nothing; whatever changes the network puts other tensors in the place of these.

    Attributes:
        fields: down ``[blocks, k + v, rank]``, up ``[blocks, rank, k + v]``, bias ``[blocks, k + v]``, scale and shift
            ``[blocks, m, k + v]``, step and log_ridge ``[m]``; float32, or float64 for float64 weights.
    """

    def __init__(self, fields: Mapping[str, torch.Tensor]) -> None:
        self.fields = dict(fields)

    @classmethod
    def untrained(
        cls,
        size: int,
        modules: int,
        *,
        rank: int,
        blocks: int,
        step_size: float,
        ridge: float,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> HyperNetwork:
        """The identity on ``size`` = k + v dimensions, with one step and ridge for all ``modules``; ``down`` is drawn
        from N(0, 1) by ``seed``, the same on every device."""
        how = {"dtype": dtype, "device": device}
        drawn = torch.randn(
            blocks, size, rank, generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype, device="cpu"
        )
        return cls(
            {
                "down": drawn.to(device),
                "up": torch.zeros(blocks, rank, size, **how),
                "bias": torch.zeros(blocks, size, **how),
                "scale": torch.ones(blocks, modules, size, **how),
                "shift": torch.zeros(blocks, modules, size, **how),
                "step": torch.full((modules,), step_size, **how),
                "log_ridge": torch.full((modules,), math.log(ridge), **how),
            }
        )

    @property
    def rank(self) -> int:
        return self.fields["down"].shape[2]

    @property
    def blocks(self) -> int:
        return self.fields["down"].shape[0]

    def pseudo(self, normalised: torch.Tensor, module: int) -> torch.Tensor:
        """[h~; g~] ``[n, k + v]`` of [h_hat; g_hat] ``[n, k + v]`` of module number ``module``."""
        own = {name: field.to(normalised.dtype) for name, field in self.fields.items()}
        for block in range(self.blocks):
            inner = torch.addmm(own["bias"][block], normalised @ own["down"][block], own["up"][block])
            scale, shift = own["scale"][block, module], own["shift"][block, module]
            # With the slope 1 at 0, as the released code has it: by ``relu`` the untrained network would never learn.
            normalised = torch.addcmul(normalised, scale, inner.clamp_min(0)) + shift
        return normalised

    def targets(self, keys: torch.Tensor, normalised: torch.Tensor, module: int) -> torch.Tensor:
        """The ridge targets V ``[n, v]``.

        Args:
            keys: ``[n, k]`` as they were captured. normalised: [h_hat; g_hat] ``[n, k + v]``.
        """
        pseudo_keys, pseudo_gradients = self.pseudo(normalised, module).tensor_split([keys.shape[1]], dim=1)
        agreement = (keys * pseudo_keys).sum(1, keepdim=True)
        return -self.fields["step"][module].to(keys.dtype) * agreement * pseudo_gradients

    def ridge(self, module: int) -> float:
        """The ridge of module number ``module``."""
        return math.exp(float(self.fields["log_ridge"][module].detach()))

    def trainable(self) -> HyperNetwork:
        """One with tensors of its own that ask for gradients."""
        return HyperNetwork({name: field.detach().clone().requires_grad_() for name, field in self.fields.items()})

    def detached(self) -> HyperNetwork:
        """One with the same tensors, which ask for none."""
        return HyperNetwork({name: field.detach() for name, field in self.fields.items()})

    def copy(self) -> HyperNetwork:
        """As it is now."""
        return HyperNetwork(self.fields)

    def restore(self, other: HyperNetwork) -> None:
        """Become what ``other`` is."""
        self.fields = dict(other.fields)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All fields, by name."""
        return {name: field.detach() for name, field in self.fields.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> HyperNetwork:
        """The way back.

        Raises:
            ValueError: for a state that is not of this class.
        """
        shapes = {name: tuple(field.shape) for name, field in state.items()}
        try:
            (blocks, size, rank), (modules,) = shapes["down"], shapes["step"]
            block, each = (blocks, size), (blocks, modules, size)
            expected = (blocks, size, rank), (blocks, rank, size), block, each, each, (modules,), (modules,)
        except (KeyError, ValueError):
            expected = ()
        if not expected or shapes != dict(zip(_FIELDS, expected, strict=True)):
            raise ValueError(f"this is not the state of a hypernetwork: its fields are {shapes}")
        return cls({name: state[name] for name in _FIELDS})

"""Experts of a mixture: slices of one tensor, each of them a linear map that sees only the tokens routed to it.

transformers holds the down projections of a layer's experts as one parameter, ``[experts, v, k]``, and multiplies with
it in one kernel. To see the input and the output of one expert, its layer runs expert by expert for a while, by the
same rule; the first time, what comes out is compared with what the model computes itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from stableedit_cpp.model.attached import replaced_forward

__all__ = ["ExpertSlice", "expert_by_expert", "expert_slices"]

_TENSOR = "down_proj"
# What transformers' interface of experts says of a class; one without it has a forward of its own.
_INTERFACE = ("num_experts", "is_transposed", "has_gate", "has_bias", "has_post_expert_norm", "_apply_gate")


class Experts:
    """The experts of one layer.

    Attributes:
        name: of the module in the model.
        module: with ``down_proj``, ``[experts, v, k]``, or ``[experts, k, v]`` where it is transposed.
        proven: whether running them one by one was compared with the model's own way.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.proven = False

    @property
    def tensor_name(self) -> str:
        return f"{self.name}.{_TENSOR}"


class ExpertSlice(nn.Module):
    """The down projection of one expert; not a part of the model, which calls it within ``expert_by_expert`` alone.

    Attributes:
        tokens: which of the tokens that its layer was called with it has seen last, ``[n]`` int64.
    """

    def __init__(self, experts: Experts, index: int) -> None:
        super().__init__()
        self.experts, self.index = experts, index
        self.tokens: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """A view into the parameter: what is written into it is in the model."""
        return getattr(self.experts.module, _TENSOR).detach()[self.index]

    @property
    def bias(self) -> torch.Tensor | None:
        module = self.experts.module
        return getattr(module, f"{_TENSOR}_bias")[self.index] if module.has_bias else None

    @property
    def transposed(self) -> bool:
        return self.experts.module.is_transposed

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _linear(hidden, self.weight, self.bias, self.transposed)


def expert_slices(name: str, module: nn.Module) -> dict[str, ExpertSlice]:
    """The slices by name, ``model.layers.3.mlp.experts.down_proj.7``; empty for a module that holds no such experts."""
    tensor = module._parameters.get(_TENSOR)
    if tensor is None or tensor.ndim != 3 or type(tensor.data) is not torch.Tensor:  # split over processes, say
        return {}
    if not all(hasattr(module, one) for one in _INTERFACE):
        return {}
    experts = Experts(name, module)
    return {f"{experts.tensor_name}.{index}": ExpertSlice(experts, index) for index in range(len(tensor))}


@contextmanager
def expert_by_expert(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context the layers of those of the modules that are slices call them.

    Raises:
        ValueError: at the first call, where the layer computes something else than its experts one by one.
    """
    layers: dict[nn.Module, dict[int, ExpertSlice]] = {}
    for module in modules:
        if isinstance(module, ExpertSlice):
            layers.setdefault(module.experts.module, {})[module.index] = module
    with ExitStack() as stack:
        for module, slices in layers.items():
            stack.enter_context(replaced_forward(module, _OneByOne(slices)))
        yield


class _OneByOne:
    """The forward of transformers' experts (``integrations/moe.py``), with the edited ones as modules."""

    def __init__(self, slices: dict[int, ExpertSlice]) -> None:
        self._slices = slices
        self._experts = next(iter(slices.values())).experts

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        result = self._run(hidden_states, top_k_index, top_k_weights)
        if not self._experts.proven:
            module = self._experts.module
            with torch.no_grad():
                exact = type(module).forward(module, hidden_states, top_k_index, top_k_weights)
            tolerance = 1e-4 if exact.element_size() >= 4 else 3e-2
            if not (result.detach() - exact).norm() <= tolerance * exact.norm():
                raise ValueError(
                    f"edit_modules: {self._experts.name} computes something else than its experts one by one, so that "
                    "they cannot be edited one by one; name other modules, e.g. the outputs of attention"
                )
            self._experts.proven = True
        return result

    def _run(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        module = self._experts.module
        sums = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for index in chosen.unique().tolist():
            if index >= module.num_experts:  # of another process
                continue
            token, place = torch.where(chosen == index)
            inner = self._inner(hidden[token], index)
            down = self._slices.get(index) or ExpertSlice(self._experts, index)
            down.tokens = token
            out = down(inner)
            if module.has_post_expert_norm:
                out = module.post_expert_norm(out)
            out = out * weights[token, place, None]
            sums = sums.index_add(0, token, out.to(sums.dtype))
        return sums.to(hidden.dtype)

    def _inner(self, hidden: torch.Tensor, index: int) -> torch.Tensor:
        module = self._experts.module
        name = "gate_up_proj" if module.has_gate else "up_proj"
        bias = getattr(module, f"{name}_bias")[index] if module.has_bias else None
        up = _linear(hidden, getattr(module, name)[index], bias, module.is_transposed)
        return module._apply_gate(up) if module.has_gate else module.act_fn(up)


def _linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    return F.linear(hidden, weight.t() if transposed else weight, bias)

"""Gradients through quantised maps whose library has none: most kernels for 4 bits answer, and have no derivative.

Edits differentiate the loss by the values of the edited modules, and so through every map above them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["answers_to_unit_vectors", "differentiates", "lead_gradients_through"]

_ROWS = 512  # unit vectors at once


@torch.no_grad()
def answers_to_unit_vectors(module: nn.Module, like: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """What a linear map does, some columns of its matrix at a time: (the first, ``[columns, v]`` without the bias),
    with the dtype and on the device of ``like``."""
    k, bias = module.in_features, getattr(module, "bias", None)
    for first in range(0, k, _ROWS):
        rows = torch.zeros(min(_ROWS, k - first), k, device=like.device, dtype=like.dtype)
        rows[:, first : first + len(rows)].fill_diagonal_(1)
        answers = module(rows).to(like.dtype)
        yield first, answers if bias is None else answers - bias.to(like.dtype)


def differentiates(module: nn.Module, like: torch.Tensor) -> bool:
    """Whether gradients pass a linear map, by its library's own derivative."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, module.in_features, device=like.device, dtype=like.dtype, requires_grad=True)
        try:
            return bool(torch.autograd.grad(module(x).sum(), x))
        except Exception:  # of whatever library: no derivative, or no graph at all
            return False


def lead_gradients_through(module: nn.Module) -> None:
    """Let gradients pass a linear map with fixed weights: dL/dx = dL/dy W.

    W is read from answers to unit vectors in each backward pass, some columns at once: a packed model has no room for
    it. A map that has been led through before is left as it is.
    """
    if _lead not in module._forward_hooks.values():
        module.register_forward_hook(_lead)


def _lead(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    """A forward hook: what the library has noted for a backward pass is dropped."""
    if not (torch.is_grad_enabled() and args and args[0].requires_grad):
        return None
    return _Through.apply(args[0], output.detach(), module)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, output: torch.Tensor, module: nn.Module) -> torch.Tensor:
        ctx.module, ctx.like = module, x.new_empty(0)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        parts = answers_to_unit_vectors(ctx.module, ctx.like)
        return torch.cat([(gradient.to(part.dtype) @ part.T) for _, part in parts], -1), None, None

"""A model's linear maps while we capture or evaluate: the same products, done faster.

Two things are saved. PyTorch multiplies float32 matrices on a CPU with MKL, which keeps to AVX2 on processors that are
not Intel's; oneDNN, which every CPU build of PyTorch carries as well, uses AVX-512 wherever it exists (about twice as
fast on AMD EPYC). And under a causal mask a gradient never flows from an earlier to a later position, so the value
gradients at answer positions need nothing of the gradients at the prompt positions before them: the backward products
leave those out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from torch.nn import functional as F

from stableedit_cpp.files.offloaded import Offloaded
from stableedit_cpp.model.attached import beneath_hook, replaced_forward, replacement
from stableedit_cpp.model.packed import is_packed
from stableedit_cpp.model.tokens import Batch

__all__ = ["Linears", "few_shapes"]

_ROWS = 64
_few_shapes: ContextVar[bool] = ContextVar("few_shapes", default=False)


@contextmanager
def few_shapes() -> Iterator[None]:
    """Within, oneDNN is given matrices of 64 rows, 128, 192 and so on, the last of them zeros where need be.

    It makes a kernel for each number of rows, and along thousands of batches kernels that come and go leave the memory
    between them in pieces, so that ever more of it is taken. The last bits of a product may depend on its rows.
    """
    token = _few_shapes.set(True)
    try:
        yield
    finally:
        _few_shapes.reset(token)


class Linears:
    """Within ``replaced``, the plain ``nn.Linear`` modules of a model run through here.

    Their weights must not require a gradient; subclasses, quantised ones, and modules whose forward somebody else has
    replaced, are left alone; beneath a hook of accelerate's they run through here as well. Results differ from
    PyTorch's in the last bits, as between any two matrix libraries.
    """

    def __init__(self) -> None:
        self._shape: torch.Size | None = None
        self._answers: torch.Tensor | None = None

    def gradients_for(self, batch: Batch) -> None:
        """From now on the model runs this batch, and only the gradients at its answer positions will be read."""
        self._shape, self._answers = batch.input_ids.shape, batch.positions

    @contextmanager
    def replaced(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for module in model.modules():
                if type(module) is not nn.Linear or is_packed(module):
                    continue
                if replacement(module) is None:
                    stack.enter_context(replaced_forward(module, _Forward(self, module)))
                elif getattr(beneath_hook(module), "__func__", None) is nn.Linear.forward:
                    stack.enter_context(replaced_forward(module, _Forward(self, module), "_old_forward"))
            yield

    def rows(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Rows of ``hidden [sequences, length, d]`` at answer positions; None where it is not a batch like that."""
        if self._answers is None or hidden.ndim != 3 or hidden.shape[:2] != self._shape:
            return None
        return self._answers.to(hidden.device)


class _Forward:
    def __init__(self, linears: Linears, module: nn.Linear) -> None:
        self.linears, self.module = linears, module
        self.offloaded = Offloaded.of(module)

    def __call__(self, input: torch.Tensor) -> torch.Tensor:  # nn.Linear's own name for it
        weight, bias = self.module.weight, self.module.bias
        if input.dtype != weight.dtype or torch.is_autocast_enabled(input.device.type):
            return F.linear(input, weight, bias)
        if input.requires_grad and torch.is_grad_enabled():
            return _Linear.apply(input, weight, bias, self.linears.rows(input), self.offloaded)
        return _product(input, weight, bias)


class _Linear(torch.autograd.Function):
    """Derivative for the input alone, at the given rows alone; elsewhere it is reported as zero.

    An offloaded weight is fetched anew when its turn comes in the backward pass: the graph would hold those of all
    layers where they run, which is what there is no room for.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: torch.Tensor | None,
        offloaded: Offloaded | None,
    ) -> torch.Tensor:
        ctx.offloaded = offloaded
        ctx.save_for_backward(None if offloaded is not None else weight, rows)
        return _product(hidden, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, rows = ctx.saved_tensors
        if weight is None:
            weight = ctx.offloaded.read().to(gradient.device)
        if rows is None:
            return _product(gradient, weight.t()), None, None, None, None
        result = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])
        chosen = gradient.reshape(-1, gradient.shape[-1])[rows]
        result.view(-1, weight.shape[1])[rows] = _product(chosen, weight.t())
        return result, None, None, None, None


def _product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and hidden.numel() > 0 and _onednn():
        if not _few_shapes.get():
            return _by_onednn(hidden, weight, bias)
        rows = hidden.reshape(-1, hidden.shape[-1])
        product = _by_onednn(F.pad(rows, (0, 0, 0, -len(rows) % _ROWS)), weight, bias)
        return product[: len(rows)].reshape(*hidden.shape[:-1], -1)
    return F.linear(hidden, weight, bias)


def _by_onednn(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


def _onednn() -> bool:
    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and mkldnn.enabled and hasattr(torch.ops.mkldnn, "_linear_pointwise")

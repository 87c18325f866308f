"""Reads a model at single tokens, with no more of it run than that takes: keys and the residual stream, for editors
that locate facts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from stableedit_cpp.model.attached import forward_pre_hook
from stableedit_cpp.model.logits import answer_logits
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.tokens import Batch, TokenSequence, collate
from stableedit_cpp.model.trunk import TrunkCache, pack_apart
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["hidden_of", "read_at_the_end", "rows_of"]


class _Enough(Exception):
    """All that was to be read is there: the layers above need not run."""


def read_at_the_end(
    model: nn.Module,
    module: EditModule,
    layer: nn.Module,
    texts: Sequence[tuple[int, ...]],
    *,
    max_tokens: int,
    trunk: TrunkCache | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into a module, and into a layer above it, at the last token of each text.

    Under a causal mask nothing that follows would change it, and of the model nothing is run from that layer on.

    Args:
        module: a linear map below ``layer``.
        texts: token ids.
        max_tokens: tokens, padding included, in one forward pass.
        trunk: keeps and reuses what the layers below the edited modules give.

    Returns:
        Keys ``[n, k]`` and hidden states ``[n, d]``, float32 (float64 for a float64 model), on the devices of the
        module and of the layer.

    Raises:
        ValueError: if the module takes no part below the layer.
    """
    sequences = [TokenSequence(text, (0,)) for text in texts]
    keys: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    ran: list[int] = []

    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if trunk is not None:
            trunk.check(sequences)
        device, runs_on = input_device(model), module.device
        for indices in pack_apart(sequences, max_tokens, trunk, device=device):
            chosen = [sequences[index] for index in indices]
            batch = collate(chosen, device)

            def of_module(_module: nn.Module, args: tuple, kwargs: dict, batch: Batch = batch) -> None:
                keys.append(rows_of(args[0].to(runs_on), batch))

            def of_layer(_layer: nn.Module, args: tuple, kwargs: dict, batch: Batch = batch) -> None:
                states.append(rows_of(hidden_of(args, kwargs), batch))
                raise _Enough

            with forward_pre_hook(module.module, of_module), forward_pre_hook(layer, of_layer):
                try:
                    answer_logits(model, batch, trunk, chosen)
                except _Enough:
                    ran += indices
            if not len(keys) == len(states) > 0:
                raise ValueError(f"edit_modules: {module.name} takes no part in what the layers below give")
    order = torch.tensor(ran, device="cpu").argsort()
    return tuple(torch.cat(rows)[order.to(rows[0].device)] for rows in (keys, states))


def hidden_of(args: tuple, kwargs: dict) -> torch.Tensor:
    """The hidden states ``[batch, length, d]`` that a layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def rows_of(tensor: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A copy of the rows at the answer positions of a batch, float32 at least."""
    rows = tensor.reshape(-1, tensor.shape[-1])[batch.positions.to(tensor.device)]
    return rows if rows.dtype == torch.float64 else rows.float()

"""Runs a model for its answers: logits only where an answer token is predicted, and the model left as it was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from stableedit_cpp.model.linears import Linears
from stableedit_cpp.model.tokens import Batch, TokenSequence
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["answer_logits", "input_device", "untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[Linears]:
    """Evaluation mode, no gradients for parameters and faster linear maps, all put back afterwards."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        linears = Linears()
        with linears.replaced(model):
            yield linears
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def answer_logits(
    model: nn.Module, batch: Batch, trunk: TrunkCache | None = None, sequences: Sequence[TokenSequence] = ()
) -> torch.Tensor:
    """Logits that predict the answer tokens of a batch, ``[n, vocabulary]``.

    The output embedding, a large share of a small model's work, sees only these positions.

    Args:
        trunk: skips the layers below the first edited module where it has kept their output for ``sequences``, those
            of the batch, and keeps it where it has not.
    """
    head = model.get_output_embeddings()

    def select(_module: nn.Module, inputs: tuple) -> tuple:
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1])[batch.positions].unsqueeze(0), *inputs[1:])

    with ExitStack() as stack:
        if head is not None:
            stack.callback(head.register_forward_pre_hook(select).remove)
        if trunk is not None:
            stack.enter_context(trunk.attached(sequences, batch))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logits = logits.reshape(-1, logits.shape[-1])
    return logits if head is not None else logits[batch.positions]


def input_device(model: nn.Module) -> torch.device:
    """Where the model expects its token ids."""
    return model.get_input_embeddings().weight.device

"""Runs a model for its answers: logits only where an answer token is predicted, and the model left as it was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import nn

from stableedit_cpp.model.attached import forward_pre_hook
from stableedit_cpp.model.tokens import Batch, TokenSequence, collate
from stableedit_cpp.model.trunk import TrunkCache, pack_apart
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["AnswerBatch", "answer_logits", "batches"]


class AnswerBatch(NamedTuple):
    """One forward pass over some of the sequences, read where their n answer tokens are predicted.

    Attributes:
        indices: of its sequences among those that were given.
        sizes: how many answer tokens each of them has; they sum to n, and rows are in this order.
        logits: ``[n, vocabulary]``, in the model's dtype and where its output is.
        labels: the answer tokens, ``[n]`` int64, beside the logits.
    """

    indices: list[int]
    sizes: list[int]
    logits: torch.Tensor
    labels: torch.Tensor


def batches(
    model: nn.Module, sequences: Sequence[TokenSequence], *, max_tokens: int, trunk: TrunkCache | None = None
) -> Iterator[AnswerBatch]:
    """Run a model over sequences, batch by batch: the loop behind scores, the guard and audits.

    The model is as its owner left it whenever a batch is handed over. What the trunk cache holds and what it does not
    run apart, so that what is held skips the trunk.

    Args:
        max_tokens: tokens, padding included, in one forward pass.
        trunk: keeps and reuses the output of the layers that no edit changes.

    Raises:
        ValueError: if the trunk's weights have changed.
    """
    device = input_device(model)
    for indices in pack_apart(sequences, max_tokens, trunk):
        chosen = [sequences[index] for index in indices]
        batch = collate(chosen, device)
        with untouched(model), torch.no_grad():
            logits = answer_logits(model, batch, trunk, chosen)
        yield AnswerBatch(
            indices, [len(sequence.answer) for sequence in chosen], logits, batch.labels.to(logits.device)
        )


def answer_logits(
    model: nn.Module, batch: Batch, trunk: TrunkCache | None = None, sequences: Sequence[TokenSequence] = ()
) -> torch.Tensor:
    """Logits that predict the answer tokens of a batch, ``[n, vocabulary]``.

    The output embedding, a large share of a small model's work, sees only these positions.

    Args:
        trunk: skips the layers below the first edited module where it has kept their output for ``sequences``, those
            of the batch, and keeps it where it has not;
            ``trunk.check(sequences)`` comes first.
    """
    head = model.get_output_embeddings()

    def select(_head: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (_rows(args[0], batch).unsqueeze(0), *args[1:]), kwargs

    with ExitStack() as stack:
        if head is not None:
            stack.enter_context(forward_pre_hook(head, select))
        if trunk is not None:
            stack.enter_context(trunk.attached(sequences, batch))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits.reshape(-1, logits.shape[-1]) if head is not None else _rows(logits, batch)


def _rows(tensor: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Rows of ``[batch, length, d]`` at answer positions, wherever the layer runs that made it."""
    return tensor.reshape(-1, tensor.shape[-1])[batch.positions.to(tensor.device)]

"""Runs a model for its answers: logits only where an answer token is predicted, and the model left as it was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from stableedit_cpp.model.logits import answer_logits
from stableedit_cpp.model.prefix import shared_prefix
from stableedit_cpp.model.tokens import TokenSequence, collate
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
    if trunk is not None:
        trunk.check(sequences)
    prefix = shared_prefix(model, sequences, trunk)
    skip = len(prefix or ())
    for indices in pack_apart(sequences, max_tokens, trunk, skip=skip, device=device):
        chosen = [sequences[index] for index in indices]
        batch = collate(chosen, device, skip=skip)
        with untouched(model), torch.no_grad():
            logits = answer_logits(model, batch, trunk, chosen, prefix and prefix.past(batch))
        yield AnswerBatch(
            indices, [len(sequence.answer) for sequence in chosen], logits, batch.labels.to(logits.device)
        )

"""Runs a model for its answers: logits only where an answer token is predicted, and the model left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from stableedit_cpp.model.logits import answer_logits
from stableedit_cpp.model.prefix import SharedPrefix, shared_prefix
from stableedit_cpp.model.shares import shared_passes
from stableedit_cpp.model.tokens import TokenSequence, collate
from stableedit_cpp.model.trunk import TrunkCache, pack_apart
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["AnswerBatch", "answer_logits", "batches", "read_batches"]

_T = TypeVar("_T")


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
    """Run a model over sequences, batch by batch, all of them in this process.

    The model is as its owner left it whenever a batch is handed over. What the trunk cache holds and what it does not
    run apart, so that what is held skips the trunk.

    Args:
        max_tokens: tokens, padding included, in one forward pass.
        trunk: keeps and reuses the output of the layers that no edit changes.

    Raises:
        ValueError: if the trunk's weights have changed.
    """
    run, prefix = _passes(model, sequences, max_tokens, trunk)
    for indices in run:
        yield _run(model, sequences, indices, prefix, trunk)


def read_batches(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    read: Callable[[AnswerBatch], _T],
    *,
    max_tokens: int,
    most: int | None = None,
    trunk: TrunkCache | None = None,
    on_done: Callable[[Sequence[int]], object] | None = None,
) -> list[tuple[Sequence[int], _T]]:
    """What ``read`` makes of each forward pass over sequences, with the indices of its sequences, in the order of
    ``batches``: the loop behind scores, the guard and audits, which processes share out (``ranks.data_parallel``).

    Args:
        read: called outside of any context of ours; what it gives is handed on to other processes.
        most: sequences in one forward pass, however many there would be room for: a pass is the least that processes
            can share out.
        on_done: called with the indices after each pass. The others, and errors, as ``batches``.
    """
    run, prefix = _passes(model, sequences, max_tokens, trunk, most)
    how = {"max_tokens": max_tokens, "trunk": trunk, "skip": len(prefix or ()), "device": input_device(model)}
    found = shared_passes(
        "reading answers",
        run,
        sequences,
        lambda indices: read(_run(model, sequences, indices, prefix, trunk)),
        on_done=on_done,
        **how,
    )
    return list(zip(run, found, strict=True))


def _passes(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    max_tokens: int,
    trunk: TrunkCache | None,
    most: int | None = None,
) -> tuple[list[list[int]], SharedPrefix | None]:
    """The indices of each forward pass, and what all sequences go on from."""
    if trunk is not None:
        trunk.check(sequences)
    prefix = shared_prefix(model, sequences, trunk)
    how = {"skip": len(prefix or ()), "device": input_device(model), "most": most}
    return pack_apart(sequences, max_tokens, trunk, **how), prefix


def _run(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    indices: list[int],
    prefix: SharedPrefix | None,
    trunk: TrunkCache | None,
) -> AnswerBatch:
    chosen = [sequences[index] for index in indices]
    batch = collate(chosen, input_device(model), skip=len(prefix or ()))
    with untouched(model), torch.no_grad():
        logits = answer_logits(model, batch, trunk, chosen, prefix and prefix.past(batch))
    return AnswerBatch(indices, [len(sequence.answer) for sequence in chosen], logits, batch.labels.to(logits.device))

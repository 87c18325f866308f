"""Teacher-forced answers: which answer tokens the model would choose, and how likely they are, given those before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from stableedit_cpp.model.running import answer_logits, input_device, untouched
from stableedit_cpp.model.tokens import TokenSequence, collate
from stableedit_cpp.model.trunk import TrunkCache, pack_apart

__all__ = ["AnswerScores", "answer_scores", "token_accuracy"]


class AnswerScores(NamedTuple):
    """Of each sequence, ``[sequences]`` float64 on the CPU.

    Attributes:
        accuracy: share of its answer tokens that are the model's top choice.
        probability: that the model gives to the least likely of its answer tokens, in [0, 1].
    """

    accuracy: torch.Tensor
    probability: torch.Tensor


def token_accuracy(
    model: torch.nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    trunk: TrunkCache | None = None,
    on_done: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Share of each sequence's answer tokens that are the model's top choice, ``[sequences]`` float64 on the CPU.

    Args:
        max_tokens: tokens, padding included, in one forward pass.
        trunk: keeps and reuses the output of the layers that no edit changes.
        on_done: called with the number of sequences after each forward pass.
    """
    accuracy = torch.zeros(len(sequences), dtype=torch.float64)

    def take(indices: list[int], sizes: list[int], logits: torch.Tensor, labels: torch.Tensor) -> None:
        accuracy[indices] = _hits(logits, labels, sizes)

    _for_answers(model, sequences, max_tokens, trunk, on_done, take)
    return accuracy


def answer_scores(
    model: torch.nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    trunk: TrunkCache | None = None,
    on_done: Callable[[int], object] | None = None,
) -> AnswerScores:
    """Accuracy and probability of each sequence's answer. Arguments as ``token_accuracy``."""
    accuracy = torch.zeros(len(sequences), dtype=torch.float64)
    probability = torch.zeros(len(sequences), dtype=torch.float64)

    def take(indices: list[int], sizes: list[int], logits: torch.Tensor, labels: torch.Tensor) -> None:
        accuracy[indices] = _hits(logits, labels, sizes)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        likely = F.cross_entropy(wide, labels, reduction="none").neg().exp().double().cpu()
        probability[indices] = torch.stack([part.min() for part in likely.split(sizes)])

    _for_answers(model, sequences, max_tokens, trunk, on_done, take)
    return AnswerScores(accuracy, probability)


def _for_answers(
    model: torch.nn.Module,
    sequences: Sequence[TokenSequence],
    max_tokens: int,
    trunk: TrunkCache | None,
    on_done: Callable[[int], object] | None,
    take: Callable[[list[int], list[int], torch.Tensor, torch.Tensor], None],
) -> None:
    """Hands over, batch by batch: indices of the sequences, answer tokens of each, logits ``[n, vocabulary]``, labels
    ``[n]``."""
    device = input_device(model)
    with untouched(model), torch.no_grad():
        for indices in pack_apart(sequences, max_tokens, trunk):
            chosen = [sequences[index] for index in indices]
            batch = collate(chosen, device)
            logits = answer_logits(model, batch, trunk, chosen)
            take(indices, [len(sequence.answer) for sequence in chosen], logits, batch.labels.to(logits.device))
            if on_done is not None:
                on_done(len(indices))


def _hits(logits: torch.Tensor, labels: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    hits = (logits.argmax(-1) == labels).double().cpu()
    return torch.stack([part.mean() for part in hits.split(sizes)])

"""Teacher-forced token accuracy: which answer tokens the model would choose, given those before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from stableedit_cpp.forward import answer_logits, input_device, untouched
from stableedit_cpp.prompts import TokenSequence, collate, pack
from stableedit_cpp.trunk_cache import TrunkCache

__all__ = ["token_accuracy"]


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
    device = input_device(model)
    with untouched(model), torch.inference_mode():
        for indices in _batches(sequences, max_tokens, trunk):
            chosen = [sequences[index] for index in indices]
            batch = collate(chosen, device)
            logits = answer_logits(model, batch, trunk, chosen)
            hits = (logits.argmax(-1) == batch.labels.to(logits.device)).double().cpu()
            sizes = [len(sequence.answer) for sequence in chosen]
            accuracy[indices] = torch.stack([part.mean() for part in hits.split(sizes)])
            if on_done is not None:
                on_done(len(indices))
    return accuracy


def _batches(sequences: Sequence[TokenSequence], max_tokens: int, trunk: TrunkCache | None) -> list[list[int]]:
    """Batches of indices; what the trunk cache holds and what it does not are not mixed."""
    if trunk is None:
        return pack(sequences, max_tokens)
    trunk.check()
    batches = []
    for group in trunk.split(sequences):
        batches += [[group[i] for i in batch] for batch in pack([sequences[i] for i in group], max_tokens)]
    return batches

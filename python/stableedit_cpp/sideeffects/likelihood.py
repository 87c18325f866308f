"""How likely a model finds texts and answers, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from stableedit_cpp.model.running import batches
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["answer_log_probabilities"]


def answer_log_probabilities(
    model: torch.nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    trunk: TrunkCache | None = None,
    on_done: Callable[[int], object] | None = None,
) -> list[torch.Tensor]:
    """Natural logarithm of the probability of each answer token, given what comes before it.

    Sequences that feed the same tokens, as the choices of one token each after one question do, share a forward pass.

    Args:
        max_tokens: tokens, padding included, in one forward pass.
        trunk: keeps and reuses the output of the layers that no edit changes.
        on_done: called with the number of sequences after each forward pass.

    Returns:
        for each sequence ``[answer tokens]`` float64 on the CPU.
    """
    sharing: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, sequence in enumerate(sequences):
        sharing.setdefault((sequence.ids, len(sequence.answer)), []).append(index)
    groups = list(sharing.values())
    different = [sequences[group[0]] for group in groups]
    found: list[torch.Tensor] = [torch.empty(0, device="cpu")] * len(sequences)
    for batch in batches(model, different, max_tokens=max_tokens, trunk=trunk):
        logits = batch.logits.to(torch.promote_types(batch.logits.dtype, torch.float32))
        parts = zip(batch.indices, logits.split(batch.sizes), logits.logsumexp(-1).split(batch.sizes), strict=True)
        for index, rows, normalizers in parts:
            for member in groups[index]:
                answer = torch.tensor(sequences[member].answer, device=rows.device)
                chosen_logits = rows.gather(-1, answer[:, None])[:, 0]
                found[member] = (chosen_logits.double() - normalizers.double()).cpu()
        if on_done is not None:
            on_done(sum(len(groups[index]) for index in batch.indices))
    return found

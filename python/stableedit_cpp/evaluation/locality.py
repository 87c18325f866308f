"""Locality: does the edited model still say what the unedited one said?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from stableedit_cpp.evaluation.divergence import kl_divergence, log_probabilities
from stableedit_cpp.model.running import answer_logits, input_device, untouched
from stableedit_cpp.model.tokens import TokenSequence, collate, pack

__all__ = ["Reference", "locality"]

# The unedited model, or what shows it for a while: ``editor.unedited``.
Reference = nn.Module | Callable[[], AbstractContextManager[nn.Module]]


def locality(
    model: nn.Module,
    reference: Reference,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    on_done: Callable[[int], object] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare the predictions of two models where they predict the answers of unrelated prompts.

    Args:
        reference: the unedited model; it runs batch by batch beside ``model``, so no outputs are stored.
        max_tokens: tokens, padding included, in one forward pass.
        on_done: called with the number of sequences after each batch.

    Returns:
        ``[sequences]`` float64 on the CPU each, means over the answer positions: share of them at which both models
        have the same top choice, and KL(unedited || edited) of their next-token distributions, in nats.

    Raises:
        ValueError: if the two have vocabularies of different sizes.
    """
    agreement = torch.zeros(len(sequences), dtype=torch.float64)
    divergence = torch.zeros(len(sequences), dtype=torch.float64)
    for indices in pack(sequences, max_tokens):
        chosen = [sequences[index] for index in indices]
        with nullcontext(reference) if isinstance(reference, nn.Module) else reference() as unedited:
            before = _log_probabilities(unedited, chosen)
        after = _log_probabilities(model, chosen)
        if before.shape != after.shape:
            raise ValueError(
                f"the reference model has a vocabulary of {before.shape[-1]} tokens, the model one of "
                f"{after.shape[-1]}; expected the unedited version of the same model"
            )
        before = before.to(after.device)
        same = (before.argmax(-1) == after.argmax(-1)).double().cpu()
        kl = kl_divergence(before, after)
        sizes = [len(sequence.answer) for sequence in chosen]
        agreement[indices] = torch.stack([part.mean() for part in same.split(sizes)])
        divergence[indices] = torch.stack([part.mean() for part in kl.split(sizes)])
        if on_done is not None:
            on_done(len(indices))
    return agreement, divergence


def _log_probabilities(model: nn.Module, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """``[n, vocabulary]``, in float32 or better."""
    with untouched(model), torch.no_grad():
        return log_probabilities(answer_logits(model, collate(sequences, input_device(model))))

"""Locality: does the edited model still say what the unedited one said?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from stableedit_cpp.evaluation.answers import refuse_broken
from stableedit_cpp.evaluation.divergence import kl_divergence, log_probabilities
from stableedit_cpp.model.running import batches
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["Reference", "locality"]

# The unedited model, or what shows it for a while: ``editor.unedited``.
Reference = nn.Module | Callable[[], AbstractContextManager[nn.Module]]

# Showing the unedited model copies every edited weight three times, so it answers many prompts at a time: as many as
# have so many log-probabilities, 256 MiB in float32.
_KEPT = 2**26


def locality(
    model: nn.Module,
    reference: Reference,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    trunk: TrunkCache | None = None,
    on_done: Callable[[int], object] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare the predictions of two models where they predict the answers of unrelated prompts.

    Args:
        max_tokens: tokens, padding included, in one forward pass.
        trunk: keeps and reuses the output of the layers that no edit changes, for both where they are one model.
        on_done: called with the number of sequences after each batch.

    Returns:
        ``[sequences]`` float64 on the CPU each, means over the answer positions: share of them at which both models
        have the same top choice, and KL(unedited || edited) of their next-token distributions, in nats. Where the
        edited model is broken they are 0 and NaN.

    Raises:
        ValueError: if the two have vocabularies of different sizes; a trunk cache whose layers have changed.
        ModelBroken: if the unedited model answers NaN.
    """
    agreement = torch.zeros(len(sequences), dtype=torch.float64, device="cpu")
    divergence = torch.zeros(len(sequences), dtype=torch.float64, device="cpu")
    for part in _parts(sequences, max(1, _KEPT // _vocabulary(model))):
        some = [sequences[index] for index in part]
        with nullcontext(reference) if isinstance(reference, nn.Module) else reference() as shown:
            unedited = _log_probabilities(shown, some, max_tokens, trunk if shown is model else None)
        refuse_broken(
            shown,
            [f"unrelated prompt {part[i]}" for i, rows in enumerate(unedited) if rows.isnan().any()],
            len(some),
            "the unedited model",
        )
        for batch in batches(model, some, max_tokens=max_tokens, trunk=trunk):
            after = log_probabilities(batch.logits)
            before = torch.cat([unedited[index] for index in batch.indices]).to(after.device)
            if before.shape != after.shape:
                raise ValueError(
                    f"the reference model has a vocabulary of {before.shape[-1]} tokens, the model one of "
                    f"{after.shape[-1]}; expected the unedited version of the same model"
                )
            kl = kl_divergence(before, after)
            same = (before.argmax(-1) == after.argmax(-1)).double().cpu()
            same[kl.isnan()] = 0.0  # the top choice among NaN is none
            owners = [part[index] for index in batch.indices]
            agreement[owners] = torch.stack([rows.mean() for rows in same.split(batch.sizes)])
            divergence[owners] = torch.stack([rows.mean() for rows in kl.split(batch.sizes)])
            if on_done is not None:
                on_done(len(owners))
    return agreement, divergence


def _log_probabilities(
    model: nn.Module, sequences: Sequence[TokenSequence], max_tokens: int, trunk: TrunkCache | None
) -> list[torch.Tensor]:
    """Of each sequence ``[answer tokens, vocabulary]``."""
    found: list[torch.Tensor] = [torch.empty(0, device="cpu")] * len(sequences)
    for batch in batches(model, sequences, max_tokens=max_tokens, trunk=trunk):
        for index, rows in zip(batch.indices, log_probabilities(batch.logits).split(batch.sizes), strict=True):
            found[index] = rows
    return found


def _parts(sequences: Sequence[TokenSequence], size: int) -> Iterator[list[int]]:
    """Indices in order, cut where ``size`` answer tokens are reached."""
    part, held = [], 0
    for index, sequence in enumerate(sequences):
        part.append(index)
        held += len(sequence.answer)
        if held >= size:
            yield part
            part, held = [], 0
    if part:
        yield part


def _vocabulary(model: nn.Module) -> int:
    """Its size, or that of a large one where the config does not say."""
    return getattr(model.config.get_text_config(), "vocab_size", 2**18)

"""How far a model's predictions are from the unedited model's: the one Kullback-Leibler divergence of this package."""

from __future__ import annotations

import torch

__all__ = ["kl_divergence", "log_probabilities"]


def log_probabilities(
    logits: torch.Tensor,  # [..., vocabulary]
) -> torch.Tensor:
    """Natural logarithm of the next-token distribution, ``[..., vocabulary]`` in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def kl_divergence(
    unedited: torch.Tensor,  # [..., vocabulary], log-probabilities
    edited: torch.Tensor,  # [..., vocabulary], log-probabilities, on the same device
) -> torch.Tensor:
    """KL(unedited || edited) in nats, ``[...]`` float64 on the CPU.

    A token that the unedited model rules out contributes nothing, whatever the edited one thinks of it; one that only
    the edited model rules out makes the divergence infinite. NaN stays NaN: a model that says nothing has not stayed
    where it was.
    """
    terms = unedited.exp() * (unedited - edited)
    return torch.where(unedited == -torch.inf, 0.0, terms).sum(-1, dtype=torch.float64).cpu()

"""Next-token distributions of which only the likeliest tokens are told apart: what is kept of the unedited model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

__all__ = ["TopTokens", "divergence", "joined", "top_tokens"]


class TopTokens(NamedTuple):
    """At n positions: a few kilobytes in the place of a vocabulary each.

    Attributes:
        tokens: the k likeliest, ``[n, k]`` int64.
        likely: their log-probabilities, ``[n, k]``.
        rest: that of all others together, ``[n]``; -inf where there are none.
    """

    tokens: torch.Tensor
    likely: torch.Tensor
    rest: torch.Tensor

    def split(self, sizes: list[int]) -> list[TopTokens]:
        """Cut into parts of so many positions, each with memory of its own."""
        parts = zip(*(part.split(sizes) for part in self), strict=True)
        return [TopTokens(*(tensor.clone() for tensor in part)) for part in parts]


def joined(parts: Iterable[TopTokens]) -> TopTokens:
    """All positions, one part's after the other's."""
    return TopTokens(*map(torch.cat, zip(*parts, strict=True)))


def top_tokens(
    likely: torch.Tensor,  # [n, vocabulary], log-probabilities
    count: int,
) -> TopTokens:
    """The ``count`` likeliest tokens at each position (all, if there are no more), in host memory."""
    values, tokens = likely.topk(min(count, likely.shape[-1]), dim=-1)
    return TopTokens(tokens.cpu(), values.cpu(), _rest(likely, tokens).cpu())


def divergence(
    unedited: TopTokens,
    edited: torch.Tensor,  # [n, vocabulary], log-probabilities
) -> torch.Tensor:
    """KL(unedited || edited) in nats, ``[n]``, differentiable, between the distributions over the likeliest tokens and
    "any other". Never more than that over all tokens (log sum inequality); zero where the two agree on these."""
    tokens = unedited.tokens.to(edited.device)
    expected = torch.cat([unedited.likely, unedited.rest.unsqueeze(-1)], -1).to(edited)
    found = torch.cat([edited.gather(-1, tokens), _rest(edited, tokens).unsqueeze(-1)], -1)
    # What the unedited model rules out counts nothing; zero times infinity would be NaN, in the gradient, too.
    possible = expected > -torch.inf
    difference = torch.where(possible, expected, 0.0) - torch.where(possible, found, 0.0)
    return (expected.exp() * difference).sum(-1)


def _rest(likely: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of all tokens but these, as a sum over them: one minus that of these would be rounding alone."""
    if tokens.shape[-1] == likely.shape[-1]:
        return torch.full_like(likely[..., 0], -torch.inf)
    return likely.scatter(-1, tokens, -torch.inf).logsumexp(-1)

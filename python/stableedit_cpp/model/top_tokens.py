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
    logits: torch.Tensor,  # [n, vocabulary], of the edited model
) -> torch.Tensor:
    """KL(unedited || edited) in nats, ``[n]``, differentiable, between the distributions over the likeliest tokens and
    "any other". Never more than that over all tokens (log sum inequality); zero where the two agree on these."""
    tokens = unedited.tokens.to(logits.device)
    expected = torch.cat([unedited.likely, unedited.rest.unsqueeze(-1)], -1).to(logits)
    found = _Grouped.apply(logits, tokens).log_softmax(-1)
    # What the unedited model rules out counts nothing; zero times infinity would be NaN, in the gradient, too.
    possible = expected > -torch.inf
    difference = torch.where(possible, expected, 0.0) - torch.where(possible, found, 0.0)
    return (expected.exp() * difference).sum(-1)


class _Grouped(torch.autograd.Function):
    """The logits of these tokens and, behind them, that of all others together, ``[n, k + 1]``.

    Equivalent to ``cat([logits.gather(-1, tokens), logits.scatter(-1, tokens, -inf).logsumexp(-1, True)], -1)``, in
    half of its passes over the vocabulary: most of the time of a divergence.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        others = logits.scatter(-1, tokens, -torch.inf)
        highest = others.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
        shares = others.sub_(highest).exp_()
        total = shares.sum(-1, keepdim=True)
        ctx.save_for_backward(shares, total, tokens)
        return torch.cat([logits.gather(-1, tokens), highest + total.log()], -1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        shares, total, tokens = ctx.saved_tensors
        # Without others their share is nothing, and so is the gradient.
        result = shares * (gradient[..., -1:] / total.clamp_min(torch.finfo(total.dtype).tiny))
        return result.scatter_(-1, tokens, gradient[..., :-1]), None


def _rest(likely: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of all tokens but these, as a sum over them: one minus that of these would be rounding alone."""
    if tokens.shape[-1] == likely.shape[-1]:
        return torch.full_like(likely[..., 0], -torch.inf)
    return likely.scatter(-1, tokens, -torch.inf).logsumexp(-1)

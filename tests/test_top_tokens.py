"""Distributions of which only the likeliest tokens are told apart, and the divergence from them."""

from __future__ import annotations

import pytest
import torch

from stableedit_cpp.model.top_tokens import divergence, top_tokens


def logits_of(seed: int, vocabulary: int = 9, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """``[4, vocabulary]``."""
    return 3 * torch.randn(4, vocabulary, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def grouped(likely: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Probabilities of these tokens, and of all others together, ``[n, k + 1]``."""
    named = likely.exp().gather(-1, tokens)
    return torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_is_the_divergence_between_the_groups(count):
    unedited, edited = logits_of(0).log_softmax(-1), logits_of(1)
    kept = top_tokens(unedited, count)
    p, q = (grouped(likely, kept.tokens) for likely in (unedited, edited.log_softmax(-1)))
    torch.testing.assert_close(divergence(kept, edited), (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(divergence(kept, edited + 100), divergence(kept, edited))  # logits need no scale
    assert (divergence(kept, unedited).abs() < 1e-12).all()


@pytest.mark.parametrize("count", [1, 4, 9, 20])
def test_gradient(count):
    kept = top_tokens(logits_of(0).log_softmax(-1), count)
    assert torch.autograd.gradcheck(lambda logits: divergence(kept, logits), logits_of(1).requires_grad_())
    whole = torch.nn.functional.kl_div(
        logits_of(1).log_softmax(-1), logits_of(0).log_softmax(-1), reduction="none", log_target=True
    )
    assert (divergence(kept, logits_of(1)) <= whole.sum(-1) + 1e-12).all()
    assert count < 9 or torch.allclose(divergence(kept, logits_of(1)), whole.sum(-1))


def test_far_away_and_ruled_out():
    """Where the rest is less likely than a float32 can say, and where tokens are impossible."""
    unedited = logits_of(0, dtype=torch.float32).log_softmax(-1)
    kept = top_tokens(unedited, 2)
    edited = torch.full((4, 9), -300.0).scatter(-1, kept.tokens, 0.0).requires_grad_()
    divergence(kept, edited).sum().backward()
    assert edited.grad.isfinite().all() and edited.grad.abs().sum() > 0.1
    certain = torch.full((4, 9), -torch.inf)
    certain[:, 0] = 0.0
    edited = logits_of(1, dtype=torch.float32).requires_grad_()
    loss = divergence(top_tokens(certain, 2), edited)
    torch.testing.assert_close(loss, -edited.log_softmax(-1)[:, 0])
    loss.sum().backward()
    torch.testing.assert_close(edited.grad, edited.detach().softmax(-1) - certain.exp())
    assert divergence(kept, torch.full((4, 9), torch.nan)).isnan().all()

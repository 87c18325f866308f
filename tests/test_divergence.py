"""The Kullback-Leibler divergence from the unedited model, against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from stableedit_cpp.evaluation.divergence import kl_divergence, log_probabilities

INF, NAN = float("inf"), float("nan")


def by_the_definition(p: list[float], q: list[float]) -> float:
    """Sum of p log(p / q), where 0 log 0 is 0."""
    return math.fsum(a * math.log(a / b) if b > 0 else INF for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.half, 1e-5)]
)
def test_equals_the_definition(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    before, after = (3 * torch.randn(2, 4, 500, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    found = kl_divergence(log_probabilities(before), log_probabilities(after))
    assert found.shape == (2, 4)
    assert found.dtype == torch.float64
    for place in [(0, 0), (1, 3)]:
        p, q = (logits[place].double().softmax(0).tolist() for logits in (before, after))
        assert float(found[place]) == pytest.approx(by_the_definition(p, q), rel=tolerance)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([0.0, 1.0], [0.0, 1.0], 0.0),
        ([-INF, 0.0], [-INF, 0.0], 0.0),  # ruled out by both
        ([-INF, 0.0], [0.0, 0.0], math.log(2)),  # ruled out by the unedited model alone
        ([0.0, 0.0], [-INF, 0.0], INF),  # ruled out by the edited model alone
        ([0.0, 0.0], [NAN, 0.0], NAN),
        ([NAN, 0.0], [0.0, 0.0], NAN),
        ([-INF, 0.0], [NAN, NAN], NAN),
        ([0.0, 0.0], [INF, 0.0], NAN),  # what an overflow leaves behind
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_edges(before, after, expected, dtype):
    both = [log_probabilities(torch.tensor(logits, dtype=dtype)) for logits in (before, after)]
    assert float(kl_divergence(*both)) == pytest.approx(expected, nan_ok=True)

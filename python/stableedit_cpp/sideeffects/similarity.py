"""How far hidden states have moved: linear CKA, and MMD with a permutation test."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["MMD", "linear_cka", "mmd", "relative_shift"]


class MMD(NamedTuple):
    """
    Attributes:
        squared: unbiased estimate of the squared maximum mean discrepancy; around 0 for equal distributions.
        p_value: of the permutation test. bandwidth: sigma of the kernel, the median distance of all states.
    """

    squared: float
    p_value: float
    bandwidth: float


def relative_shift(
    before: np.ndarray,  # [n, d]
    after: np.ndarray,  # [n, d], the same prompts
) -> float:
    """Mean over prompts of ``||after - before|| / ||before||``."""
    before, after = before.astype(np.float64), after.astype(np.float64)
    return float(np.mean(np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1)))


def linear_cka(
    first: np.ndarray,  # [n, d]
    second: np.ndarray,  # [n, e], the same n prompts
) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, eq. 3 and 4), in [0, 1].

    1 for states that differ by a rotation, a scale and an offset; nothing else leaves it at 1.
    """
    first = first.astype(np.float64) - first.mean(0, dtype=np.float64)
    second = second.astype(np.float64) - second.mean(0, dtype=np.float64)
    gram, other = first @ first.T, second @ second.T
    return float((gram * other).sum() / (np.linalg.norm(gram) * np.linalg.norm(other)))


def mmd(
    first: np.ndarray,  # [n, d]
    second: np.ndarray,  # [m, d]
    *,
    paired: bool,
    permutations: int = 1000,
    seed: int = 0,
) -> MMD:
    """Maximum mean discrepancy with the kernel ``exp(-||x - y||^2 / (2 sigma^2))`` (Gretton et al. 2012, lemma 6).

    Args:
        paired: exchange the two states of a prompt at random, which finds any systematic change of the same prompts.
            Otherwise all states are mixed, which asks whether the two clouds differ by more than prompts differ among
            each other; with the same prompts in both, that test is conservative.
        permutations: the smallest possible p-value is about ``1 / permutations``.
    """
    from scipy.spatial.distance import pdist, squareform
    from scipy.stats import permutation_test

    both = np.concatenate([first, second]).astype(np.float64)
    n, m = len(first), len(second)
    distances = pdist(both)
    bandwidth = float(np.median(distances))
    values = np.exp(-(distances**2) / (2 * bandwidth**2)) if bandwidth > 0 else np.ones_like(distances)
    kernel = squareform(values)  # with zeros on the diagonal: the unbiased estimate leaves those pairs out

    def squared(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        """Of samples given as indices ``[.., n]`` and ``[.., m]`` into ``both``."""
        chosen = np.zeros((*x.shape[:-1], n + m))
        np.put_along_axis(chosen, x.astype(np.intp), 1.0, axis=-1)
        within = ((chosen @ kernel) * chosen).sum(-1)
        rows = chosen @ kernel.sum(0)
        others = kernel.sum() - 2 * rows + within
        found = within / (n * (n - 1)) + others / (m * (m - 1)) - 2 * (rows - within) / (n * m)
        return found.round(10)  # exchanging equal states is a tie, whatever the last bits say

    test = permutation_test(
        (np.arange(n), np.arange(n, n + m)),
        squared,
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=permutations,
        batch=200,
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    return MMD(float(test.statistic), float(test.pvalue), bandwidth)

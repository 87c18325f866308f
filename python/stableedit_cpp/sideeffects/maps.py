"""Pictures of hidden states: two coordinates for each prompt, before and after."""

from __future__ import annotations

import warnings

import numpy as np
import torch

__all__ = ["MAPS", "embed"]

MAPS = ("pca", "umap")


def embed(
    before: np.ndarray,  # [n, d]
    after: np.ndarray,  # [m, d]
    method: str,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """``[n, 2]`` and ``[m, 2]``: one map of both, so that the two can be laid over each other.

    Args:
        method: ``"pca"`` or ``"umap"`` (15 neighbours, minimal distance 0.1, its defaults).
    """
    both = np.concatenate([before, after]).astype(np.float64)
    if method == "pca":
        from sklearn.decomposition import PCA

        found = PCA(n_components=2, random_state=seed).fit_transform(both)
    else:
        threads = torch.get_num_threads()
        try:
            from umap import UMAP

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a seed rules out threads, and that few points are few
                found = UMAP(n_neighbors=min(15, len(both) - 1), random_state=seed, n_jobs=1).fit_transform(both)
        finally:
            torch.set_num_threads(threads)  # numba shares OpenMP with torch, and sets it to all cores
    return found[: len(before)], found[len(before) :]

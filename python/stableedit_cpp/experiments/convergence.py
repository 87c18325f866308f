"""How fast the running covariance comes near that of the whole stream (Theorem 3.6)."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch

from stableedit_cpp.core import load_safetensors, save_safetensors
from stableedit_cpp.editors import Editor
from stableedit_cpp.experiments.geometry import covariance_of

__all__ = ["Convergence", "fit_rate"]

_RATIO = 1.3  # between the turns at which the covariance is kept


class Convergence:
    """Keeps running covariances, by group of modules, as files of a directory.

    After a resumed stream they are the same as after one that was not interrupted, because the same turns are kept.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def look(self, editor: Editor, turn: int, edits: int) -> None:
        """Keep the covariances after some of the turns, ever fewer.

        Args:
            edits: so far, warm-up edits included.
        """
        covariances = _covariances(editor)
        if covariances and math.floor(math.log(turn, _RATIO)) != math.floor(math.log(turn + 1, _RATIO)):
            self._directory.mkdir(parents=True, exist_ok=True)
            tensors = {str(index): covariance.float().cpu() for index, covariance in enumerate(covariances.values())}
            samples = {f"samples {i}": str(editor.normalizers[group].count) for i, group in enumerate(covariances)}
            path = self._directory / f"turn-{turn:07d}.safetensors"
            save_safetensors(path, tensors, {**samples, "edits": str(edits)})

    def fit(self, editor: Editor) -> dict[str, dict]:
        """By group: distances to the covariance that the editor has now, ``||S_n - S_N|| / ||S_N||`` (Frobenius), and
        the rate at which they fall. Removes the files."""
        files = [load_safetensors(path) for path in sorted(self._directory.glob("*.safetensors"))]
        result = {}
        for index, (group, covariance) in enumerate(_covariances(editor).items()):
            reference, total = covariance.float().cpu(), editor.normalizers[group].count
            points = [
                {
                    "edits": int(about["edits"]),
                    "samples": int(about[f"samples {index}"]),
                    "distance": float((tensors[str(index)] - reference).norm() / reference.norm()),
                }
                for tensors, about in files
                if int(about[f"samples {index}"]) < total
            ]
            result[group] = {"points": points, "reference_samples": total, **fit_rate(points, total)}
        shutil.rmtree(self._directory, ignore_errors=True)
        return result


def _covariances(editor: Editor) -> dict[str, torch.Tensor]:
    """By group; none before all groups have one."""
    found = {group: covariance_of(normalizer) for group, normalizer in editor.normalizers.items()}
    return found if all(covariance is not None for covariance in found.values()) else {}


def fit_rate(points: list[dict], total: int) -> dict[str, float | None]:
    """Slope of log distance over log(1/n - 1/N), by least squares, and its standard error; n < N = ``total``.

    The mean of n of N independent samples is off that of all N by an expected square of c (1/n - 1/N): the slope of
    independent samples is 1/2, also where n comes near N.
    """
    chosen = [point for point in points if point["distance"] > 0]
    if len(chosen) < 3:
        return {"rate": None, "rate_standard_error": None}
    x = torch.tensor([1 / point["samples"] - 1 / total for point in chosen], dtype=torch.float64, device="cpu").log()
    y = torch.tensor([point["distance"] for point in chosen], dtype=torch.float64, device="cpu").log()
    x_mean, y_mean = x.mean(), y.mean()
    spread = (x - x_mean).square().sum()
    rate = ((x - x_mean) * (y - y_mean)).sum() / spread
    left = y - y_mean - rate * (x - x_mean)
    error = (left.square().sum() / (len(chosen) - 2) / spread).sqrt()
    return {"rate": float(rate), "rate_standard_error": float(error)}

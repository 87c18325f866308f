"""One turn of the published mathematics on synthetic keys and gradients, by part."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from common import Parts, summary
from published import PublishedOptions, RunningStatistics, load, published_targets, published_update, save
from stableedit_cpp.core import LifelongNormalizer
from synthetic import Source

MICRO_BATCHES = 10


def published_statistics(base: LifelongNormalizer, nu: int, device: torch.device) -> RunningStatistics:
    """The statistics of ``base``, counted as often as nu asks."""
    running = RunningStatistics(base.key_dim, base.value_dim, device)
    times = nu / base.count
    running.count = nu
    running.psi = (base.value_tracker.psi() * times).float().to(device)
    running.mean = base.value_tracker.mean().float().to(device)
    running.key_mean = base.key_moments.mean().float().to(device)
    running.key_m2 = (base.key_moments.m2() * times).float().to(device)
    return running


@torch.no_grad()
def published_turns(
    source: Source,
    running: RunningStatistics,
    weights: list[torch.Tensor],
    options: PublishedOptions,
    *,
    modules: int,
    rows: int,
    turns: int,
) -> dict[str, object]:
    """Averages over turns of the first ``modules`` modules, scaled to all of them; times include disk and statistics,
    which the published code does while it captures."""
    records = []
    for _ in range(turns):
        keys, gradients = source.turn(modules, rows)
        with tempfile.TemporaryDirectory() as name:
            records.append(_turn(Path(name), keys, gradients, running, weights, options, source.device))
    scale = len(weights) / modules
    result = summary(records)
    result["ms_per_turn"] *= scale
    result["ms_by_part"] = {part: scale * value for part, value in result["ms_by_part"].items()}
    return {**result, "turns": turns, "modules_measured": modules, "scaled_by": scale}


def _turn(
    directory: Path,
    keys: list[torch.Tensor],
    gradients: list[torch.Tensor],
    running: RunningStatistics,
    weights: list[torch.Tensor],
    options: PublishedOptions,
    device: torch.device,
) -> Parts:
    parts = Parts(device, trim=True)
    batches = 0
    for module, (h, g) in enumerate(zip(keys, gradients, strict=True)):
        pieces = list(zip(h.chunk(MICRO_BATCHES), g.chunk(MICRO_BATCHES), strict=True))
        batches = len(pieces)
        for batch, (few, some) in enumerate(pieces):
            parts.run("statistics", running.update, few, some)
            parts.run("disk", save, directory, module, batch, few.clone(), some.clone())
    for module, weight in enumerate(weights[: len(keys)]):
        h, g = parts.run("disk", load, directory, module, batches)
        before = parts.seconds.get("decomposition", 0.0)
        targets = parts.run("targets", published_targets, h, g, running, options, False, parts.run)
        parts.seconds["targets"] -= parts.seconds["decomposition"] - before  # which ran within the targets
        shift = parts.run("solve", published_update, h, targets, options.ridge)
        parts.run("apply", weight.add_, shift.T)
        del shift
    return parts

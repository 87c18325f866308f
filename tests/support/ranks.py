"""Several processes that work together, forked from the one that tests: they need not load torch again."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

_PATIENCE = timedelta(seconds=60)


def together(
    size: int,
    work: Callable[[int], object],
    directory: Path,
    *,
    backend: str = "gloo",
    patience: timedelta = _PATIENCE,
) -> list[object]:
    """What ``work``, called with its rank, gives in each of ``size`` processes of a group: its result, or the error
    that it raised; None where the process ended without a word.

    Args:
        directory: an empty one, for what they say to each other.
    """
    fork = multiprocessing.get_context("fork")

    def run(rank: int) -> None:
        meet = f"file://{directory}/meet"
        dist.init_process_group(backend, init_method=meet, rank=rank, world_size=size, timeout=patience)
        try:
            found = work(rank)
        except BaseException as error:
            traceback.print_exc()
            found = error
        torch.save(found, directory / f"{rank}.part")
        os.replace(directory / f"{rank}.part", directory / f"{rank}.pt")
        os._exit(0)

    processes = [fork.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    paths = [directory / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]

"""How the ``stableedit`` command shares a machine: settled in its environment, before torch is loaded.

A program that imports ``stableedit_cpp`` is left alone: it may have reasons of its own. docs/speed.md says what it can
set, and what each of these settings was measured to do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cores", "settle"]

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def settle() -> None:
    """Set what the user has not set. Torch and its libraries read it when they are loaded."""
    environment = os.environ
    # oneDNN keeps a compiled kernel for every shape of a batch, a thousand of them in two caches: 300 MiB along a
    # stream whose batches hardly ever have the same shape twice.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        environment.setdefault(cache, "64")
    # Threads that wait for each other spin, for milliseconds. Where something else wants the cores, the one that is
    # waited for is not running, and an edit takes ten times as long.
    if not any(name in environment for name in _WAITING):
        environment["OMP_WAIT_POLICY"] = "passive"
    # A container may see 64 cores and be granted two.
    granted = cores()
    if math.isfinite(granted) and not any(name in environment for name in _COUNTS):
        granted = min(granted, len(os.sched_getaffinity(0)))
        environment["OMP_NUM_THREADS"] = str(max(1, int(granted)))


def cores(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that the control groups of this process grant it; infinite where they set no limit.

    Args:
        groups: the groups of this process, "number:controllers:path" a line (cgroups(7)).
        root: where they are mounted.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return math.inf
    return min((limit for line in lines for limit in _limits(*line.split(":", 2)[1:], root)), default=math.inf)


def _limits(controllers: str, path: str, root: Path) -> Iterator[float]:
    """Of one group and those above it; in a container the path may be that outside of it, and is not there."""
    if controllers == "":  # version 2
        mounts = [root, root / "unified"]
    elif "cpu" in controllers.split(","):  # version 1
        mounts = [root / controllers, root / "cpu"]
    else:
        return
    for mount in mounts:
        group = mount / path.lstrip("/")
        for directory in (group, *group.parents):
            yield from _limit(directory)
            if directory == mount:
                break


def _limit(directory: Path) -> Iterator[float]:
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (directory / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
        if int(quota) > 0:  # -1 is no limit; so is "max"
            yield int(quota) / int(period)
    except (OSError, ValueError):
        return

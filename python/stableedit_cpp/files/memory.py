"""How much memory is in use."""

from __future__ import annotations

import os
import resource

import torch

__all__ = ["reserved_peak_bytes", "resident_bytes"]


def resident_bytes() -> int:
    """Resident memory of this process; where the system does not say it (not Linux), its peak so far."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reserved_peak_bytes(device: torch.device) -> int | None:
    """Most memory that tensors had on an accelerator so far; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

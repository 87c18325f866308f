"""What a result comes from: versions, build, hardware, source, time; and the memory in use."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

from stableedit_cpp import _build_info, _core
from stableedit_cpp.files.words import now

__all__ = [
    "PeakMemory",
    "cmake_prefix",
    "environment",
    "give_back_freed",
    "provenance",
    "reserved_peak_bytes",
    "resident_bytes",
]

_PACKAGES = ("transformers", "tokenizers", "safetensors", "numpy", "tqdm", "gguf", "peft")


def environment() -> dict[str, object]:
    """Versions, build and hardware; also kept in every report."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "stableedit_cpp": _build_info.version,
        "built against torch": _build_info.torch_version,
        "compiler": f"{_build_info.compiler} ({_build_info.build_type})",
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        "threads wait": os.environ.get("OMP_WAIT_POLICY", "as torch has it"),
        "cuda": torch.version.cuda or "not in this torch",
        "cuda devices": devices or "none",
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "memory (GiB)": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **{name: _version(name) for name in _PACKAGES},
    }


def provenance() -> dict[str, object]:
    """Where what is made now comes from; every result and every export keeps it.

    Returns:
        ``started``, ``command`` (what this process was called with), ``environment``, ``git`` and ``git_dirty`` (the
        commit of the source tree that this package runs from, and whether files differ from it; None outside of one).
    """
    command = ["stableedit", *sys.argv[1:]]
    return {"started": now(), "command": command, **_git(), "environment": environment()}


def cmake_prefix() -> Path:
    """What CMAKE_PREFIX_PATH needs for ``find_package(stableedit)``: the directory with lib/ and include/.

    It lies beside the extension module, which in an editable install is not where the Python files are.
    """
    return Path(_core.__file__).parent


def resident_bytes() -> int:
    """Resident memory of this process; where the system does not say it (not Linux), its peak so far."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def give_back_freed() -> None:
    """Let the system have what this process has freed, where the allocator can (glibc).

    glibc keeps it for later; but where large blocks, each of another size, lie between small ones that stay, it finds
    no use for it and takes more (docs/scale.md). Takes some milliseconds.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Measures how much memory this process takes within a ``with`` block beyond what is resident when it begins.

    Attributes:
        extra_bytes: after the block; None where the system does not say (only Linux does).
    """

    extra_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        give_back_freed()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
            self._before = resident_bytes()
        except OSError:
            self._before = None
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._before is not None:
            lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
            peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
            self.extra_bytes = None if peak is None else max(0, peak - self._before)


def reserved_peak_bytes(device: torch.device) -> int | None:
    """Most memory that tensors had on an accelerator so far; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _git() -> dict[str, object]:
    def ask(*arguments: str) -> str | None:
        home = Path(__file__).parent
        try:
            done = subprocess.run(["git", "-C", home, *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", Path(__file__).name) is None:  # installed somewhere within another repository
        return {"git": None, "git_dirty": None}
    return {"git": ask("rev-parse", "HEAD"), "git_dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

"""What every benchmark shares: command line, timing, peak memory, provenance, JSON."""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from stableedit_cpp.files.atomic import check_writable_file, write_json
from stableedit_cpp.files.environment import environment, resident_bytes
from stableedit_cpp.files.words import now

_Result = TypeVar("_Result")


def new_parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  python bench/{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", metavar="FILE", help="also write the JSON there, e.g. below bench/results/")
    return parser


def start(options: argparse.Namespace) -> torch.device:
    """Apply the shared options; call before any work."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.json:
        check_writable_file(options.json)
    torch.manual_seed(0)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # set_device asks for an index
        torch.cuda.set_device(device)
    return device


def finish(name: str, options: argparse.Namespace, device: torch.device, results: dict[str, object]) -> None:
    """Print the results with where they come from, and write them if asked."""
    machine = {"device": device_name(device), "date": now(), **environment()}
    settings = {key: _nameless(value) for key, value in vars(options).items() if key != "json"}
    document = {"benchmark": name, **_rounded(results), "settings": settings, "machine": machine}
    print(json.dumps(document, indent=2))
    if options.json:
        write_json(options.json, document)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{environment()['processor']}, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, function: Callable[..., _Result], *arguments: object) -> tuple[_Result, float]:
    """(result, seconds) of a call: by events on CUDA, else by the clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        result = function(*arguments)
        return result, time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    first.record()
    result = function(*arguments)
    last.record()
    last.synchronize()
    return result, first.elapsed_time(last) / 1000


class Parts:
    """Seconds and peak extra bytes of the named parts of one piece of work.

    Peak extra bytes are those above what was in memory at the beginning, so what an earlier part leaves behind
    counts for the later ones. ``trim`` first gives memory that was freed back to the system, which would otherwise hide
    what this work needs; the pages have to be fetched again, so small work is measured a little slower.
    """

    def __init__(self, device: torch.device, trim: bool = False) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        if trim and device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)
        self._base = memory_now(device)

    def run(self, name: str, function: Callable[..., _Result], *arguments: object) -> _Result:
        with peak_memory(self.device) as peak:
            result, seconds = timed(self.device, function, *arguments)
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.peak[name] = max(self.peak.get(name, 0), peak[0] - self._base)
        return result


def summary(records: list[Parts]) -> dict[str, object]:
    """Mean time and largest memory of the turns, by part."""
    names = list(records[0].seconds)
    by_part = {name: 1000 * statistics.mean(record.seconds[name] for record in records) for name in names}
    peaks = {name: max(record.peak[name] for record in records) for name in names}
    return {
        "ms_per_turn": sum(by_part.values()),
        "ms_by_part": by_part,
        "peak_bytes": max(peaks.values()),
        "peak_bytes_by_part": peaks,
    }


def memory_now(device: torch.device) -> int:
    """Bytes in use: of tensors on CUDA, resident memory of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resident_bytes()


@contextmanager
def peak_memory(device: torch.device, interval: float = 0.005) -> Iterator[list[int]]:
    """Yields a list whose only item is, after the block, the largest ``memory_now`` within it."""
    peak = [memory_now(device)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(interval):
            peak[0] = max(peak[0], memory_now(device))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()
        peak[0] = max(peak[0], memory_now(device))


def milliseconds(values: list[float]) -> dict[str, float]:
    """Summary of repeats that are given in seconds."""
    values = [1000 * value for value in values]
    return {"median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values), "runs": len(values)}


def data_file(directory: str, name: str) -> Path:
    """A data set below --data, e.g. zsre/zsre_edit_5k.json."""
    path = Path(directory) / name
    if not path.exists():
        raise SystemExit(f"there is no {path}; say with --data where the data sets are")
    return path


def _nameless(value: object) -> object:
    """Of a path of this machine the last part, which is all that means something elsewhere."""
    return Path(value).name if isinstance(value, (str, Path)) and Path(value).is_absolute() else value


def _rounded(value: object) -> object:
    """Five significant digits: timings carry no more."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value

"""What an edit takes beside other work, by how the threads of torch wait for each other."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from common import finish, new_parser, start
from stableedit_cpp import StableEdit, StableEditConfig
from stableedit_cpp.cli.process import settle
from stableedit_cpp.files.digest import model_digest
from workload import add_model_options, pretrained, zsre

# What `stableedit` sets is asked of the command line itself. The rest is what else could have been set.
WAYS = {
    "torch's own": {},
    "stableedit": None,
    "spin 1,000 times": {"GOMP_SPINCOUNT": "1000"},
    "spin 30,000 times": {"GOMP_SPINCOUNT": "30000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


FIGURES = ("seconds", "processor_seconds", "cores_of_others")


def main() -> None:
    parser = new_parser(
        "Edits in a process of its own, alone and beside processes that compute, with each way of waiting in turn.",
        "threads.py --edits 100 --busy 0 2 --json bench/results/threads.json",
    )
    add_model_options(parser)
    parser.add_argument("--edits", type=int, default=100, metavar="N", help="that are timed (default 100)")
    parser.add_argument("--turn-size", type=int, default=20, metavar="N", help="requests a turn (default 20)")
    parser.add_argument(
        "--busy", type=int, nargs="+", default=[0, 2], metavar="N", help="processes beside (default 0 2)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each (default 3)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY", help="default: all")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = start(options)
    if options.once:
        print(json.dumps(edit(options, device)))
        return
    runs = {str(busy): {way: [] for way in options.ways} for busy in options.busy}
    for _ in range(options.rounds):
        for busy, way in itertools.product(options.busy, options.ways):
            runs[str(busy)][way].append(run(environment_of(way), busy))
            print(f"{busy} beside, {way}: {runs[str(busy)][way][-1]}", file=sys.stderr)
    medians = {
        busy: {way: {key: statistics.median(run[key] for run in of) for key in FIGURES} for way, of in ways.items()}
        for busy, ways in runs.items()
    }
    weights = {
        run["weights"] for ways in runs.values() for way, of in ways.items() if way != "one thread" for run in of
    }
    finish("threads", options, device, {"medians": medians, "same_weights": len(weights) == 1, "runs": runs})


def environment_of(way: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    if WAYS[way] is not None:
        return clean | WAYS[way]
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(clean)
        settle()
        return dict(os.environ)
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(environment: dict[str, str], busy: int) -> dict[str, object]:
    """One process that edits, and ``busy`` others."""
    with computing(busy):
        done = subprocess.run(
            [sys.executable, *sys.argv, "--once"], env=environment, capture_output=True, text=True, check=True
        )
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def computing(count: int) -> Iterator[None]:
    others = [multiprocessing.Process(target=_forever, daemon=True) for _ in range(count)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def _forever() -> None:
    while True:
        pass


def edit(options: argparse.Namespace, device) -> dict[str, object]:
    """Seconds and processor seconds of the edits, and how many cores' worth of time went to others meanwhile."""
    model, tokenizer, modules = pretrained(options, device)
    requests = zsre(options, options.turn_size + options.edits)
    config = StableEditConfig.one_pass(edit_modules=[module.name for module in modules], turn_size=options.turn_size)
    editor = StableEdit(model, tokenizer, config)
    editor.edit(requests[: options.turn_size], progress=False)
    begin, own, all_ = time.perf_counter(), time.process_time(), machine_seconds()
    editor.edit(requests[options.turn_size :], progress=False)
    seconds, own, all_ = time.perf_counter() - begin, time.process_time() - own, machine_seconds() - all_
    return {
        "seconds": seconds,
        "processor_seconds": own,
        "cores_of_others": (all_ - own) / seconds,
        "weights": model_digest(model),
    }


def machine_seconds() -> float:
    """Seconds that all cores together have worked so far."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, interrupt, soft = map(int, file.readline().split()[1:8])
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()

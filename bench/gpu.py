"""All speed benchmarks on a CUDA device, one after the other, into a directory with the card's name."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

# Of each script what differs from its defaults; those of the second need the data sets of --data.
SCRIPTS: dict[str, list[str]] = {
    "editing_math": ["--shape", "mistral-7b"],
    "whitening": ["--dim", "4096"],
    "past_keys": ["--shape", "mistral-7b"],
    "rivals_math": [],
    "scaling": ["--turns", "20000"],
}
WITH_DATA: dict[str, list[str]] = {
    "capture": ["--config", "mistral-7b", "--dtype", "bfloat16"],
    "evaluation": [],
    "large_model_1.2b": ["--config", "llama-1.2b"],
    "large_model_3b": ["--config", "llama-3b"],
    "large_model_7b": ["--config", "mistral-7b"],
    "located_targets": [],
    "refresh": [],
    "stream": ["--score"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(
            "Runs the tests that need a CUDA device, then every speed benchmark with --device cuda, and writes their "
            "JSON to bench/results/gpu/ below the card's name.\nWhat fails is said at the end and does not keep the "
            "rest from running; without a CUDA device nothing is run."
        ),
        epilog="example:\n  python bench/gpu.py --only editing_math large_model_7b",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="../shared/data", metavar="DIR", help="data sets (default ../shared/data)")
    parser.add_argument("--output", default="bench/results/gpu", metavar="DIR", help="(default %(default)s)")
    names = [*SCRIPTS, *WITH_DATA]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--no-tests", action="store_true", help="benchmarks alone")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "There is no CUDA device here, or torch is built without CUDA, so nothing was tested or measured: run this "
            "on a machine with a card and a CUDA build of torch."
        )
        return
    output = Path(options.output) / card()
    output.mkdir(parents=True, exist_ok=True)
    commands = [] if options.no_tests else [("tests", [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:xdist"])]
    missing = not Path(options.data).is_dir()
    for name in options.only or names:
        if name in WITH_DATA and missing:
            print(f"left out {name}: there are no data sets in {options.data}; say with --data where they are")
            continue
        commands.append((name, command(name, options.data, output)))
    failed = []
    for name, arguments in commands:
        begin = time.perf_counter()
        print(f"==> {' '.join(arguments)}", flush=True)
        if subprocess.run(arguments, stdout=None if name == "tests" else subprocess.DEVNULL).returncode:
            failed.append(name)
        print(f"    {name}: {time.perf_counter() - begin:.0f} s{', FAILED' if name in failed else ''}", flush=True)
    print(f"results are in {output}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the rest is done")


def card() -> str:
    """The name of the card, as a directory may be called: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def command(name: str, data: str, output: Path) -> list[str]:
    script = "large_model" if name.startswith("large_model") else name
    arguments = [sys.executable, f"bench/{script}.py", *(SCRIPTS | WITH_DATA)[name], "--device", "cuda"]
    if name in WITH_DATA:
        arguments += ["--data", data]
    return [*arguments, "--json", str(output / f"{name}.json")]


if __name__ == "__main__":
    main()

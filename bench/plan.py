"""What `stableedit plan` says of a stream before it begins, beside what the stream then takes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import stableedit_cpp as se
from common import finish, new_parser, start
from stableedit_cpp.files.environment import PeakMemory, resident_bytes
from stableedit_cpp.lifelong.plan import plan_stream
from workload import add_model_options, pretrained, zsre

# Requests, turn size, and settings.
RUNS = {
    "one pass": (60, 10, se.StableEditConfig.one_pass),
    "three passes": (40, 8, partial(se.StableEditConfig.one_pass, max_passes=3, past_key_weight=0.05)),
    "default": (12, 3, se.StableEditConfig),
}


def main() -> None:
    parser = new_parser(
        "Three streams of ZsRE: one pass a turn, three passes with past keys, and the default settings. Each is "
        "planned in one process and edited in another; seconds are of the processor.",
        "plan.py --threads 1 --json bench/results/plan.json",
    )
    add_model_options(parser)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME")
    parser.add_argument("--share", type=float, default=1.0, metavar="X", help="of the requests of each (default 1)")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="so many processes at once (default 1)")
    parser.add_argument("--part", nargs=2, metavar=("RUN", "PART"), help=argparse.SUPPRESS)  # of a process of its own
    options = parser.parse_args()
    device = start(options)
    if options.part:
        print(json.dumps(work(*options.part, options, device)))
        return
    results = {}
    with ThreadPoolExecutor(options.at_once) as pool:
        parts = {run: [pool.submit(process, run, part) for part in ("plan", "edit")] for run in options.runs}
    for run, pair in parts.items():
        planned, real = (part.result() for part in pair)
        apart = {name: planned[name] / real[name] - 1 for name in ("seconds", "peak_bytes")}
        results[run] = {"apart": apart, "planned": planned, "real": real}
    within = all(
        abs(one["apart"]["peak_bytes"]) <= 0.15 and abs(one["apart"]["seconds"]) <= 0.25 for one in results.values()
    )
    finish("plan", options, device, {"within_aims": within, **results})


def process(run: str, part: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--part", run, part], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def work(run: str, part: str, options: argparse.Namespace, device) -> dict[str, float]:
    count, turn_size, settings = RUNS[run]
    model, tokenizer, modules = pretrained(options, device)
    config = settings(edit_modules=[module.name for module in modules], turn_size=turn_size)
    editor = se.StableEdit(model, tokenizer, config)
    requests = zsre(options, max(1, round(count * options.share)))
    if part == "plan":
        plan = plan_stream(editor, requests, clock=time.process_time)
        return {"seconds": plan.seconds, "peak_bytes": plan.peaks["cpu"], **plan.to_dict()}
    resident = resident_bytes()
    with PeakMemory() as memory:
        begin = time.process_time()
        report = editor.edit(requests, progress=False)
        seconds = time.process_time() - begin
    return {
        "seconds": seconds,
        "peak_bytes": resident + (memory.extra_bytes or 0),
        "passes": sum(turn.passes for turn in report.turns) / len(report.turns),
        "decompositions": sum(normalizer.decompositions for normalizer in editor.normalizers.values()),
    }


if __name__ == "__main__":
    main()

"""What `stableedit plan` says of a stream before it begins, beside what the stream then takes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import stableedit_cpp as se
from common import finish, new_parser, start
from stableedit_cpp.files.environment import PeakMemory, resident_bytes
from stableedit_cpp.lifelong.plan import plan_stream
from workload import CONFIGS, add_model_options, edited, pretrained, random_model, zsre

# (model, requests, turn size, whether by the settings of one pass)
RUNS = {
    "one pass": ("", 120, 20, True),
    "default": ("", 36, 6, False),
    "random model": ("tiny", 240, 30, True),
}


def main() -> None:
    parser = new_parser(
        "Three streams of ZsRE: one pass a turn and the default settings on --model, and one pass on a random model. "
        "Each is planned in one process and edited in another; seconds are of the processor.",
        "plan.py --threads 1 --json bench/results/plan.json",
    )
    add_model_options(parser)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME")
    parser.add_argument("--share", type=float, default=1.0, metavar="X", help="of the requests of each (default 1)")
    parser.add_argument("--part", nargs=2, metavar=("RUN", "PART"), help=argparse.SUPPRESS)  # of a process of its own
    options = parser.parse_args()
    device = start(options)
    if options.part:
        print(json.dumps(work(*options.part, options, device)))
        return
    results = {}
    for run in options.runs:
        planned, real = (process(run, part) for part in ("plan", "edit"))
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
    config, count, turn_size, one_pass = RUNS[run]
    model, tokenizer, modules = pretrained(options, device)
    if config:
        model = random_model(config, options, device) if config in CONFIGS else model
        modules = edited(model, options)
    how = {"edit_modules": [module.name for module in modules], "turn_size": turn_size}
    settings = se.StableEditConfig.one_pass(**how) if one_pass else se.StableEditConfig(**how)
    editor = se.StableEdit(model, tokenizer, settings)
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

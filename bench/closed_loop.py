"""Efficacy, generalization and specificity of closed-loop settings: the frontier between them."""

from __future__ import annotations

import random
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

from common import finish, new_parser, start
from stableedit_cpp import load_model
from stableedit_cpp.experiments import Matrix, Run, Step, read_yaml, run_matrix
from stableedit_cpp.experiments.results import MEASUREMENTS
from workload import add_model_options

MATRIX = Path(__file__).parent / "experiments" / "closed_loop.yaml"
METRICS = ("efficacy", "generalization", "specificity")


def main() -> None:
    settings = read_yaml(MATRIX)
    editors = {editor["name"]: editor for editor in settings["editors"]}
    parser = new_parser(
        "Edits ZsRE with the settings of bench/experiments/closed_loop.yaml, as `stableedit bench` does, and scores\n"
        "all edits after the stream and after each step that follows it. With --output DIR the runs are kept, and the\n"
        "same command goes on where it was stopped.",
        "closed_loop.py --settings closed-loop --output runs/closed-loop --json bench/results/closed_loop.json",
    )
    add_model_options(parser)
    parser.add_argument("--edits", type=int, default=settings["edits"], metavar="N", help="default 1000")
    parser.add_argument("--warm-up", type=int, default=500, metavar="N", help="edits before (default 500)")
    parser.add_argument(
        "--settings", nargs="+", default=list(editors), metavar="NAME", help=f"of {', '.join(editors)} (default: all)"
    )
    parser.add_argument("--output", metavar="DIR", help="keep the runs there (default: nowhere)")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="score also N of the edits alone, drawn by random.Random(0)"
    )
    options = parser.parse_args()
    unknown = [name for name in options.settings if name not in editors]
    if unknown:
        parser.error(f"unknown settings {', '.join(unknown)}; known are {', '.join(editors)}")
    device = start(options)
    changes = {"max_tokens_per_forward": options.max_tokens}
    changes |= {"edit_modules": options.edit_modules} if options.edit_modules else {}
    settings |= {"editors": [editors[name] for name in options.settings], "editor_options": changes}
    settings |= {"models": [options.model], "dtype": options.dtype, "data": options.data}
    settings |= {"edits": options.edits, "warm_up_size": options.warm_up}
    runs = Matrix.from_mapping(settings).runs()

    def load(model: str) -> tuple:
        return load_model(model, device=device, dtype=getattr(torch, options.dtype))

    with tempfile.TemporaryDirectory() as scratch:
        output = Path(options.output or scratch)
        run_matrix(runs, output, load, trunk_bytes=16 * 2**30)
        found = [Run.read(output / run.name) for run in runs]
        results = [{"setting": "unedited", "points": [point(found[0], found[0].unedited, options)]}]
        for run in found:
            points = [point(run, checkpoint, options) for checkpoint in run.checkpoints if checkpoint["edits"]]
            results.append({"setting": run.settings["editor"], "config": run.settings["config"], "points": points})
    finish("closed_loop", options, device, {"sample": options.sample, "settings_done": results})


def name(run: Run, checkpoint: dict) -> str:
    """ "unedited", "stream", "repair 1" or "share 0.9"."""
    if "step" not in checkpoint:
        return "stream" if checkpoint["edits"] else "unedited"
    steps = [Step.parse(step) for step in run.settings["after"][: checkpoint["step"]]]
    if steps[-1].kind == "shrink":
        return f"share {steps[-1].amount}"
    return f"repair {sum(step.kind == 'repair' for step in steps)}"


def point(run: Run, checkpoint: dict, options: Namespace) -> dict[str, object]:
    """Of the frontier: scores, and what was done to get there."""
    scores = {metric: checkpoint["scores"][metric] for metric in METRICS}
    found = {"after": name(run, checkpoint)}
    found |= {metric: score["mean"] for metric, score in scores.items()}
    found["standard_errors"] = {metric: score["standard_error"] for metric, score in scores.items()}
    if options.sample:
        chosen = random.Random(0).sample(range(options.edits), options.sample)
        records = {record["index"]: record for record in run.records(checkpoint)}
        found["sample"] = {metric: sum(records[index][metric] for index in chosen) / len(chosen) for metric in METRICS}
    turn = next((turn for turn in run.turns if turn["turn"] == checkpoint["turn"]), None)
    if found["after"] == "stream":
        turns = [turn for turn in run.turns if turn["kind"] == "edit"]
        seconds = [spent for turn in turns for part, spent in turn["seconds"].items() if part not in MEASUREMENTS]
        found |= {"passes": sum(turn["passes"] for turn in turns) / len(turns), "edit_seconds": sum(seconds)}
    elif turn is not None and turn["kind"] == "repair":
        found |= {"solved_again": turn["requests"], "edit_seconds": sum(turn["seconds"].values())}
    return found


if __name__ == "__main__":
    main()

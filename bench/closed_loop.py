"""Efficacy, generalization and specificity of closed-loop settings: the frontier between them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from common import finish, new_parser, start
from stableedit_cpp import Scores, StableEdit, StableEditConfig, TrunkCache, evaluate
from stableedit_cpp.lifelong.repair import repair
from workload import add_model_options, pretrained, zsre


@dataclasses.dataclass(frozen=True)
class Setting:
    """
    Attributes:
        repairs: rounds of repair after the stream; for each how many requests at most are solved again, those nearest
            to holding first, None for all that are forgotten. repair_changes: to the config, from then on.
        shares: of the whole change, that are kept at last. Every round and every share is scored.
    """

    config: StableEditConfig = dataclasses.field(default_factory=StableEditConfig)
    repairs: tuple[int | None, ...] = ()
    repair_changes: dict[str, object] = dataclasses.field(default_factory=dict)
    shares: tuple[float, ...] = ()


CLOSED_LOOP = StableEditConfig.closed_loop()
GENTLE = {"step_size": 1e-4, "max_passes": 4, "take_probability": 0.0}
SETTINGS = {
    "one-pass": Setting(),
    "closed-loop": Setting(CLOSED_LOOP, (None,), shares=(0.95, 0.9, 0.85, 0.8)),
    "small-steps": Setting(
        dataclasses.replace(CLOSED_LOOP, max_passes=9, step_size=1.5e-4, take_probability=0.1),
    ),
    "gentle-repair": Setting(CLOSED_LOOP, (None,), GENTLE),
    **{f"gentle-repair-of-{budget}": Setting(CLOSED_LOOP, (budget,), GENTLE) for budget in (200, 280, 340)},
    "larger-steps": Setting(dataclasses.replace(CLOSED_LOOP, max_passes=3, step_size=3e-4), (None, None)),
    # For 5,000 edits:
    "four-passes": Setting(dataclasses.replace(CLOSED_LOOP, max_passes=4, take_probability=0.5), (None, 500)),
    "three-passes": Setting(dataclasses.replace(CLOSED_LOOP, max_passes=3, step_size=2.5e-4), (None, None)),
}


def main() -> None:
    parser = new_parser(
        "Edits ZsRE with closed-loop settings, each from the unedited model, and scores all edits after the stream\n"
        "and after each round of repairs. With --resume FILE every setting that is done is kept there, and skipped\n"
        "next time; the one that is under way goes on from FILE with the suffix .state.",
        "closed_loop.py --settings closed-loop --resume closed_loop.jsonl --json bench/results/closed_loop.json",
    )
    add_model_options(parser)
    parser.add_argument("--edits", type=int, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--warm-up", type=int, default=500, metavar="N", help="edits before (default 500)")
    parser.add_argument(
        "--settings", nargs="+", default=list(SETTINGS), metavar="NAME", help=f"of {', '.join(SETTINGS)} (default: all)"
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="JSON lines, one a setting that is done")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="score also N of the edits alone, drawn by random.Random(0)"
    )
    options = parser.parse_args()
    unknown = [name for name in options.settings if name not in SETTINGS]
    if unknown:
        parser.error(f"unknown settings {', '.join(unknown)}; known are {', '.join(SETTINGS)}")
    device = start(options)

    done = {record["key"]: record for record in read_lines(options.resume)}
    model, tokenizer, modules = pretrained(options, device)
    requests, warm_up = zsre(options, options.edits), zsre(options, options.warm_up, "train")
    names = [module.name for module in modules]
    trunk = TrunkCache(model, modules, max_bytes=16 * 2**30)
    sample = sorted(random.Random(0).sample(range(len(requests)), options.sample)) if options.sample else None

    def score() -> dict[str, object]:
        scores = evaluate(model, tokenizer, requests, max_tokens_per_forward=options.max_tokens, trunk=trunk)
        return summary(scores, sample)

    state = options.resume.with_suffix(".state") if options.resume else None
    originals = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    results: list[dict] = []
    for name in tqdm(["unedited", *options.settings], desc="Settings", unit="setting"):
        setting = SETTINGS.get(name, Setting())
        config = dataclasses.replace(setting.config, edit_modules=names, max_tokens_per_forward=options.max_tokens)
        setting = dataclasses.replace(setting, config=config)
        key = record_key(name, setting, options)
        if key not in done:
            for module, weight in originals.items():
                model.get_submodule(module).weight.data.copy_(weight)
            begin = time.perf_counter()
            points = [{"after": "unedited", **score()}] if name == "unedited" else []
            if name != "unedited":
                editor = StableEdit(model, tokenizer, config)
                points = run(editor, key, setting, warm_up, requests, trunk, score, state)
            record = {"key": key, "setting": name, "config": json.loads(config.to_json())}
            record |= {"repair_changes": setting.repair_changes} if setting.repair_changes else {}
            done[key] = record | {"points": points, "seconds": time.perf_counter() - begin}
            if options.resume:
                with options.resume.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[key]) + "\n")
        results.append({field: value for field, value in done[key].items() if field != "key"})
    options.resume = str(options.resume) if options.resume else None
    finish("closed_loop", options, device, {"sample": options.sample, "settings_done": results})


def run(
    editor: StableEdit,
    key: str,
    setting: Setting,
    warm_up: list,
    requests: list,
    trunk: TrunkCache,
    score,
    state: Path | None,
) -> list[dict]:
    """Points of the frontier: after the stream, each round of repairs and each share. All but the shares is kept in
    ``state``."""
    done = {"edited": 0, "passes": 0, "seconds": 0.0, "points": []}
    if state and state.exists() and (kept := torch.load(state))["key"] == key:
        editor.load_state_dict(kept["editor"])
        done = kept["done"]
    else:
        editor.warm_up(warm_up)

    def keep() -> None:
        if state:
            fresh = state.with_name(state.name + ".new")
            torch.save({"key": key, "done": done, "editor": editor.state_dict()}, fresh)
            fresh.replace(state)

    part = 10 * editor.config.turn_size
    while done["edited"] < len(requests):
        report = editor.edit(requests[done["edited"] : done["edited"] + part], trunk=trunk)
        done["edited"] += report.edits
        done["passes"] += sum(turn.passes for turn in report.turns)
        done["seconds"] += report.seconds
        keep()
    points = done["points"]
    if not points:
        turns = -(-len(requests) // editor.config.turn_size)
        points.append({"after": "stream", "passes": done["passes"] / turns, "edit_seconds": done["seconds"], **score()})
        keep()
    if setting.repair_changes:
        before, config = editor, dataclasses.replace(editor.config, **setting.repair_changes)
        editor = StableEdit(before.model, before.tokenizer, config)
        editor.keep_original_weights(before.original_weights())
        editor.load_state_dict(before.state_dict())
    for number, budget in list(enumerate(setting.repairs, 1))[len(points) - 1 :]:
        report = repair(editor, requests, budget=budget, trunk=trunk)
        solved = sum(part.edits for part in report.rounds)
        seconds = sum(part.seconds for part in report.rounds)
        points.append(
            {"after": f"repair {number}", "budget": budget, "solved_again": solved, "edit_seconds": seconds, **score()}
        )
        keep()
    kept = 1.0
    for share in setting.shares:
        editor.shrink(share / kept)
        kept = share
        points.append({"after": f"share {share}", **score()})
    return points


def summary(scores: Scores, sample: list[int] | None) -> dict[str, object]:
    metrics = ("efficacy", "generalization", "specificity")
    result: dict[str, object] = {metric: getattr(scores, metric) for metric in metrics}
    result["standard_errors"] = scores.standard_errors
    if sample is not None:
        chosen = [scores.per_request[index] for index in sample]
        result["sample"] = {metric: sum(record[metric] for record in chosen) / len(chosen) for metric in metrics}
    return result


def record_key(name: str, setting: Setting, options: argparse.Namespace) -> str:
    """What a result belongs to: the same key, the same figures."""
    fields = dataclasses.asdict(setting) | {"setting": name}
    fields |= {name: getattr(options, name) for name in ("model", "dtype", "edits", "warm_up", "sample")}
    return json.dumps(fields, sort_keys=True)


def read_lines(path: Path | None) -> list[dict]:
    """Results of earlier runs; a last line that was cut off is left out."""
    found = []
    if path and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"{path}: left out a damaged line")
    return found


if __name__ == "__main__":
    main()

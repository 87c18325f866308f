"""Edits per second of a whole stream, ours and as published, turn by turn in alternation."""

from __future__ import annotations

import copy
import statistics
from argparse import Namespace

import torch

from common import Parts, finish, new_parser, start
from published import PublishedEditor, PublishedOptions
from stableedit_cpp import StableEdit, StableEditConfig, evaluate
from workload import add_model_options, pretrained, token_sequences, zsre


def main() -> None:
    parser = new_parser(
        "Edits ZsRE requests with StableEdit and with the published formulation of the same method (equal step size, "
        "ridge and floor), each on its own copy of the model.\nEach turn runs tokenisation to applied update; with "
        "--score a third copy is edited with a decomposition every turn.",
        "stream.py --edits 1000 --warm-up 500 --score --json bench/results/stream.json",
    )
    add_model_options(parser)
    parser.add_argument("--edits", type=int, default=1000, metavar="N", help="timed edits (default 1000)")
    parser.add_argument("--warm-up", type=int, default=500, metavar="N", help="edits before, untimed (default 500)")
    parser.add_argument("--turn-size", type=int, default=100, metavar="N", help="requests a turn (default 100)")
    parser.add_argument("--step-size", type=float, default=3e-4, metavar="X", help="default 3e-4")
    parser.add_argument("--refresh", type=float, default=0.1, metavar="X", help="as in StableEditConfig (default 0.1)")
    parser.add_argument("--score", action="store_true", help="evaluate all on the edited requests afterwards")
    parser.add_argument(
        "--published-gradients",
        default="edited",
        choices=["edited", "all"],
        help="weights that accumulate a gradient in the published loop: the edited ones (as released) or all",
    )
    options = parser.parse_args()
    device = start(options)
    model, tokenizer, modules = pretrained(options, device)
    if any(module.layout != "linear" for module in modules):
        parser.error("the published formulation here knows nn.Linear only; choose other --edit-modules")
    options.edit_modules = [module.name for module in modules]

    originals = {"ours": model, "published": copy.deepcopy(model)}
    if options.score:
        originals["ours_exact"] = copy.deepcopy(model)
    turns, ours = edit_all(originals, tokenizer, options, device)

    seconds = {name: sum(turn.seconds["turn"] for turn in taken) for name, taken in turns.items()}
    done = len(turns["ours"])
    edits = min(done * options.turn_size, options.edits)
    parts = {part: sum(turn.seconds.get(part, 0.0) for turn in ours) for part in ("capture", "mathematics", "apply")}
    theirs = {part: sum(turn.seconds[part] for turn in turns["published"]) for part in ("capture", "mathematics")}
    results = {
        "edits_per_second_ours": edits / seconds["ours"],
        "edits_per_second_published": edits / seconds["published"],
        "speedup": seconds["published"] / seconds["ours"],
        "mathematics_share": (parts["mathematics"] + parts["apply"]) / seconds["ours"],
        "median_turn_speedup": statistics.median(
            b.seconds["turn"] / a.seconds["turn"] for a, b in zip(turns["ours"], turns["published"], strict=True)
        ),
        "edits": edits,
        "turns": done,
        "seconds_by_part_ours": parts,
        "seconds_by_part_published": theirs,
        "peak_extra_bytes": {name: max(max(t.peak.values()) for t in taken) for name, taken in turns.items()},
        "whitening_ours": sorted({mode for turn in ours for mode in turn.whitening.values()}),
    }
    if options.score:
        results["scores"] = score(originals, tokenizer, zsre(options, options.edits))
        exact, reused = results["scores"]["ours_exact"], results["scores"]["ours"]
        results["reuse_changes_scores_by"] = max(abs(exact[metric] - reused[metric]) for metric in exact)
    finish("stream", options, device, results)


def edit_all(
    models: dict[str, torch.nn.Module], tokenizer, options: Namespace, device: torch.device
) -> tuple[dict[str, list[Parts]], list]:
    """Edit all copies in alternation; returns time and memory of each turn, and our editor's own turn reports."""
    config = {"edit_modules": options.edit_modules, "turn_size": options.turn_size, "step_size": options.step_size}
    config["max_tokens_per_forward"] = options.max_tokens
    names = [name for name in models if name != "published"]
    editors = {
        name: StableEdit(
            models[name],
            tokenizer,
            StableEditConfig.one_pass(**config, refresh=0.0 if name == "ours_exact" else options.refresh),
        )
        for name in names
    }
    plain = models["published"]
    modules = {name: plain.get_submodule(name) for name in options.edit_modules}
    settings = PublishedOptions(step_size=options.step_size, ridge=10.0, floor=0.1)
    published = PublishedEditor(plain, modules, settings, options.published_gradients)

    warm_up = zsre(options, options.warm_up, "train") if options.warm_up else []
    for turn in pieces(warm_up, options.turn_size):
        for editor in editors.values():
            editor.warm_up(turn, progress=False)
        published.turn(token_sequences(plain, tokenizer, turn), diagonal=True)

    turns: dict[str, list[Parts]] = {"ours": [], "published": []}
    reports = []
    for number, turn in enumerate(pieces(zsre(options, options.edits), options.turn_size)):
        parts = Parts(device, trim=number == 0)
        reports += parts.run("turn", lambda turn=turn: editors["ours"].edit(turn, progress=False)).turns
        turns["ours"].append(parts)
        parts = Parts(device, trim=number == 0)
        parts.run("turn", lambda turn=turn, run=parts.run: published_turn(published, plain, tokenizer, turn, run))
        turns["published"].append(parts)
        if "ours_exact" in editors:
            editors["ours_exact"].edit(turn, progress=False)
    return turns, reports


def published_turn(editor: PublishedEditor, model: torch.nn.Module, tokenizer, requests: list, run) -> None:
    editor.turn(token_sequences(model, tokenizer, requests), run=run)


def pieces(items: list, size: int) -> list[list]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def score(models: dict[str, torch.nn.Module], tokenizer, requests: list) -> dict[str, dict[str, float]]:
    result = {}
    for name, model in models.items():
        scores = evaluate(model, tokenizer, requests, chat_template=False, progress=False)
        result[name] = {metric: getattr(scores, metric) for metric in ("efficacy", "generalization", "specificity")}
    return result


if __name__ == "__main__":
    main()

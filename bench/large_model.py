"""Turns of a large model with random weights in half precision: time by part, and memory beyond the model."""

from __future__ import annotations

import gc
from argparse import Namespace

import torch

from common import Parts, finish, new_parser, start, summary
from published import PublishedEditor, PublishedOptions
from published_math import published_statistics
from stableedit_cpp import StableEdit, StableEditConfig, load_model
from stableedit_cpp.core import LifelongNormalizer
from stableedit_cpp.model.capture import capture
from stableedit_cpp.model.modules import EditModule
from synthetic import grow
from workload import CONFIGS, edited, random_model, token_sequences, zsre

STEP_SIZE, RIDGE, FLOOR = 1e-6, 10.0, 0.1
ROOM = 1.5e9  # bytes beside the masters that a turn may take


def main() -> None:
    parser = new_parser(
        "Edits ZsRE requests on a random model of the shape of a large one: ours, one pass a turn, and as published, "
        "late in a stream.\nMemory is what comes on top of the model: masters, original weights, statistics, captures. "
        "A turn is timed from text to updated weights.",
        "large_model.py --config llama-1.2b --requests 24 --json bench/results/large_model_1.2b.json",
    )
    parser.add_argument(
        "--config",
        default="llama-1.2b",
        metavar="NAME",
        help=f"{', '.join(CONFIGS)} or a JSON file (default %(default)s)",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--edit-modules", nargs="+", metavar="NAME", help="default: four in the last third")
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="requests a turn (default 100)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=StableEditConfig.max_tokens_per_forward,
        metavar="N",
        help="of a forward pass, as in StableEditConfig (default %(default)s): fewer take less memory",
    )
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="of ours (default 3)")
    parser.add_argument("--published-turns", type=int, default=3, metavar="N", help="0 leaves it out (default 3)")
    parser.add_argument(
        "--tokenizer", default="smollm2-135m", metavar="MODEL", help="whose it is (default %(default)s)"
    )
    parser.add_argument("--data", default="../shared/data", metavar="DIR", help="data sets (default ../shared/data)")
    parser.add_argument("--nu", type=int, default=1_000_000, metavar="N", help="rows seen before (default 1000000)")
    parser.add_argument("--base-rows", type=int, default=10_000, metavar="N", help="rows drawn for it (default 10000)")
    options = parser.parse_args()
    device = start(options)
    _, tokenizer = load_model(options.tokenizer)
    model = random_model(options.config, options, device)
    modules = edited(model, options)
    requests = zsre(options, options.requests * (1 + max(options.turns, options.published_turns)))
    seen, *turns = (requests[at : at + options.requests] for at in range(0, len(requests), options.requests))
    base = statistics(model, tokenizer, modules, seen, options)

    masters = sum(4 * module.weight.numel() for module in modules)
    ours = our_turns(model, tokenizer, modules, base, turns[: options.turns], options, device)
    beyond = ours["peak_bytes"] - masters
    results = {
        "mathematics_share": ours["mathematics_share"],
        "beyond_masters_bytes": beyond,
        "within_aims": {"memory": beyond <= ROOM, "mathematics": ours["mathematics_share"] <= 0.1},
        "parameters": model.num_parameters(),
        "model_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "masters_bytes": masters,
        "edit_modules": [module.name for module in modules],
        "shape": dict(zip(("k", "v"), modules[0].shape, strict=True)),
        "ours": ours,
    }
    if options.published_turns:
        published = published_turns(model, tokenizer, modules, base, turns[: options.published_turns], options, device)
        ratios = {name: published[name] / ours[name] for name in ("ms_per_turn", "peak_bytes")}
        results = {"speedup": ratios["ms_per_turn"], "memory_ratio": 1 / ratios["peak_bytes"], **results}
        results["published"] = published
    finish("large_model", options, device, results)


def statistics(
    model: torch.nn.Module, tokenizer, modules: list[EditModule], requests: list, options: Namespace
) -> LifelongNormalizer:
    """Of rows like those that these requests have: half of each is a mix of theirs, and half noise of their size, so
    that no later turn lies outside of what was seen."""
    shapes = {module.shape for module in modules}
    if len(shapes) > 1:
        raise SystemExit(f"the edited modules must have one shape, not {sorted(shapes)}; choose other --edit-modules")
    base = LifelongNormalizer(*shapes.pop())
    sequences = token_sequences(model, tokenizer, requests)
    captured = capture(model, modules, sequences, max_tokens=options.max_tokens)
    pooled = [torch.cat(list(rows.values())) for rows in (captured.keys, captured.value_gradients)]
    for begin in range(0, options.base_rows, 1000):
        count = min(1000, options.base_rows - begin)
        mix = torch.randn(count, len(pooled[0]), device=pooled[0].device) / len(pooled[0]) ** 0.5
        base.observe(*(mix @ rows + rows.square().mean().sqrt() * torch.randn_like(mix @ rows) for rows in pooled))
    return base


def our_turns(
    model: torch.nn.Module,
    tokenizer,
    modules: list[EditModule],
    base: LifelongNormalizer,
    turns: list[list],
    options: Namespace,
    device: torch.device,
) -> dict[str, object]:
    """By part as the editor reports it; "rest" is tokenisation and what makes a turn all or nothing. The first turn
    also takes hold of the weights, and decomposes, as one in about 60 does at this point of a stream; the share of the
    mathematics is that of the others."""
    whole = Parts(device, trim=True)
    config = StableEditConfig.one_pass(
        edit_modules=[module.name for module in modules],
        step_size=STEP_SIZE,
        ridge=RIDGE,
        floor=FLOOR,
        turn_size=options.requests,
        max_tokens_per_forward=options.max_tokens,
    )
    editor = StableEdit(model, tokenizer, config, guard=None)
    for normalizer in editor.normalizers.values():
        grow(normalizer, base, options.nu)
    records, usual, reports, decompositions = [], [], [], 0
    for requests in turns:
        before = whole.seconds.get("turn", 0.0)
        reports += whole.run("turn", lambda requests=requests: editor.edit(requests, progress=False)).turns
        parts = dict(reports[-1].seconds)
        parts["rest"] = whole.seconds["turn"] - before - sum(parts.values())
        records.append(parts)
        done = sum(normalizer.decompositions for normalizer in editor.normalizers.values())
        if done == decompositions:
            usual.append(parts)
        decompositions = done
    names = list(records[0])
    seconds = sum(sum(record.values()) for record in records)
    return {
        "ms_per_turn": 1000 * seconds / len(records),
        "ms_by_part": {name: 1000 * sum(record[name] for record in records) / len(records) for name in names},
        "mathematics_share": share(usual or records),
        "mathematics_share_with_decompositions": share(records),
        "ms_by_turn": [{name: 1000 * record[name] for name in names} for record in records],
        "peak_bytes": whole.peak["turn"],
        "answer_tokens": [report.answer_tokens for report in reports],
        "whitening": sorted({mode for report in reports for mode in report.whitening.values()}),
        "decompositions": decompositions,
    }


def share(records: list[dict[str, float]]) -> float:
    return sum(one["mathematics"] + one["apply"] for one in records) / sum(sum(one.values()) for one in records)


def published_turns(
    model: torch.nn.Module,
    tokenizer,
    modules: list[EditModule],
    base: LifelongNormalizer,
    turns: list[list],
    options: Namespace,
    device: torch.device,
) -> dict[str, object]:
    gc.collect()
    parts = Parts(device, trim=True)
    settings = PublishedOptions(step_size=STEP_SIZE, ridge=RIDGE, floor=FLOOR)
    editor = PublishedEditor(model, {module.name: module.module for module in modules}, settings)
    for shape in editor.statistics:
        editor.statistics[shape] = published_statistics(base, options.nu, device)
    for requests in turns:
        editor.turn(token_sequences(model, tokenizer, requests), run=parts.run)
    result = summary([parts])
    by_part = {name: value / len(turns) for name, value in result["ms_by_part"].items()}
    total = result["ms_per_turn"] / len(turns)
    share = by_part["mathematics"] / total
    return {**result, "ms_per_turn": total, "ms_by_part": by_part, "mathematics_share": share, "turns": len(turns)}


if __name__ == "__main__":
    main()

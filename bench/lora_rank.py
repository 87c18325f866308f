"""Which rank a LoRA adapter of a long stream of edits needs: norm and scores kept, and file size, by rank."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch

from common import finish, new_parser, start
from stableedit_cpp import TrunkCache, evaluate, find_modules, load_model
from stableedit_cpp.editors.originals import swapped
from stableedit_cpp.evaluation import Scores
from stableedit_cpp.export import (
    ModelChange,
    change_between,
    evaluate_change,
    export_delta,
    export_lora,
    rank_for_efficacy,
    read_provenance,
)
from stableedit_cpp.export.truncation import Spectrum, kept_norm, truncate
from workload import add_model_options, pretrained, zsre

RANKS = [16, 64, 128, 256, 320, 384, 576]


def main() -> None:
    parser = new_parser(
        "Truncates what editing changed in a model to each rank and scores base model and adapter on the edits; then "
        "looks for the smallest rank that keeps a share of the efficacy, writes that adapter and scores it as peft "
        "loads it.\nFirst edit a model: stableedit edit --model smollm2-135m ... --output edited/",
        "lora_rank.py --edited edited/ --json bench/results/lora_rank.json",
    )
    add_model_options(parser)
    parser.add_argument("--edited", required=True, metavar="DIR", help="what stableedit edit wrote, from --model")
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="first ZsRE edits (default 1000)")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, metavar="R", help=f"default {RANKS}")
    parser.add_argument("--keep", type=float, default=0.95, metavar="X", help="share of the efficacy (default 0.95)")
    options = parser.parse_args()
    device = start(options)
    base, tokenizer, _ = pretrained(options, device)
    model, _ = load_model(options.edited, device=device, dtype=base.dtype)
    provenance = read_provenance(options.edited)
    change = change_between(base, model)
    del model
    requests = zsre(options, options.requests)
    trunk = TrunkCache.where_possible(base, find_modules(base, list(change.modules)))
    unedited = evaluate(base, tokenizer, requests, trunk=trunk, progress=False)
    values = {name.removesuffix(".weight"): tensor for name, tensor in change.tensors.items()}
    with swapped({module: values[module.name] for module in find_modules(base, list(values))}):
        edited = evaluate(base, tokenizer, requests, trunk=trunk, progress=False)

    if edited.efficacy <= unedited.efficacy:
        parser.error(f"{options.edited} has no higher efficacy on these requests than the base model")
    spectra = change.spectra
    results = {
        "config": json.loads(provenance.config.to_json()) if provenance.config else None,
        "edits": provenance.edits,
        "warm_up_edits": provenance.warm_up_edits,
        "unedited": unedited.means(),
        "edited": edited.means(),
        "norm": {name: spectrum.norm for name, spectrum in spectra.items()},
        "full_rank": max(len(spectrum.values) for spectrum in spectra.values()),
        "model_bytes": sum(parameter.nbytes for parameter in base.parameters()),
        "delta_bytes": file_size(export_delta, change),
        "ranks": [],
    }
    for rank in [rank for rank in options.ranks if rank <= results["full_rank"]]:
        modules, report = truncate(spectra, rank, None)
        scores = evaluate_change(base, tokenizer, modules, requests, trunk=trunk, progress=False)
        row = {"rank": rank, "kept_norm": report.kept_norm, **shares(scores, edited, unedited)}
        row["kept_norm_if_ranks_differed"] = kept_by_best_ranks(spectra, rank)
        row["bytes"] = file_size(export_lora, change, rank=rank)
        results["ranks"].append(row)
        print(row, file=sys.stderr, flush=True)
    rank, tried = rank_for_efficacy(base, tokenizer, change, requests, keep=options.keep, progress=False)
    results["chosen"] = {"keep": options.keep, "rank": rank, "kept_norm": kept_norm(spectra, rank), "tried": tried}
    for dtype in (torch.float32, torch.bfloat16):
        scores, size = as_peft_loads_it(base, tokenizer, change, rank, dtype, requests)
        name = str(dtype).removeprefix("torch.")
        results["chosen"][name] = {"bytes": size, **shares(scores, edited, unedited)}
    finish("lora_rank", options, device, results)


def shares(scores: Scores, edited: Scores, unedited: Scores) -> dict[str, float]:
    """Scores, and the kept share of the efficacy and of what editing gained in it."""
    gain = (scores.efficacy - unedited.efficacy) / (edited.efficacy - unedited.efficacy)
    return {**scores.means(), "kept_efficacy": scores.efficacy / edited.efficacy, "kept_gain": gain}


def kept_by_best_ranks(spectra: dict[str, Spectrum], rank: int) -> float:
    """Share of the norm that the same number of singular values keeps, taken from all modules together."""
    values = torch.cat([spectrum.values for spectrum in spectra.values()]).sort(descending=True).values
    return (values[: rank * len(spectra)].norm() / values.norm()).item()


def file_size(export, *arguments, **options) -> int:
    with tempfile.TemporaryDirectory() as directory:
        export(*arguments, Path(directory) / "export", **options)
        return max(path.stat().st_size for path in (Path(directory) / "export").iterdir())


def as_peft_loads_it(
    base: torch.nn.Module, tokenizer, change: ModelChange, rank: int, dtype: torch.dtype, requests: list
) -> tuple[Scores, int]:
    """Scores of the base model with the adapter attached, and the adapter's size in bytes."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as directory:
        report = export_lora(change, Path(directory) / "adapter", rank=rank, dtype=dtype)
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), Path(directory) / "adapter")
        return evaluate(adapted, tokenizer, requests, progress=False), report.bytes


if __name__ == "__main__":
    main()

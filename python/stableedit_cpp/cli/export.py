"""``stableedit export``: an edited model in the form in which it is shipped."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from stableedit_cpp import core
from stableedit_cpp.cli.arguments.export import ADAPTERS, KEEP
from stableedit_cpp.cli.hub_options import check_hub_options, push
from stableedit_cpp.cli.options import DTYPES, form_settings, load_any, show
from stableedit_cpp.core import WeightChange
from stableedit_cpp.data import parse_fields, read_requests
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.evaluation import Scores, evaluate
from stableedit_cpp.export import (
    LowRankReport,
    ModelChange,
    Provenance,
    change_between,
    change_from_delta,
    change_from_patch,
    evaluate_change,
    export_delta,
    export_gguf,
    export_gguf_lora,
    export_lora,
    export_model,
    export_patch,
    rank_for_efficacy,
    read_provenance,
)
from stableedit_cpp.export.delta import DELTA_FILE
from stableedit_cpp.export.llama_cpp.files import check_exportable
from stableedit_cpp.export.lora import rounded_rank
from stableedit_cpp.export.patch import PATCH_FILE
from stableedit_cpp.export.truncation import choose_rank, truncate
from stableedit_cpp.files.atomic import check_new_directory
from stableedit_cpp.model.load import gguf_in
from stableedit_cpp.model.modules import find_modules
from stableedit_cpp.model.packed_gguf import as_packed
from stableedit_cpp.model.trunk import TrunkCache


def run(options: argparse.Namespace) -> int:
    check_export_options(options)
    path = Path(options.edited)
    if not path.exists():
        raise ValueError(f"--edited {path}: there is no such directory or file")
    model, tokenizer, change, provenance = _load(path, options)
    export(model, tokenizer, change, provenance, options)
    return 0


def check_export_options(options: argparse.Namespace) -> None:
    """Find out before anything is loaded what cannot work."""
    given = [name for name in ("rank", "keep", "keep_efficacy") if getattr(options, name) is not None]
    flags = [f"--{name.replace('_', '-')}" for name in given]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(flags)} each decide the rank; give one of them")
    if given and options.format not in ("patch", *ADAPTERS):
        raise ValueError(f"{flags[0]} is for --format patch and lora; a {options.format} keeps everything")
    if options.keep_efficacy is not None and not options.requests:
        raise ValueError("--keep-efficacy needs the edits to measure it on: add --requests FILE")
    if options.round_rank and options.format != "lora":
        raise ValueError(f"--round-rank is for --format lora; servers load no {options.format} beside a model")
    if options.dtype != "auto" and options.format not in ("gguf", *ADAPTERS):
        raise ValueError(
            f"--dtype is for --format lora, gguf and gguf-lora; a {options.format} has the dtype of the edited model"
        )
    check_new_directory(options.output, overwrite=options.overwrite)
    check_hub_options(options)


def export(
    model: torch.nn.Module,
    tokenizer,
    change: ModelChange,
    provenance: Provenance,
    options: argparse.Namespace,
) -> None:
    """Export as ``add_export_options`` says, and print what came of it.

    Args:
        model: the base model; a whole-model export, or scoring, leaves it edited.
    """
    if options.format.startswith("gguf"):
        check_exportable(model.config)
    fields = None if options.fields is None else parse_fields(options.fields)
    requests = read_requests(options.requests, options.limit, format=fields) if options.requests else []
    dtype = getattr(torch, change.dtype) if options.dtype == "auto" else DTYPES[options.dtype]
    rank, keep = options.rank, options.keep
    edited = provenance.config.asked if provenance.config is not None else {}
    how = edited | form_settings(options) | {"progress": True}
    if options.keep_efficacy is not None:
        rank, _ = rank_for_efficacy(model, tokenizer, change, requests, keep=options.keep_efficacy, **how)
    elif options.format in ADAPTERS and rank is None and keep is None:
        keep = KEEP
    if options.round_rank:
        rank, keep = rounded_rank(change.spectra, choose_rank(change.spectra, rank, keep)), None
    scores: dict[str, Scores] = {}
    if requests:
        truncated = None if rank is None and keep is None else truncate(change.spectra, rank, keep, dtype)[0]
        scores = _scores(model, tokenizer, change, truncated, requests, how)
        provenance = replace(provenance, scores={name: found.means() for name, found in scores.items()})
    common = {"provenance": provenance, "overwrite": options.overwrite}
    report: LowRankReport | None = None
    if options.format == "model":
        change.apply_to(model)
        export_model(model, tokenizer, options.output, **common)
    elif options.format == "delta":
        export_delta(change, options.output, **common)
    elif options.format == "gguf":
        change.apply_to(model)
        export_gguf(model, tokenizer, options.output, dtype=dtype, **common)
    elif options.format == "patch":
        report = export_patch(change, options.output, rank=rank, keep=keep, **common)
    else:
        adapter = export_lora if options.format == "lora" else export_gguf_lora
        report = adapter(change, options.output, rank=rank, keep=keep, dtype=dtype, **common)
    address = push(options)
    document = {
        "format": options.format,
        "output": options.output,
        "modules": list(change.modules),
        "report": None if report is None else report.to_dict(),
        "scores": {name: found.to_dict() for name, found in scores.items()},
        "hub": address,
    }
    lines = [*(f"{name}:\n{found}" for name, found in scores.items()), _summary(options, change, report)]
    show(options, document, "\n".join([*lines, *([f"It is on the hub: {address}"] if address else [])]))


def _scores(
    model: torch.nn.Module,
    tokenizer,
    change: ModelChange,
    truncated: dict[str, WeightChange] | None,
    requests: list[EditRequest],
    how: dict[str, object],
) -> dict[str, Scores]:
    """Of the base model, of the edited one, and of the base model with the truncated change; leaves it edited."""
    trunk = None if change.others else TrunkCache.where_possible(model, find_modules(model, list(change.modules)))
    scores = {"unedited": evaluate(model, tokenizer, requests, trunk=trunk, **how)}
    if truncated is not None:
        exported = evaluate_change(model, tokenizer, truncated, requests, trunk=trunk, **how)
    change.apply_to(model)
    scores["edited"] = evaluate(model, tokenizer, requests, trunk=trunk, **how)
    return scores if truncated is None else {**scores, "exported": exported}


def _load(path: Path, options: argparse.Namespace) -> tuple[torch.nn.Module, object, ModelChange, Provenance]:
    """Base model, its tokenizer, and what was changed in it."""
    if _is_model(path):
        edited, _ = load_any(str(path), options)
        base, tokenizer = load_any(options.base, options, dtype=edited.dtype)
        provenance = read_provenance(path)
        change = change_between(base, edited)
        since = provenance.since(change.base_digest)
        if since is None and not options.any_base:
            raise ValueError(
                f"--base {options.base} is not the model that {path} was made from: its digest is "
                f"{change.base_digest[:16]}..., and {path} was edited from {provenance.base_model} with "
                f"{provenance.base_digest[:16]}...{as_packed(options.base)}; --any-base exports the difference all the "
                "same"
            )
        provenance = since or provenance
        return base, tokenizer, change, replace(provenance, base_model=options.base, base_digest=change.base_digest)
    file, kind = _file(path)
    dtype = next(iter(core.load_safetensors(file)[0].values())).dtype if kind == "delta" else "auto"
    base, tokenizer = load_any(options.base, options, dtype=dtype)
    change = change_from_delta(base, file) if kind == "delta" else change_from_patch(base, core.load_patch(file))
    return base, tokenizer, change, Provenance(base_model=options.base, base_digest=change.base_digest)


def _is_model(path: Path) -> bool:
    return (path / "config.json").exists() or gguf_in(path) is not None


def _file(path: Path) -> tuple[Path, str]:
    """(file, "delta" or "patch")"""
    for name, kind in ((DELTA_FILE, "delta"), (PATCH_FILE, "patch")):
        if (path / name).exists():
            return path / name, kind
    if path.is_file():
        _, metadata = core.load_safetensors(path)
        kind = metadata.get("format", "").removeprefix("stableedit-")
        if kind in ("delta", "patch"):
            return path, kind
    raise ValueError(
        f"--edited {path} is neither a saved model, as stableedit edit writes it, nor an exported delta or patch"
    )


def _summary(options: argparse.Namespace, change: ModelChange, report: LowRankReport | None) -> str:
    names = {"model": "The whole model", "delta": "The delta", "patch": "The patch", "lora": "The LoRA adapter"}
    names |= {"gguf": "The GGUF file of the whole model", "gguf-lora": "The LoRA adapter for llama.cpp"}
    if report is None:
        what = f"{names[options.format]} with {len(change.tensors)} changed tensors"
    elif report.rank is None:
        what = f"{names[options.format]} with the whole changes of {len(report.modules)} modules"
    else:
        kept = f"keeps {100 * report.kept_norm:.1f} % of the changes' norm"
        what = f"{names[options.format]} of rank {report.rank} for {len(report.modules)} modules {kept}; it"
    size = f" ({report.bytes / 1e6:.1f} MB)" if report is not None else ""
    return f"{what}{size} is in {options.output}, with a model card"

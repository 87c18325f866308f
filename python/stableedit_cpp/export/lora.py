"""A LoRA adapter in PEFT's format: what serving stacks load beside an unchanged base model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from stableedit_cpp.core import WeightChange
from stableedit_cpp.export.card import Card, loading_the_base, write_card
from stableedit_cpp.export.change import ModelChange
from stableedit_cpp.export.provenance import Provenance
from stableedit_cpp.export.truncation import LowRankReport, Spectrum, truncate
from stableedit_cpp.files.atomic import new_directory

__all__ = ["SERVED_RANKS", "export_lora", "rounded_rank", "served_rank"]

# What --max-lora-rank of vLLM may be.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_ADAPTER_FILE = "adapter_model.safetensors"
_INSTEAD = "export a delta or the whole model"


def export_lora(
    change: ModelChange,
    directory: str | Path,
    *,
    rank: int | None = None,
    keep: float | None = None,
    dtype: torch.dtype | None = None,
    provenance: Provenance | None = None,
    overwrite: bool = False,
) -> LowRankReport:
    """Write the nearest adapter of a rank, for ``peft.PeftModel.from_pretrained(base_model, directory)``.

    B ``[v, r]`` and A ``[r, k]`` of each module are the truncated singular value decomposition of its change, and
    ``lora_alpha = r``, so that W + B A is the edited weight up to what was cut off. All modules have one rank, because
    serving stacks reserve memory for the largest and several ignore ranks of single modules.

    Args:
        rank: of every module.
        keep: share of the Frobenius norm of the whole change; takes the smallest rank that keeps it.
        dtype: of the adapter; None takes that of the base model.

    Returns:
        What the adapter keeps of the changes.

    Raises:
        ValueError: if tensors changed that are not weights of linear maps; if peft would put the adapter elsewhere than
            into these modules (it fuses the experts of some mixtures, and their dense layers with them); for a wrong
            rank or share, if peft is not installed, or if the directory has content and ``overwrite`` is off.
        OSError: if it cannot be written; nothing is left behind then.
    """
    change.check_linear("a LoRA adapter")
    change.check_no_experts("a LoRA adapter")
    provenance = replace(provenance or Provenance(), base_digest=change.base_digest)
    modules, report = truncate(change.spectra, rank, keep, dtype or getattr(torch, change.dtype))
    config = _config(modules, report.rank, provenance.base_model)
    tensors = {}
    for name, part in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = part.change.right
        tensors[f"base_model.model.{name}.lora_B.weight"] = part.change.left
    load = loading_the_base(provenance.base_model, change.dtype)
    load += '\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, ".")'
    summary = (
        f"A LoRA adapter of rank {report.rank}, the nearest to the edits: it keeps {100 * report.kept_norm:.1f} % of "
        "the norm of what they added to the weights."
    )
    served = served_rank(report.rank)
    if served is not None:
        summary += f" vLLM serves it with `--enable-lora --max-lora-rank {served}`."
    with new_directory(directory, overwrite=overwrite) as scratch:
        config.save_pretrained(str(scratch))
        save_file(tensors, scratch / _ADAPTER_FILE, metadata={"format": "pt"})
        if change.skeleton is not None:
            _check_loads(change.skeleton(), scratch, modules)
        report = replace(report, bytes=(scratch / _ADAPTER_FILE).stat().st_size)
        write_card(scratch, Card("lora", summary, load, "peft", report.to_dict()), provenance)
    return report


def served_rank(rank: int) -> int | None:
    """The --max-lora-rank with which vLLM serves an adapter of a rank; None above the largest."""
    return next((served for served in SERVED_RANKS if served >= rank), None)


def rounded_rank(spectra: Mapping[str, Spectrum], rank: int) -> int:
    """The rank, up to that for which a server reserves memory all the same, as far as the changes have as many."""
    largest = max(len(spectrum.values) for spectrum in spectra.values())
    return min(served_rank(rank) or rank, largest)


def _check_loads(model: nn.Module, directory: Path, modules: Mapping[str, WeightChange]) -> None:
    """Load the adapter as its users will, and look whether each module gets what was written for it."""
    from peft import PeftModel

    elsewhere = []
    for name in modules:  # an adapter goes where its module's weight is, and is looked at there
        model.get_submodule(name).to_empty(device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that find no place, which is what is looked for
        try:
            loaded = PeftModel.from_pretrained(model, str(directory), torch_device="cpu", low_cpu_mem_usage=True)
        except Exception as error:  # of peft, whose errors are of many kinds
            raise ValueError(
                f"peft cannot load the adapter into a {type(model).__name__}: {error}; {_INSTEAD}"
            ) from error
    for name, part in modules.items():
        try:
            layer = loaded.get_submodule(f"base_model.model.{name}")
            left, right = (getattr(layer, side)["default"].weight for side in ("lora_B", "lora_A"))
        except (AttributeError, KeyError):
            elsewhere.append(name)
            continue
        written = (part.change.left.cpu(), part.change.right.cpu())
        if not all(
            not found.is_meta and found.shape == kept.shape and torch.equal(found.to(kept.dtype), kept)
            for found, kept in zip((left, right), written, strict=True)
        ):
            elsewhere.append(name)
    if elsewhere:
        raise ValueError(
            f"peft does not apply the adapter to {elsewhere[0]}"
            + (f" and {len(elsewhere) - 1} more" if len(elsewhere) > 1 else "")
            + f" of a {type(model).__name__}, though it loads it without an error; {_INSTEAD}"
        )


def _config(modules: Mapping[str, WeightChange], rank: int, base_model: str | None):
    try:
        from peft import LoraConfig  # takes seconds to import, and only this export needs it
    except ImportError:
        raise ValueError("a LoRA adapter is written with peft; install it with: pip install peft") from None
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(modules),
        fan_in_fan_out=any(change.layout == "conv1d" for change in modules.values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    config.target_modules = list(modules)  # made a set, whose order is another each time
    return config

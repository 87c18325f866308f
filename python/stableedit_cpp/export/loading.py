"""An export as a model again: an adapter, a delta or a patch, put into the base model that it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from stableedit_cpp import core
from stableedit_cpp.export.change import change_from_patch
from stableedit_cpp.export.delta import DELTA_FILE, apply_delta
from stableedit_cpp.export.patch import PATCH_FILE
from stableedit_cpp.model.packed import unpack
from stableedit_cpp.model.packed_gguf import gguf_maps

__all__ = ["export_kind", "load_export"]

_ADAPTER, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_kind(path: str | Path) -> tuple[Path, Literal["lora", "delta", "patch"]] | None:
    """The file that holds an export, or the directory of an adapter, and its kind; None for anything else."""
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").exists():
            return None
        for name, kind in ((DELTA_FILE, "delta"), (PATCH_FILE, "patch"), (_ADAPTER, "lora")):
            if (path / name).exists():
                return (path, kind) if kind == "lora" else (path / name, kind)
    elif path.is_file() and path.suffix == ".safetensors":
        _, metadata = core.load_safetensors(path)
        kind = metadata.get("format", "").removeprefix("stableedit-")
        if kind in ("delta", "patch"):
            return path, kind
    return None


def load_export(
    path: str | Path,
    load_base: Callable[[str, torch.dtype | str], tuple[torch.nn.Module, object]],
    *,
    base: str | None = None,
    dtype: torch.dtype | str = "auto",
) -> tuple[torch.nn.Module, object]:
    """(model, tokenizer) of an export: its base model, edited.

    Args:
        path: for which ``export_kind`` is not None.
        load_base: loads a model by its name and dtype.
        base: where the base model is; None is where the export says.
        dtype: of the model; "auto" is that of the base model, or of the tensors of a delta. A delta is rounded to
            another one.

    Raises:
        ValueError: where the export does not say what its base is, belongs to another model, or its adapter does not
            fit; if peft is not installed.
    """
    file, kind = export_kind(path)
    recorded = _recorded_base(file, kind)
    base = base or recorded
    if base is None:
        raise ValueError(f"{path} does not say which model it belongs to; name it with base (--base)")
    if kind == "delta" and dtype == "auto":
        dtype = next(iter(core.load_safetensors(file)[0].values())).dtype
    try:
        model, tokenizer = load_base(base, dtype)
    except ValueError as error:
        raise ValueError(f"{path} is a {kind} that belongs to {base}, which cannot be had: {error}") from error
    if kind == "delta":
        apply_delta(model, file, any_dtype=True)
    elif kind == "patch":
        change_from_patch(model, core.load_patch(file)).apply_to(model)
    else:
        try:
            from peft import PeftModel
        except ImportError:
            raise ValueError(f"{path} is a LoRA adapter, which is read with peft: pip install peft") from None
        device = next(model.parameters()).device
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                f"{path} is a LoRA adapter, which is merged into weights in memory, and parts of {base} are offloaded; "
                "load it without a device_map that offloads"
            )
        unpack(model, {name: part for name, part in gguf_maps(model).items() if name in _adapted(file)})
        model = PeftModel.from_pretrained(model, str(file), torch_device=str(device)).merge_and_unload()
    return model.eval(), tokenizer


def _adapted(directory: Path) -> set[str]:
    """Names of the modules that an adapter changes: peft knows no maps in the blocks of a GGUF file."""
    names, _ = core.load_safetensors(directory / _WEIGHTS)
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}


def _recorded_base(file: Path, kind: str) -> str | None:
    if kind == "lora":
        return json.loads((file / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if kind == "patch":
        return core.load_patch(file).base_model or None
    return core.load_safetensors(file)[1].get("base_model")

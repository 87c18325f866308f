"""Only the tensors that editing changed, as a safetensors file that knows its base model.

The file holds the new values, not differences: they give back the edited model bit for bit whatever the dtype, while a
difference in half precision is rounded, and one in float32 takes twice the space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from stableedit_cpp import core
from stableedit_cpp.export.card import Card, loading_the_base, write_card
from stableedit_cpp.export.change import ModelChange, change_to
from stableedit_cpp.export.provenance import Provenance
from stableedit_cpp.files.atomic import new_directory
from stableedit_cpp.files.digest import joint_digest, model_digest
from stableedit_cpp.files.offloaded import present_state
from stableedit_cpp.model.packed import packed_maps, unpacked
from stableedit_cpp.model.packed_gguf import as_packed
from stableedit_cpp.model.split import is_split, put, whole

__all__ = ["DELTA_FILE", "apply_delta", "change_from_delta", "export_delta", "fits_rounded", "read_delta"]

DELTA_FILE = "delta.safetensors"
_FORMAT, _VERSION = "stableedit-delta", "1"


def export_delta(
    change: ModelChange, directory: str | Path, *, provenance: Provenance | None = None, overwrite: bool = False
) -> None:
    """Write delta.safetensors and a model card.

    Raises:
        ValueError: if the directory has content and ``overwrite`` is off.
        OSError: if it cannot be written; nothing is left behind then.
    """
    provenance = replace(provenance or Provenance(), base_digest=change.base_digest)
    metadata = {"format": _FORMAT, "version": _VERSION, "base_digest": change.base_digest}
    metadata["replaced"] = json.dumps(change.replaced)
    if provenance.base_model:
        metadata["base_model"] = provenance.base_model
    load = loading_the_base(provenance.base_model, change.dtype)
    load += f'\nfrom stableedit_cpp.export import apply_delta\n\napply_delta(model, "{DELTA_FILE}")'
    summary = (
        f"The {len(change.tensors)} tensors that editing changed, in `{DELTA_FILE}`, without the rest of the model."
    )
    with new_directory(directory, overwrite=overwrite) as scratch:
        core.save_safetensors(scratch / DELTA_FILE, change.tensors, metadata)
        facts = {"tensors": len(change.tensors), "bytes": (scratch / DELTA_FILE).stat().st_size}
        write_card(scratch, Card("delta", summary, load, "stableedit_cpp", facts), provenance)


def apply_delta(model: torch.nn.Module, path: str | Path, *, any_dtype: bool = False) -> list[str]:
    """Turn a base model into the edited one, in place and bit for bit.

    Args:
        model: the base model in its dtype, on any device; or quantised as the one that was edited, of which the edited
            modules are made dense; or split over processes (``tp_plan="auto"``, FSDP), of which all have to call this.
            That one is known by the tensors that are replaced, too.
        path: delta.safetensors, or the directory it is in.
        any_dtype: the base model may be in another dtype, e.g. bfloat16 where float32 was edited; it becomes the edited
            model rounded to that. It is known by the tensors that are replaced then, and the others are not looked at.

    Returns:
        Names of the tensors that were replaced.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged or no delta, or belongs to another base model; the model is as before then.
    """
    state = model.state_dict()
    if not any(map(is_split, state.values())):
        change = change_from_delta(model, path, any_dtype=any_dtype)
        change.apply_to(model)
        return sorted(change.tensors)
    tensors = _for_split(state, path, any_dtype)
    with torch.no_grad():
        for name in sorted(tensors):
            put(state[name], tensors[name])
    return sorted(tensors)


def _for_split(state: Mapping[str, torch.Tensor], path: str | Path, any_dtype: bool) -> dict[str, torch.Tensor]:
    """The new values of a model whose weights lie in several processes, which join one after the other."""
    path, tensors, metadata = read_delta(path)
    here = {name: whole(state[name]) for name in sorted(tensors) if name in state}
    new = fits_rounded(metadata, tensors, here)
    if new is None:
        name = metadata.get("base_model", "another model")
        raise ValueError(f"{path} belongs to another base model than the one that is split over processes: to {name}")
    if not any_dtype and any(new[name].dtype != tensor.dtype for name, tensor in tensors.items()):
        raise ValueError(f"{path} belongs to this base model in another dtype, which takes any_dtype=True")
    return new


def change_from_delta(base: torch.nn.Module, path: str | Path, *, any_dtype: bool = False) -> ModelChange:
    """What a delta changes in its base model. Arguments and errors as ``apply_delta``; nothing is applied, but modules
    with quantised weights that were edited are made dense."""
    path, tensors, metadata = read_delta(path)
    with unpacked(base, packed_maps(base, (name.rpartition(".")[0] for name in tensors))):
        return _change(base, path, tensors, metadata, any_dtype)


def _change(
    base: torch.nn.Module, path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], any_dtype: bool
) -> ModelChange:
    expected, found = metadata.get("base_digest", ""), model_digest(base)
    state = present_state(base)
    if found != expected:
        here = {name: state[name] for name in tensors if name in state}
        rounded = fits_rounded(metadata, tensors, here)
        if rounded is None or not any_dtype:
            name = f"{metadata['base_model']!r}" if "base_model" in metadata else "another model"
            dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
            raise ValueError(
                f"{path} belongs to another base model: {name} in {dtype}, with digest {expected[:16]}..., but this "
                f"model has {found[:16]}...; "
                + ("load that one, unedited" if rounded is None else "that one in another dtype takes any_dtype=True")
                + as_packed(metadata.get("base_model"))
            )
        tensors = rounded
    for name, tensor in tensors.items():
        if name not in state or state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
            raise ValueError(f"{path}: the tensor {name} does not fit the model that its base_digest names")
    return change_to(base, tensors)


def read_delta(path: str | Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, str]]:
    """(file, new values by name, metadata) of a delta. Errors as ``apply_delta``."""
    path = Path(path)
    path = path / DELTA_FILE if path.is_dir() else path
    tensors, metadata = core.load_safetensors(path)
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise ValueError(
            f"{path} is no delta of version {_VERSION} (format {metadata.get('format')!r}, version "
            f"{metadata.get('version')!r}); expected what stableedit export --format delta writes"
        )
    return path, tensors, metadata


def fits_rounded(
    metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """The new values in the dtype of a base model; None where that is not the one that was edited, in some dtype.

    Args:
        base: what it has in the place of ``tensors``, as far as it does.
    """
    dtypes = {tensor.dtype for tensor in base.values()}
    if base.keys() != tensors.keys() or len(dtypes) != 1:
        return None
    dtype = dtypes.pop()
    expected = json.loads(metadata.get("replaced", "{}")).get(str(dtype).removeprefix("torch."))
    if expected is None or joint_digest(base) != expected:
        return None
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}

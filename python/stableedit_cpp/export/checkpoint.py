"""A delta put into a saved base model file by file: for models that are too large to load, in one file or in many."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from stableedit_cpp.export.card import Card, write_card
from stableedit_cpp.export.delta import fits_rounded, read_delta
from stableedit_cpp.export.model import LOAD_MODEL
from stableedit_cpp.export.provenance import Provenance
from stableedit_cpp.files.atomic import new_directory

__all__ = ["apply_delta_to_checkpoint"]

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
# What would still be the unedited weights, and a card that would describe them.
_LEFT_OUT = re.compile(r".*\.(bin|pt|pth|gguf|h5|msgpack|onnx|ot|safetensors)|.*\.bin\.index\.json|README\.md|\.git.*")


def apply_delta_to_checkpoint(
    base: str | Path,
    delta: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: bool | None = None,
) -> list[str]:
    """Write the edited model beside a saved base model, with no more than one of its files in memory.

    The base is known by the tensors that are replaced, in the dtype of the delta or another one, to which the edited
    values are rounded then; the others are copied and not looked at.

    Args:
        base: directory with model.safetensors, or with the files that model.safetensors.index.json names.
        delta: delta.safetensors, or the directory it is in.
        output: new directory, with all else that lies in the base's, and a model card.

    Returns:
        Names of the files that differ from the base's.

    Raises:
        OSError: if something cannot be read or written; nothing is left behind then.
        ValueError: if the base is another model, or no such directory, or keeps the tensors under other names than the
            loaded model; for a delta that an earlier version wrote, which does not say what it replaces; if
            ``output`` has content and ``overwrite`` is off.
    """
    base = Path(base)
    path, tensors, metadata = read_delta(delta)
    if "replaced" not in metadata:
        raise ValueError(f"{path} is of an earlier version and does not say what it replaces; load the base model")
    files = _files(base)
    missing = [name for name in tensors if name not in files]
    if missing:
        raise ValueError(f"{base} keeps no tensor {missing[0]}; load the model, and apply the delta to that")
    before = {name: _read(base / files[name], [name])[name] for name in sorted(tensors)}
    rounded = fits_rounded(metadata, tensors, before)
    if rounded is None:
        name = metadata.get("base_model", "another model")
        raise ValueError(f"{path} belongs to another base model than {base}: to {name}")
    changed = sorted({files[name] for name in tensors})
    with new_directory(output, overwrite=overwrite) as scratch:
        every = sorted(set(files.values()))
        for name in tqdm(every, desc="Files", unit="file", disable=None if progress is None else not progress):
            if name in changed:
                _rewrite(base / name, scratch / name, rounded)
            else:
                shutil.copyfile(base / name, scratch / name)
        for other in sorted(base.iterdir()):
            if other.is_file() and not _LEFT_OUT.fullmatch(other.name):
                shutil.copyfile(other, scratch / other.name)
        provenance = Provenance(base_model=metadata.get("base_model"), base_digest=metadata.get("base_digest"))
        facts = {"tensors": len(tensors), "dtype": str(next(iter(rounded.values())).dtype).removeprefix("torch.")}
        write_card(scratch, Card("model", "The whole edited model.", LOAD_MODEL, "transformers", facts), provenance)
    return changed


def _files(base: Path) -> dict[str, str]:
    """The file that holds each tensor of a saved model."""
    if (base / _INDEX).is_file():
        return json.loads((base / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    if (base / _WHOLE).is_file():
        with _opened(base / _WHOLE) as file:
            return dict.fromkeys(file.keys(), _WHOLE)
    raise ValueError(f"{base} has neither {_WHOLE} nor {_INDEX}; expected the directory of a saved model")


def _rewrite(source: Path, target: Path, new: Mapping[str, torch.Tensor]) -> None:
    with _opened(source) as file:
        names, metadata = list(file.keys()), file.metadata()
    tensors = _read(source, [name for name in names if name not in new])
    save_file({name: tensors.get(name, new.get(name)) for name in names}, target, metadata=metadata)


def _read(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in names}


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error

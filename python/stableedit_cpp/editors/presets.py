"""The editors that experiments compare, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stableedit_cpp.editors.config import EditorConfig, StableEditConfig, UltraEditConfig, load_config
from stableedit_cpp.files.words import with_nearest

__all__ = ["ABLATIONS", "EDITORS", "NamedEditor", "named_editor"]

_STEP = StableEditConfig.step_size


@dataclass(frozen=True)
class NamedEditor:
    """An editor as an experiment has it.

    Attributes:
        name: what tables call it.
        config: of the editor.
        warm_up: whether it is warmed up at all.
        summary: what it is, or how it differs from ``stableedit``.
    """

    name: str
    config: EditorConfig
    warm_up: bool = True
    summary: str = ""


def _ablation(name: str, summary: str, *, warm_up: bool = True, **changes: object) -> NamedEditor:
    return NamedEditor(name, StableEditConfig(**changes), warm_up, summary)


_ALL = (
    NamedEditor("stableedit", StableEditConfig(), summary="StableEdit with our defaults"),
    NamedEditor(
        "stableedit-published",
        StableEditConfig.published(step_size=_STEP),
        summary="StableEdit as its code has it: absolute floor 1e-6, a decomposition every turn",
    ),
    NamedEditor("ultraedit", UltraEditConfig(), False, "ULTRAEDIT: diagonal, ridge 1, no warm-up, exact variance"),
    NamedEditor(
        "ultraedit-published",
        UltraEditConfig.published(step_size=_STEP),
        False,
        "ULTRAEDIT as its code has it: variance unbiased within each micro-batch",
    ),
    NamedEditor(
        "closed-loop",
        StableEditConfig.closed_loop(),
        summary="StableEdit that checks each turn and solves again, with past keys",
    ),
    _ablation("no-ln", "no Lifelong Normalization: keys and value gradients as they are", whitening="none"),
    _ablation("no-warm-up", "no training stream first", warm_up=False),
    _ablation("diagonal", "per-dimension instead of full whitening", whitening="diagonal"),
    _ablation("per-module", "statistics of each module apart instead of pooled by shape", statistics="per_module"),
    _ablation(
        "absolute-floor", "eigenvalue floor 1e-6 instead of relative to the mean", floor_mode="absolute", floor=1e-6
    ),
    _ablation("frozen-statistics", "statistics of the warm-up, never updated after it", frozen_statistics=True),
)
EDITORS = {editor.name: editor for editor in _ALL}
ABLATIONS = ("stableedit", "no-ln", "no-warm-up", "diagonal", "per-module", "absolute-floor", "frozen-statistics")


def named_editor(name: str, changes: Mapping[str, object] | None = None) -> NamedEditor:
    """Look an editor up.

    Args:
        name: one of ``EDITORS``, or a JSON config file, which is called by the file's name without suffix.
        changes: fields of its config to set differently.

    Raises:
        ValueError: for an unknown name (with the list, and the nearest), a field that the config does not have, or a
            bad value. OSError: for a config file that cannot be read.
    """
    if Path(name).suffix == ".json":
        found = NamedEditor(Path(name).stem, load_config(name), summary=f"config {name}")
    elif name in EDITORS:
        found = EDITORS[name]
    else:
        raise ValueError(f"unknown editor {with_nearest(name, EDITORS)}; or a JSON config file")
    changes = dict(changes or {})
    fields = {field.name: field for field in dataclasses.fields(found.config)}
    for field, value in changes.items():
        if field not in fields:
            raise ValueError(f"editor {found.name}: unknown field of its config {with_nearest(field, fields)}")
        if isinstance(value, str) and fields[field].type == "float":  # YAML takes 3e-4 for text: it wants 3.0e-4
            try:
                changes[field] = float(value)
            except ValueError:
                continue  # the config says what is wrong
    # What follows from another field shall follow from its new value.
    if "whitening" in changes and "warm_up_whitening" in fields and "warm_up_whitening" not in changes:
        changes["warm_up_whitening"] = None
    try:
        config = dataclasses.replace(found.config, **changes)
    except ValueError as error:
        raise ValueError(f"editor {found.name}: {error}") from None
    return dataclasses.replace(found, config=config)

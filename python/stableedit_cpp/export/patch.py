"""A patch for libstableedit: what a C++ server adds to its weights, and takes away again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from stableedit_cpp import core
from stableedit_cpp.export.card import Card, loading_the_base, write_card
from stableedit_cpp.export.change import ModelChange
from stableedit_cpp.export.provenance import Provenance
from stableedit_cpp.export.truncation import LowRankReport, truncate
from stableedit_cpp.files.atomic import new_directory
from stableedit_cpp.files.words import now

__all__ = ["PATCH_FILE", "export_patch", "summary_of_requests"]

PATCH_FILE = "patch.safetensors"
_WEIGHTS = "weights = {name: model.get_submodule(name).weight.detach() for name in patch.modules}"
_WEIGHTS_OF_EXPERTS = """\
from stableedit_cpp import find_modules

weights = {module.name: module.weight.detach() for module in find_modules(model, list(patch.modules))}"""


def summary_of_requests(
    edits: int | None,
    warm_up_edits: int | None,
    *,
    file: str | None = None,
    first: Sequence[Mapping[str, str]] = (),
    other_changes: Sequence[str] = (),
) -> str:
    """What the metadata of a patch say of the requests that are in it, as JSON; what is not known is left out.

    Args:
        edits, warm_up_edits: how many were edited.
        file: that they came from.
        first: prompt and target of some of them.
        other_changes: what else changed the weights, and may have taken some of the edits out again.
    """
    summary = {
        "edits": edits,
        "warm_up_edits": warm_up_edits,
        "file": file,
        "first": list(first) or None,
        "other_changes": list(other_changes) or None,
    }
    return json.dumps({name: value for name, value in summary.items() if value is not None}, ensure_ascii=False)


def export_patch(
    change: ModelChange,
    directory: str | Path,
    *,
    rank: int | None = None,
    keep: float | None = None,
    provenance: Provenance | None = None,
    overwrite: bool = False,
) -> LowRankReport:
    """Write patch.safetensors and a model card.

    Args:
        rank, keep: as for ``export_lora``; neither writes the changes whole, in factors where they are given so.

    Returns:
        What the patch keeps of the changes.

    Raises:
        ValueError: if tensors changed that are not weights of linear maps, for a wrong rank or share, or if the
            directory has content and ``overwrite`` is off.
        OSError: if it cannot be written; nothing is left behind then.
    """
    change.check_linear("a patch")
    provenance = replace(provenance or Provenance(), base_digest=change.base_digest)
    if rank is None and keep is None:
        modules, report = change.modules, LowRankReport.whole(change.modules)
    else:
        modules, report = truncate(change.spectra, rank, keep)
    patch = core.Patch(
        modules,
        id=provenance.edited or "",
        created=now(),
        base_model=provenance.base_model or "",
        base_digest=change.base_digest,
        config=provenance.config.to_json() if provenance.config else "",
        requests=summary_of_requests(provenance.edits, provenance.warm_up_edits, file=provenance.requests),
    )
    load = loading_the_base(provenance.base_model, change.dtype)
    load += (
        f'\nfrom stableedit_cpp import core\n\npatch = core.load_patch("{PATCH_FILE}")\n'
        f"{_WEIGHTS_OF_EXPERTS if change.experts else _WEIGHTS}\n"
        "patch.add_to(weights)  # subtract_from(weights) takes it away"
    )
    summary = f"A patch for libstableedit (`stableedit::load_patch`) and `stableedit_cpp.core`, in `{PATCH_FILE}`."
    with new_directory(directory, overwrite=overwrite) as scratch:
        core.save_patch(scratch / PATCH_FILE, patch)
        report = replace(report, bytes=(scratch / PATCH_FILE).stat().st_size)
        write_card(scratch, Card("patch", summary, load, "stableedit_cpp", report.to_dict()), provenance)
    return report

"""What an export keeps of the edits, measured on requests instead of norms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from tqdm.auto import tqdm

from stableedit_cpp.core import WeightChange
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.originals import swapped
from stableedit_cpp.evaluation import DEFAULT_METRICS, Scores, evaluate
from stableedit_cpp.export.change import ModelChange
from stableedit_cpp.model.modules import edit_module, find_modules
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["evaluate_change", "rank_for_efficacy"]


def evaluate_change(
    model: torch.nn.Module,
    tokenizer,
    modules: Mapping[str, WeightChange],
    requests: Sequence[EditRequest],
    *,
    metrics: Collection[str] = DEFAULT_METRICS,
    chat_template: bool | None = None,
    split_special_tokens: bool = True,
    trunk: TrunkCache | None = None,
    progress: bool | None = None,
) -> Scores:
    """Score a base model with changes added to its weights for as long as that takes.

    Args:
        model: the unedited model, e.g. within ``editor.unedited()``; left as found.
        modules: changes by module name, e.g. those of an adapter.
        metrics, chat_template, split_special_tokens, trunk, progress: as for ``evaluate``.
    """
    values = {}
    for name, change in modules.items():
        module = edit_module(model, name)
        values[module] = module.weight.detach().to(module.home, copy=True)
        change.to(module.home).add_to(values[module])
    with swapped(values):
        how = {"chat_template": chat_template, "split_special_tokens": split_special_tokens, "metrics": metrics}
        how |= {"trunk": trunk, "progress": progress}
        return evaluate(model, tokenizer, requests, **how)


def rank_for_efficacy(
    model: torch.nn.Module,
    tokenizer,
    change: ModelChange,
    requests: Sequence[EditRequest],
    *,
    keep: float = 0.95,
    chat_template: bool | None = None,
    split_special_tokens: bool = True,
    progress: bool | None = None,
) -> tuple[int, dict[int, float]]:
    """The smallest rank, common to all modules, at which an adapter has ``keep`` of the edited model's efficacy.

    Halves the range of ranks, so it takes efficacy to grow with the rank; it does but for ripples of an answer or two.

    Args:
        model: the unedited model; left as found.
        requests: the edits; only their prompts and targets are looked at.
        keep: share of the efficacy, in (0, 1].
        chat_template, split_special_tokens: as for ``evaluate``.

    Returns:
        The rank, and the efficacy at every rank that was tried; the largest is the full one.

    Raises:
        ValueError: for a share outside (0, 1], or no efficacy to keep.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a share of the efficacy above 0 and up to 1, not {keep!r}")
    change.check_linear("a LoRA adapter")
    spectra = change.spectra
    trunk = TrunkCache.where_possible(model, find_modules(model, list(spectra)))
    prompts = [EditRequest(request.prompt, request.target) for request in requests]

    def efficacy(rank: int) -> float:
        modules = {name: spectrum.truncated(rank) for name, spectrum in spectra.items()}
        how = {"chat_template": chat_template, "split_special_tokens": split_special_tokens, "metrics": ["accuracy"]}
        how |= {"trunk": trunk, "progress": False}
        return evaluate_change(model, tokenizer, modules, prompts, **how).efficacy

    low, high = 1, max(len(spectrum.values) for spectrum in spectra.values())
    tried = {high: efficacy(high)}
    enough = keep * tried[high]
    if enough == 0:
        raise ValueError("the edited model's efficacy on these requests is 0, so there is none to keep")
    steps = (high - 1).bit_length()
    with tqdm(total=steps, desc="Rank", unit="rank", disable=None if progress is None else not progress) as bar:
        while low < high:
            middle = (low + high) // 2
            tried[middle] = efficacy(middle)
            bar.set_postfix(rank=middle, efficacy=f"{tried[middle]:.3f}", refresh=False)
            bar.update()
            low, high = (low, middle) if tried[middle] >= enough else (middle + 1, high)
    return high, tried

"""One measurement of all side effects of a model, before its edits or after some of them."""

from __future__ import annotations

import math
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from stableedit_cpp.evaluation.answers import refuse_broken
from stableedit_cpp.files.atomic import new_file
from stableedit_cpp.model.ranks import Distributed, data_parallel, ranks
from stableedit_cpp.model.tokens import context_length
from stableedit_cpp.model.trunk import TrunkCache
from stableedit_cpp.model.untouched import input_device
from stableedit_cpp.sideeffects.downstream import TASKS, choose, downstream_scores, read_task
from stableedit_cpp.sideeffects.harness import HARNESS_TASKS, harness_scores
from stableedit_cpp.sideeffects.hidden_states import hidden_states, read_prompts
from stableedit_cpp.sideeffects.maps import embed
from stableedit_cpp.sideeffects.options import LM_EVAL, SideEffectOptions
from stableedit_cpp.sideeffects.perplexity import perplexity, read_texts
from stableedit_cpp.sideeffects.similarity import MMD, linear_cka, mmd, relative_shift

__all__ = ["HIDDEN_STATES", "check", "measure"]

HIDDEN_STATES = "hidden-{:08d}.npz"
_COSTS = {"umap": 10.0, "pca": 0.1}  # of a map, in tests by permutation


def check(options: Mapping[str, object]) -> None:
    """Find out before a model is loaded what is wrong with the options of ``measure``.

    Raises:
        OSError, ValueError: see ``SideEffectOptions``.
    """
    SideEffectOptions.from_dict(options).check()


def measure(
    model: torch.nn.Module,
    tokenizer,
    options: SideEffectOptions | Mapping[str, object],
    *,
    directory: str | Path | None = None,
    edits: int = 0,
    trunk: TrunkCache | None = None,
    allow_broken: bool = False,
    progress: bool | None = None,
    distributed: Distributed = None,
) -> dict[str, object]:
    """Perplexity, downstream tasks and hidden states, as far as the options ask for them.

    Args:
        directory: where the hidden states of the unedited model are kept (``hidden-00000000.npz``): written when
            ``edits`` is 0, compared with later.
        edits: how many edits the model has; 0 for the unedited one.
        trunk: of the model; texts and tasks that were measured before run only the layers that edits can change.
        allow_broken: measure a model that answers NaN as well: what cannot be computed is None, an answer that is not
            there is wrong, and ``broken`` says beside the figures how many windows, records or prompts it was.
        progress: show a bar; None shows it on a terminal.
        distributed: as ``Editor`` has it: share the work with other processes, which make the same call and have a
            directory that is there. The figures are those of one process.

    Returns:
        ready for JSON, what is not finite as None: ``perplexity`` {name: see ``perplexity``}, ``downstream``
        {task: see ``downstream_scores``}, ``hidden_states`` {``prompts``, ``layers``: {layer: ``relative_shift``,
        ``cka``, ``mmd2``, ``p_value``, ``p_value_paired``, ``maps``}} (no layers when ``edits`` is 0), ``seconds`` of
        each. What was not asked for is absent.

    Raises:
        OSError, ValueError: for bad options or files; hidden states to compare with that are missing or of other
            prompts.
        ModelBroken: if the model answers NaN, unless ``allow_broken``.
    """
    if not isinstance(options, SideEffectOptions):
        options = SideEffectOptions.from_dict(options)
    with data_parallel(distributed) as group:
        group.serve(input_device(model))
        if group.size > 1:
            group.check_same({"options of side effects": options}, "give all of them the same")
        progress = progress if group.lead else False
        return _measured(model, tokenizer, options, directory, edits, trunk, allow_broken, progress)


def _measured(
    model: torch.nn.Module,
    tokenizer,
    options: SideEffectOptions,
    directory: str | Path | None,
    edits: int,
    trunk: TrunkCache | None,
    allow_broken: bool,
    progress: bool | None,
) -> dict[str, object]:
    directory = None if directory is None else Path(directory)
    parts = {
        "perplexity": (_perplexity, bool(options.perplexity)),
        "downstream": (_downstream, options.downstream is not None),
        "hidden_states": (_hidden_states, options.prompts is not None),
    }
    found: dict[str, object] = {}
    seconds = {}
    bar = tqdm(desc="Side effects", unit="text", leave=False, disable=None if progress is None else not progress)
    with bar:
        for name, (part, wanted) in parts.items():
            if wanted:
                start = time.perf_counter()
                found[name] = part(model, tokenizer, options, directory, edits, trunk, bar.update)
                if not allow_broken:
                    _refuse_broken(model, name, found[name])
                seconds[name] = time.perf_counter() - start
    return _finite({**found, "seconds": seconds})


def _refuse_broken(model: torch.nn.Module, part: str, figures: Mapping[str, object]) -> None:
    if part == "hidden_states":
        figures = {part: figures}
    count = {"perplexity": "windows", "downstream": "records", "hidden_states": "prompts"}[part]
    for name, found in figures.items():
        refuse_broken(model, [f"one of {name}"] * found.get("broken", 0), found[count])


def _perplexity(model, tokenizer, options: SideEffectOptions, directory, edits, trunk, on_done: Callable) -> dict:
    window = min(options.window, context_length(model) or options.window)
    amount = {"window": window, "tokens": options.perplexity_tokens}
    passes = {"max_tokens": options.max_tokens_per_forward, "trunk": trunk, "on_done": on_done}
    return {
        name: perplexity(model, tokenizer, read_texts(path), **amount, **passes)
        for name, path in options.perplexity.items()
    }


def _downstream(model, tokenizer, options: SideEffectOptions, directory, edits, trunk, on_done: Callable) -> dict:
    if options.downstream == LM_EVAL:
        names = {task: options.harness_tasks.get(task, HARNESS_TASKS[task]) for task in options.tasks}
        amount = {"few_shots": options.few_shots, "limit": options.limit}
        return harness_scores(model, tokenizer, names, **amount, include_path=options.harness_path)
    found = {}
    passes = {"max_tokens": options.max_tokens_per_forward, "trunk": trunk, "on_done": on_done}
    for name in options.tasks:
        examples, questions, answers = read_task(options.downstream, name, options.few_shots, options.limit)
        prompts = [examples + question for question in questions]
        found[name] = downstream_scores(choose(model, tokenizer, prompts, TASKS[name].choices, **passes), answers)
    return found


def _hidden_states(
    model, tokenizer, options: SideEffectOptions, directory: Path | None, edits: int, trunk, on_done: Callable
) -> dict:
    prompts = read_prompts(options.prompts, options.prompt_count)
    passes = {"max_tokens": options.max_tokens_per_forward, "on_done": on_done}
    after = hidden_states(model, tokenizer, prompts, options.layers, **passes)
    result: dict[str, object] = {"prompts": len(prompts), "layers": {}}
    finite = np.all([np.isfinite(states).all(1) for states in after.values()], axis=0)
    if not finite.all():
        result["broken"] = int((~finite).sum())
    if directory is None:
        if edits:
            raise ValueError("hidden states are compared with those of the unedited model; give their directory")
        return result
    path = directory / HIDDEN_STATES.format(0)
    if edits == 0:
        _refuse_broken(model, "hidden_states", result)  # with NaN nothing can be compared
        states = {f"layer_{layer}": values for layer, values in after.items()}
        with new_file(path) as scratch, scratch.open("wb") as file:
            np.savez_compressed(file, prompts=np.array(prompts), **states)
        return result
    before = ranks().everywhere("loading hidden states", lambda: _read_states(path, prompts, list(after)))
    result["layers"] = _compare(before, after, options)
    return result


def _read_states(path: Path, prompts: list[str], layers: list[int]) -> dict[int, np.ndarray]:
    if not path.exists():
        raise ValueError(f"there is no {path}; measure the unedited model first (edits = 0)")
    try:
        with np.load(path) as file:
            states = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}; measure edits = 0 again") from None
    names = {layer: f"layer_{layer}" for layer in layers}
    if states["prompts"].tolist() != prompts or not states.keys() >= set(names.values()):
        raise ValueError(f"{path} has the hidden states of other prompts or layers; measure edits = 0 again")
    return {layer: states[name] for layer, name in names.items()}


def _compare(
    before: Mapping[int, np.ndarray], after: Mapping[int, np.ndarray], options: SideEffectOptions
) -> dict[str, dict[str, object]]:
    """By layer; None throughout where the edited model's states are not finite. What takes long, tests by permutation
    and maps, is shared out among processes."""
    finite = [layer for layer, states in after.items() if np.isfinite(states).all()]
    long = [(layer, part) for layer in finite for part in ("mixed", "paired", *options.maps)]

    def one(number: int) -> MMD | dict[str, object]:
        layer, part = long[number]
        if part not in options.maps:
            how = {"permutations": options.permutations, "seed": options.seed}
            return mmd(before[layer], after[layer], paired=part == "paired", **how)
        places = embed(before[layer], after[layer], part, options.seed)
        return dict(zip(("before", "after"), (np.round(place, 4).tolist() for place in places), strict=True))

    costs = [_COSTS.get(part, 1.0) for _, part in long]
    found = dict(zip(long, ranks().shared("comparing hidden states", costs, one), strict=True))
    names = ("relative_shift", "cka", "mmd2", "bandwidth", "p_value", "p_value_paired")
    layers: dict[str, dict[str, object]] = {str(layer): {**dict.fromkeys(names), "maps": {}} for layer in after}
    for layer in finite:
        mixed, paired = found[layer, "mixed"], found[layer, "paired"]
        shift, cka = relative_shift(before[layer], after[layer]), linear_cka(before[layer], after[layer])
        figures = (shift, cka, mixed.squared, mixed.bandwidth, mixed.p_value, paired.p_value)
        maps = {method: found[layer, method] for method in options.maps}
        layers[str(layer)] = {**dict(zip(names, figures, strict=True)), "maps": maps}
    return layers


def _finite(value: object) -> object:
    """JSON has no infinity and no NaN, which a model that has collapsed produces."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

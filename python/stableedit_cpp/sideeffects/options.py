"""What to measure of the side effects; checked before a model is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from stableedit_cpp.files.words import check_whole, with_nearest
from stableedit_cpp.sideeffects.downstream import RESERVED, TASKS, read_task
from stableedit_cpp.sideeffects.hidden_states import read_prompts
from stableedit_cpp.sideeffects.maps import MAPS
from stableedit_cpp.sideeffects.perplexity import read_texts

__all__ = ["LM_EVAL", "SideEffectOptions"]

LM_EVAL = "lm-eval"
_EXTRA = "pip install 'stableedit-cpp[sideeffects]'"


@dataclass(frozen=True, kw_only=True)
class SideEffectOptions:
    """
    Attributes:
        at: measure at all "checkpoints" of a stream, or before it and at its "end" (read by the benchmark).
        perplexity: name -> file with a running text (``.txt``) or with records that have a field ``text``.
        perplexity_tokens: tokens of each text file that are scored; None scores all.
        window: tokens of context that texts are cut into, at most the model's.
        downstream: directory with ``sst2.json`` and so on, or "lm-eval"; None leaves the tasks out.
        tasks: which of the six. few_shots: examples in the prompt. limit: records a task; None takes all.
        harness_tasks: for lm-eval, our name of a task -> the harness's. harness_path: directory with task files for it.
        prompts: file with unrelated prompts, whose hidden states are compared; None leaves them out.
        prompt_count: at most so many of them. layers: whose states, from the input (0) or from the end (-1).
        maps: "pca", "umap". permutations: of the MMD's test. seed: of permutations and maps.
        max_tokens_per_forward: tokens, padding included, in one forward pass; affects speed and memory only.
    """

    at: Literal["checkpoints", "end"] = "checkpoints"
    perplexity: Mapping[str, str] = field(default_factory=dict)
    perplexity_tokens: int | None = 20_000
    window: int = 1024
    downstream: str | None = None
    tasks: Sequence[str] = tuple(TASKS)
    few_shots: int = 0
    limit: int | None = None
    harness_tasks: Mapping[str, str] = field(default_factory=dict)
    harness_path: str | None = None
    prompts: str | None = None
    prompt_count: int = 500
    layers: Sequence[int] = (-1,)
    maps: Sequence[str] = MAPS
    permutations: int = 1000
    seed: int = 0
    max_tokens_per_forward: int = 2048

    def __post_init__(self) -> None:
        _choose("at", [self.at], ("checkpoints", "end"))
        for name in ("perplexity", "harness_tasks"):
            texts = getattr(self, name)
            if not isinstance(texts, Mapping) or not all(isinstance(x, str) for pair in texts.items() for x in pair):
                raise ValueError(f"side effects: {name} must map names to texts, not {texts!r}")
        for name in ("tasks", "layers", "maps"):
            if isinstance(getattr(self, name), str) or not isinstance(getattr(self, name), Sequence):
                raise ValueError(f"side effects: {name} must be a list, not {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("downstream", "harness_path", "prompts"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise ValueError(f"side effects: {name} must be a path, not {getattr(self, name)!r}")
        _choose("tasks", self.tasks, tuple(TASKS))
        _choose("maps", self.maps, MAPS)
        _choose("harness_tasks", list(self.harness_tasks), tuple(TASKS))
        least = {"window": 2, "prompt_count": 2, "permutations": 1, "few_shots": 0, "max_tokens_per_forward": 1}
        least |= {name: 1 for name in ("perplexity_tokens", "limit") if getattr(self, name) is not None}
        for name, low in least.items():
            check_whole(f"side effects: {name}", getattr(self, name), low)
        for name, values in (("layers", self.layers), ("seed", [self.seed])):
            if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
                raise ValueError(f"side effects: {name} must be whole numbers, not {getattr(self, name)!r}")
        if self.few_shots > RESERVED and self.downstream != LM_EVAL:
            raise ValueError(
                f"side effects: few_shots is {self.few_shots}; a task keeps {RESERVED} records for examples"
            )
        if not (self.perplexity or self.downstream or self.prompts):
            raise ValueError("side effects: nothing to measure; give perplexity, downstream or prompts")

    @classmethod
    def from_dict(cls, options: Mapping[str, object]) -> SideEffectOptions:
        """
        Raises:
            ValueError: for an unknown name or a bad value.
        """
        if not isinstance(options, Mapping):
            raise ValueError(f"side effects: expected names and values, not {options!r}")
        known = [entry.name for entry in fields(cls)]
        _choose("the options", list(options), tuple(known))
        return cls(**options)

    def check(self) -> None:
        """Find out before hours of work what cannot be measured.

        Raises:
            OSError, ValueError: for a file that is missing or not what it has to be, or a missing package.
        """
        for path in self.perplexity.values():
            read_texts(path)
        if self.prompts:
            read_prompts(self.prompts, self.prompt_count)
        if self.downstream == LM_EVAL:
            _need(["lm_eval"], "downstream lm-eval", "pip install 'stableedit-cpp[harness]'")
        elif self.downstream:
            _need(["sklearn"], "downstream tasks", _EXTRA)
            for task in self.tasks:
                read_task(self.downstream, task, self.few_shots, 1)
        if self.prompts:
            _need(["scipy", "sklearn", *(["umap"] if "umap" in self.maps else [])], "hidden states", _EXTRA)


def _choose(name: str, values: Sequence[object], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"side effects: {name} has {with_nearest(value, known)}")


def _need(modules: list[str], what: str, command: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{what} need{'s' if what.endswith('eval') else ''} {', '.join(missing)}: {command}")

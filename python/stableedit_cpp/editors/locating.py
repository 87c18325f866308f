"""Keys of the subjects of requests, and what a layer is to give there: what editors that locate facts solve for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.locate_config import LocateConfig
from stableedit_cpp.editors.targets import LocatedFact, Targets, find_targets
from stableedit_cpp.model.form import Form
from stableedit_cpp.model.located import read_at_the_end
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.subjects import subject_prefixes
from stableedit_cpp.model.tokens import TokenSequence, context_length, tokenize
from stableedit_cpp.model.trunk import TrunkCache, layers_of

__all__ = ["Locator", "check_located_modules"]


def check_located_modules(model: nn.Module, modules: Sequence[EditModule]) -> tuple[str, list[int]]:
    """Name of the list of layers, and the layer of each module.

    Raises:
        ValueError: unless each module writes into the residual stream from a layer of its own, below the last layer.
    """
    try:
        name, layers = layers_of(model, modules)
    except ValueError:
        raise ValueError(
            f"edit_modules: {', '.join(module.name for module in modules)} do not lie in one list of layers; they are "
            "edited layer by layer"
        ) from None
    if sorted(set(layers)) != layers:
        raise ValueError("edit_modules must name one module a layer, since one layer is edited after the other")
    if layers[-1] + 1 == len(model.get_submodule(name)):
        raise ValueError(
            f"edit_modules: {modules[-1].name} is in the last layer, above which nothing is left that could make an "
            "answer of what it gives; name earlier ones"
        )
    width = model.config.get_text_config(decoder=True).hidden_size
    for module in modules:
        if module.shape[1] != width:
            raise ValueError(
                f"edit_modules: {module.name} does not write into the residual stream (its output has "
                f"{module.shape[1]} dimensions, the stream {width}); name output projections of MLPs or attention"
            )
    return name, layers


class Locator:
    """Looks at the subjects of requests in a model as it is.

    Args:
        modules: that are edited, one a layer, from the first to the last.
        contexts: before each prompt, with the space between; the bare prompt comes first in all that follows.

    Attributes:
        layer: the one above the last that is edited, which reads what that gives.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        modules: Sequence[EditModule],
        form: Form,
        config: LocateConfig,
        contexts: Sequence[str],
    ) -> None:
        self.model, self.tokenizer, self.form, self.config = model, tokenizer, form, config
        self.contexts = ("", *contexts)
        name, layers = check_located_modules(model, modules)
        self.layer: nn.Module = model.get_submodule(f"{name}.{layers[-1] + 1}")
        self._trunk = TrunkCache.where_possible(model, modules)
        self._lower = TrunkCache(model, [EditModule(f"{name}.{layers[-1] + 1}", self.layer)])

    def begin(self) -> None:
        """A turn begins: nothing that was kept is of use."""
        for trunk in (self._trunk, self._lower):
            if trunk is not None:
                trunk.clear()

    def prefixes(self, requests: Sequence[EditRequest], names: Sequence[str]) -> list[list[tuple[int, ...]]]:
        """Of each statement, in each context, its token ids up to the end of the subject; ``names`` as for
        ``subject_prefixes``, which raises."""
        asked = [(prompt, request.subject) for request in requests for prompt, _ in request.statements]
        prompts, subjects = [prompt for prompt, _ in asked], [subject for _, subject in asked]
        return subject_prefixes(self.tokenizer, prompts, subjects, names, self.form, self.contexts)

    def facts(
        self, requests: Sequence[EditRequest], prefixes: Sequence[Sequence[tuple[int, ...]]], names: Sequence[str]
    ) -> list[LocatedFact]:
        """What ``find_targets`` takes, of each statement."""
        statements = [
            (prompt, target, request.subject) for request in requests for prompt, target in request.statements
        ]
        pairs = [(context + prompt, target) for prompt, target, _ in statements for context in self.contexts]
        called = [name for name in names for _ in self.contexts]
        texts = tokenize(self.tokenizer, pairs, context_length(self.model), called, self.form)
        subjects = [subject for *_, subject in statements]
        abouts = [f"{subject} is a" for subject in subjects]
        alone = subject_prefixes(self.tokenizer, abouts, subjects, names, self.form)
        size = len(self.contexts)
        return [
            LocatedFact(
                tuple(texts[number * size : (number + 1) * size]),
                tuple(len(prefix) - 1 for prefix in found),
                TokenSequence(about, (0,)),
            )
            for number, (found, (about,)) in enumerate(zip(prefixes, alone, strict=True))
        ]

    def targets(self, facts: Sequence[LocatedFact], names: Sequence[str]) -> Targets:
        """What the last edited layer is to give at the end of each subject."""
        how = {"names": names, "max_tokens": self.config.max_tokens_per_forward, "trunk": self._lower}
        try:
            return find_targets(self.model, self.layer, facts, self.config, **how)
        finally:
            self._lower.clear()

    def look(
        self, module: EditModule, prefixes: Sequence[Sequence[tuple[int, ...]]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys of a module ``[n, k]``, the mean of the bare prompt's and of the mean over contexts; and what the last
        edited layer gives now after the bare prompt, ``[n, d]``. Float32 at least."""
        texts = [text for found in prefixes for text in found]
        how = {"max_tokens": self.config.max_tokens_per_forward, "trunk": self._trunk}
        keys, states = read_at_the_end(self.model, module, self.layer, texts, **how)
        size = len(self.contexts)
        keys = keys.reshape(-1, size, keys.shape[1])
        bare = keys[:, 0]
        return (bare if size == 1 else (bare + keys[:, 1:].mean(1)) / 2), states[::size]

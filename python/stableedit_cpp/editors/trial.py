"""A trial of a set of modules: edit a sample in it, score what came of it, take it back."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.anchors import HELD_OUT, Anchors, unrelated_prompts
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.originals import swapped
from stableedit_cpp.editors.registry import make_editor
from stableedit_cpp.editors.stream import names_of
from stableedit_cpp.editors.trial_scores import Shares, Trial
from stableedit_cpp.editors.turn import owners_of
from stableedit_cpp.errors import StableEditError
from stableedit_cpp.evaluation.answers import token_accuracy
from stableedit_cpp.evaluation.locality import UneditedAnswers, locality
from stableedit_cpp.model.form import find_form
from stableedit_cpp.model.modules import find_modules
from stableedit_cpp.model.tokens import context_length, prompt_ids, tokenize

__all__ = ["Trials"]


class Trials:
    """Tries sets of modules on one model, with one config. The unrelated prompts are those that are never anchors; the
    unedited model answers them once.

    Args:
        model, tokenizer: the model must not be edited between trials.
        config: of the editor; its ``edit_modules`` are those of each trial.

    Raises:
        ValueError: for a form that the model does not have. ModelBroken: if the unedited model answers NaN.
    """

    def __init__(self, model: nn.Module, tokenizer, config: EditorConfig) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._config = config
        self._form, self._limit = find_form(model, tokenizer, **config.form), context_length(model)
        ids = [tuple(prompt) for prompt in prompt_ids(tokenizer, unrelated_prompts()[-HELD_OUT:], self._form)]
        ids = [prompt for prompt in ids if prompt and (self._limit is None or len(prompt) < self._limit)]
        self._held: dict = {}  # what all anchors know of their prompts
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}
        own = UneditedAnswers(model, known=self._known)
        self._unrelated = own.to(tokenizer, ids, end=self._form.end, max_tokens=config.max_tokens_per_forward)

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Raise what a trial would raise for bad requests."""
        self._tokenize(requests)

    def run(self, name: str, modules: list[str], requests: Sequence[EditRequest], passes: int) -> Trial:
        """Edit requests in these modules with so many passes at most, score them, and put the weights back, bit for
        bit, whatever happens.

        A set that cannot be edited gives a trial with the reason.
        """
        found = find_modules(self._model, modules)
        config = dataclasses.replace(
            self._config, edit_modules=modules, max_passes=min(passes, self._config.max_passes)
        )
        start = time.perf_counter()
        with swapped({module: module.weight.detach() for module in found}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # who edits in earnest hears them
            try:
                shares, drift, seconds = self._edit(config, requests)
            except (StableEditError, ValueError, torch.linalg.LinAlgError) as error:
                lost = time.perf_counter() - start
                return Trial(name, modules, len(requests), seconds=lost, reason=str(error).splitlines()[0])
        return Trial.of(name, modules, len(requests), shares, drift, seconds)

    def _edit(self, config: EditorConfig, requests: Sequence[EditRequest]) -> tuple[Shares, float, float]:
        editor = make_editor(self._model, self._tokenizer, config)
        editor.guard = None  # drift is scored, and every step taken back
        self._share_anchors(editor, requests)
        start = time.perf_counter()
        editor.edit(requests, outcomes=False, progress=False)
        seconds = time.perf_counter() - start

        statements, rephrased = self._tokenize(requests)
        how = {"max_tokens": config.max_tokens_per_forward, "trunk": editor.trunk}
        right = (token_accuracy(self._model, statements, **how) == 1.0).double()
        owners = torch.tensor(owners_of(requests), device="cpu")
        taken = torch.ones(len(requests), dtype=torch.float64, device="cpu").scatter_reduce(0, owners, right, "amin")
        paraphrases = torch.full_like(taken, torch.nan)
        if rephrased:
            rows = [i for i, request in enumerate(requests) if request.rephrase]
            paraphrases[rows] = (token_accuracy(self._model, rephrased, **how) == 1.0).double()
        unedited = UneditedAnswers(editor.unedited, known=self._known)
        kept = locality(self._model, unedited, self._unrelated, **how)
        return Shares(taken, paraphrases, kept.agreement), float(kept.kl.mean()), seconds

    def _share_anchors(self, editor: Editor, requests: Sequence[EditRequest]) -> None:
        """Their answers are those of the unedited model, whatever is edited: half of the cost of a trial."""
        for companion in editor.companions():
            if isinstance(companion, Anchors):
                companion.known = self._held
                companion.begin(editor.tokenize(requests))

    def _tokenize(self, requests: Sequence[EditRequest]):
        """Of all that is edited, and of the paraphrases that are not."""
        pairs = [statement for request in requests for statement in request.statements]
        again = {f"request {i}, rephrase": (r.rephrase, r.target) for i, r in enumerate(requests) if r.rephrase}
        return (
            tokenize(self._tokenizer, pairs, self._limit, names_of(requests), self._form),
            tokenize(self._tokenizer, list(again.values()), self._limit, list(again), self._form) if again else [],
        )

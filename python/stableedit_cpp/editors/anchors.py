"""Anchors: unrelated prompts whose answers are held to those of the unedited model while others are edited."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.resources import files

from torch import nn

from stableedit_cpp.editors.drawing import drawn_by, share_of
from stableedit_cpp.evaluation.divergence import log_probabilities
from stableedit_cpp.evaluation.locality import UneditedAnswers
from stableedit_cpp.model.capture import CapturedTurn, capture, join
from stableedit_cpp.model.form import Form
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.running import batches
from stableedit_cpp.model.tokens import TokenSequence, context_length, prompt_ids
from stableedit_cpp.model.top_tokens import TopTokens, top_tokens
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["GUARDED", "Anchors", "unrelated_prompts"]

GUARDED = 16  # of the unrelated prompts, the last ones, are never anchors: a guard looks at them
_EACH = 1  # anchor for each sequence of a pass
_ANSWER = 12  # tokens of the unedited model's own answer that are held
_TOP = 128  # tokens of a distribution that are told apart: 18 KB an anchor
_RARE = 0.02  # a token in no more than this share of the anchors says what an anchor is about


@cache
def unrelated_prompts() -> tuple[str, ...]:
    """Questions, instructions and beginnings of sentences in several languages, written for this package; the order is
    a random one, so that the first ones are of all kinds."""
    lines = files("stableedit_cpp.data").joinpath("unrelated.txt").read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line]
    random.Random(0).shuffle(prompts)
    return tuple(prompts)


class Anchors:
    """Adds to the rows of a pass those that pull unrelated prompts back to what the unedited model says to them.

    An anchor is a prompt with the unedited model's own greedy answer. Its loss is the KL divergence of the unedited
    model's next-token distributions along that answer to those of the edited one; keys and value gradients of this loss
    are rows of the same ridge system as those of the requests. Where nothing has drifted the gradients vanish, and the
    rows only hold what the module gives for their keys. Locality as a term of the loss is from MEND (arXiv 2110.11309);
    in the closed form of a ridge it is ours.

    Each turn draws its anchors from all of them, by the tokens of what it edits, so that the same turn has the same
    ones; the unedited model answers an anchor when it is first drawn. An anchor about what is edited stands back: one
    whose rarest tokens, and half of its rare ones, are in the prompt of a request, of this turn or an earlier one.

    Args:
        model, tokenizer, modules, form: those of the editor.
        unedited: shows the unedited model (``editor.unedited``).
        count: the most anchors a pass may have, one for each of its sequences but no fewer than 16.
        max_tokens: tokens, padding included, in one forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        modules: Sequence[EditModule],
        form: Form,
        unedited: Callable[[], AbstractContextManager[nn.Module]],
        *,
        count: int,
        max_tokens: int,
    ) -> None:
        self._model, self._tokenizer, self._modules, self._form = model, tokenizer, modules, form
        self._max_tokens, self._unedited = max_tokens, unedited
        self.count = count
        self.trunk = TrunkCache.where_possible(model, modules)
        limit = context_length(model)
        every = [tuple(prompt) for prompt in prompt_ids(tokenizer, unrelated_prompts()[:-GUARDED], form)]
        self.prompts = [prompt for prompt in every if prompt and (limit is None or len(prompt) < limit)]
        self._answers = UneditedAnswers(unedited, max_new_tokens=_ANSWER)
        self._known: dict[int, tuple[TokenSequence, TopTokens]] = {}
        self._subjects = _Subjects(self.prompts)
        self._turn: list[int] = []

    def begin(self, sequences: Sequence[TokenSequence], past: Iterable[TokenSequence] = ()) -> None:
        """Draw the anchors of a turn over ``sequences``, after those of ``past``.

        Raises:
            ModelBroken: if the unedited model answers NaN.
        """
        about = {index for group in (sequences, past) for sequence in group for index in self._subjects.of(sequence)}
        free = [index for index in range(len(self.prompts)) if index not in about]
        self._turn = drawn_by(sequences).sample(free, min(len(free), 2 * share_of(len(sequences), self.count, _EACH)))
        fresh = [index for index in self._turn if index not in self._known]
        if not fresh:
            return
        how = {"max_tokens": self._max_tokens}
        answered = self._answers.to(self._tokenizer, [self.prompts[i] for i in fresh], end=self._form.end, **how)
        with self._unedited() as shown:
            for batch in batches(shown, answered, trunk=self.trunk, **how):
                parts = top_tokens(log_probabilities(batch.logits), _TOP).split(batch.sizes)
                for place, part in zip(batch.indices, parts, strict=True):
                    self._known[fresh[place]] = (answered[place], part)

    def join(self, captured: CapturedTurn, sequences: Sequence[TokenSequence]) -> CapturedTurn:
        """The rows of a pass over ``sequences``, and behind them those of some anchors of the turn, which belong to no
        request (-1).

        An answer token of an anchor weighs in the loss as much as one of a request does on average.
        """
        number = min(share_of(len(sequences), self.count, _EACH), len(self._turn))
        chosen = drawn_by(sequences).sample(self._turn, number)
        if not chosen:
            return captured
        # The weights of the answer tokens of a micro-batch add up to one.
        weight = float(captured.owned.micro_batch.max() + 1) / sum(len(sequence.answer) for sequence in sequences)
        rows = capture(
            self._model,
            self._modules,
            [self._known[index][0] for index in chosen],
            max_tokens=self._max_tokens,
            reference=[self._known[index][1] for index in chosen],
            weight=weight,
            names=[f"unrelated prompt {index}" for index in chosen],
            trunk=self.trunk,
        )
        return join(captured, rows)


class _Subjects:
    """Which anchors are about what a request is about, by their rare tokens."""

    def __init__(self, prompts: Sequence[tuple[int, ...]]) -> None:
        counts = Counter(token for prompt in prompts for token in set(prompt))
        self._rare = [{t for t in prompt if counts[t] <= max(1, _RARE * len(prompts))} for prompt in prompts]
        self._by_rarest: dict[int, list[int]] = {}
        for index, tokens in enumerate(self._rare):
            fewest = min((counts[token] for token in tokens), default=0)
            for token in tokens:
                if counts[token] == fewest:
                    self._by_rarest.setdefault(token, []).append(index)
        self._found: dict[TokenSequence, tuple[int, ...]] = {}  # a stream asks for its past again and again

    def of(self, sequence: TokenSequence) -> tuple[int, ...]:
        if sequence not in self._found:
            asked = set(sequence.ids[: sequence.first + 1])
            close = {index for token in asked for index in self._by_rarest.get(token, ())}
            self._found[sequence] = tuple(i for i in close if 2 * len(self._rare[i] & asked) >= len(self._rare[i]))
        return self._found[sequence]

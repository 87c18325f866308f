"""Anchors: unrelated prompts whose answers are held to those of the unedited model while others are edited."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.resources import files

from torch import nn

from stableedit_cpp.editors.drawing import drawn_by, share_of
from stableedit_cpp.editors.topics import Topics
from stableedit_cpp.evaluation.divergence import log_probabilities
from stableedit_cpp.evaluation.locality import UneditedAnswers
from stableedit_cpp.model.capture import CapturedTurn, capture, join
from stableedit_cpp.model.form import Form
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.running import AnswerBatch, read_batches
from stableedit_cpp.model.tokens import TokenSequence, context_length, prompt_ids
from stableedit_cpp.model.top_tokens import TopTokens, top_tokens
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["HELD_OUT", "Anchors", "unrelated_prompts"]

HELD_OUT = 16  # of the unrelated prompts, the last ones, are never anchors: what an edit does elsewhere is seen there
_EACH = 1  # anchor for each sequence of a pass
_ANSWER = 12  # tokens of the unedited model's own answer that are held
_TOP = 128  # tokens of a distribution that are told apart: 18 KB an anchor


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

    Half of the anchors of a turn are those nearest to what it edits (``Topics``), since an edit spills over to its like
    first; the others are drawn by the tokens of what it edits, so that the same turn has the same ones. The unedited
    model answers an anchor when it is first needed. An anchor about what is edited, now or earlier, stands back.

    Args:
        model, tokenizer, modules, form: those of the editor.
        unedited: shows the unedited model (``editor.unedited``).
        count: the most anchors a pass may have, one for each of its sequences but no fewer than 16.
        max_tokens: tokens, padding included, in one forward pass.

    Attributes:
        prompts: token ids of all that may become anchors.
        known: by index of the prompt, the unedited model's answer and the distributions along it, of those that were
            needed so far; anchors of one model in one form may share it.
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
        every = [tuple(prompt) for prompt in prompt_ids(tokenizer, unrelated_prompts()[:-HELD_OUT], form)]
        self.prompts = [prompt for prompt in every if prompt and (limit is None or len(prompt) < limit)]
        self._answers = UneditedAnswers(unedited, max_new_tokens=_ANSWER)
        self.known: dict[int, tuple[TokenSequence, TopTokens]] = {}
        self._topics = Topics(self.prompts)
        self._near: list[int] = []  # those of the turn, the nearest first; and the others
        self._others: list[int] = []

    def begin(self, sequences: Sequence[TokenSequence], past: Iterable[TokenSequence] = ()) -> None:
        """Draw the anchors of a turn over ``sequences``, after those of ``past``.

        Raises:
            ModelBroken: if the unedited model answers NaN.
        """
        if self.trunk is not None and self.trunk.renew():
            self.known.clear()  # of what was another model
        about = {index for group in (sequences, past) for one in group for index in self._topics.about(one)}
        free = [index for index in range(len(self.prompts)) if index not in about]
        count = min(len(free), 2 * share_of(len(sequences), self.count, _EACH))
        near = self._topics.nearest(sequences, count // 2, free)
        others = sorted(set(free).difference(near))
        self._near, self._others = near, drawn_by(sequences).sample(others, count - len(near))
        fresh = [index for index in near + self._others if index not in self.known]
        if not fresh:
            return
        how = {"max_tokens": self._max_tokens}
        answered = self._answers.to(self._tokenizer, [self.prompts[i] for i in fresh], end=self._form.end, **how)
        with self._unedited() as shown:
            for places, parts in read_batches(shown, answered, _tops, trunk=self.trunk, **how):
                for place, part in zip(places, parts, strict=True):
                    self.known[fresh[place]] = (answered[place], part)

    def join(self, captured: CapturedTurn, sequences: Sequence[TokenSequence]) -> CapturedTurn:
        """The rows of a pass over ``sequences``, and behind them those of anchors of the turn, which belong to none of
        its requests (-1): half of them are the nearest.

        An answer token of an anchor weighs in the loss as much as one of a request does on average.
        """
        number = share_of(len(sequences), self.count, _EACH)
        near = self._near[: number // 2]
        rest = self._near[len(near) :] + self._others
        chosen = near + drawn_by(sequences).sample(rest, min(number - len(near), len(rest)))
        if not chosen:
            return captured
        # The weights of the answer tokens of a micro-batch add up to one.
        weight = float(captured.owned.micro_batch.max() + 1) / sum(len(sequence.answer) for sequence in sequences)
        rows = capture(
            self._model,
            self._modules,
            [self.known[index][0] for index in chosen],
            max_tokens=self._max_tokens,
            reference=[self.known[index][1] for index in chosen],
            weight=weight,
            names=[f"unrelated prompt {index}" for index in chosen],
            trunk=self.trunk,
        )
        return join(captured, rows)


def _tops(batch: AnswerBatch) -> Sequence[TopTokens]:
    return top_tokens(log_probabilities(batch.logits), _TOP).split(batch.sizes)

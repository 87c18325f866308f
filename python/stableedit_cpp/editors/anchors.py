"""Anchors: unrelated prompts whose answers are held to those of the unedited model while others are edited."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.resources import files

import torch
from torch import nn

from stableedit_cpp.evaluation.divergence import log_probabilities
from stableedit_cpp.evaluation.locality import UneditedAnswers
from stableedit_cpp.model.capture import CapturedTurn, capture, join
from stableedit_cpp.model.form import Form
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.running import batches
from stableedit_cpp.model.tokens import TokenSequence, context_length, prompt_ids
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["Anchors", "unrelated_prompts"]

_ANSWER = 12  # tokens of the unedited model's own answer that are held
_POOL = 2  # so many times the anchors of a pass there are in all
_FEWEST = 16  # anchors of a pass, also where it edits a single fact


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

    The unedited distributions are kept in float16: ``2 * vocabulary`` bytes a token of an answer, in host memory.

    Args:
        model, tokenizer, modules, form: those of the editor.
        unedited: shows the unedited model (``editor.unedited``).
        count: the most anchors a pass may have, one for every second of its sequences but no fewer than 16. They are
            drawn from twice ``count`` by the tokens of what the pass edits, so that the same pass has the same anchors.
        max_tokens: tokens, padding included, in one forward pass.

    Raises:
        ModelBroken: if the unedited model answers NaN.
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
        self._model, self._modules, self._max_tokens = model, modules, max_tokens
        self.count = count
        self.trunk = TrunkCache.where_possible(model, modules)
        limit = context_length(model)
        ids = [tuple(prompt) for prompt in prompt_ids(tokenizer, unrelated_prompts()[: _POOL * count], form)]
        ids = [prompt for prompt in ids if prompt and (limit is None or len(prompt) < limit)]
        answers = UneditedAnswers(unedited, max_new_tokens=_ANSWER)
        self.sequences = answers.to(tokenizer, ids, end=form.end, max_tokens=max_tokens)
        self._reference: list[torch.Tensor] = [torch.empty(0, device="cpu")] * len(self.sequences)
        with unedited() as shown:
            for batch in batches(shown, self.sequences, max_tokens=max_tokens, trunk=self.trunk):
                parts = log_probabilities(batch.logits).half().cpu().split(batch.sizes)
                for index, part in zip(batch.indices, parts, strict=True):
                    self._reference[index] = part.clone()

    def join(self, captured: CapturedTurn, sequences: Sequence[TokenSequence]) -> CapturedTurn:
        """The rows of a pass over ``sequences``, and behind them those of its anchors, which belong to no request (-1).

        An answer token of an anchor weighs in the loss as much as one of a request does on average.
        """
        tokens = [token for sequence in sequences for token in sequence.ids + sequence.answer]
        drawn = random.Random(zlib.crc32(repr(tokens).encode()))
        number = min(self.count, len(self.sequences), max(_FEWEST, len(sequences) // 2))
        chosen = drawn.sample(range(len(self.sequences)), number)
        # The weights of the answer tokens of a micro-batch add up to one.
        weight = float(captured.micro_batch.max() + 1) / sum(len(sequence.answer) for sequence in sequences)
        rows = capture(
            self._model,
            self._modules,
            [self.sequences[index] for index in chosen],
            max_tokens=self._max_tokens,
            reference=[self._reference[index] for index in chosen],
            weight=weight,
            names=[f"unrelated prompt {index}" for index in chosen],
            trunk=self.trunk,
        )
        return join(captured, rows)

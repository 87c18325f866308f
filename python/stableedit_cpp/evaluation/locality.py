"""Locality: does the edited model still say what the unedited one says of its own accord?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from stableedit_cpp.evaluation.answers import refuse_broken
from stableedit_cpp.evaluation.divergence import kl_divergence, log_probabilities
from stableedit_cpp.evaluation.generation import write_greedily
from stableedit_cpp.model.running import AnswerBatch, read_batches
from stableedit_cpp.model.tokens import TokenSequence, context_length
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["Locality", "Reference", "UneditedAnswers", "answer_log_probabilities", "locality"]

# The unedited model, or what shows it for a while: ``editor.unedited``.
Reference = nn.Module | Callable[[], AbstractContextManager[nn.Module]]

# Showing the unedited model copies every edited weight three times, so it answers many prompts at a time: as many as
# have so many log-probabilities, 256 MiB in float32.
_KEPT = 2**26


class UneditedAnswers:
    """What the unedited model answers greedily to unrelated prompts, each prompt once: the answers never change, so
    one of these serves all evaluations along a stream of edits.

    Args:
        reference: the unedited model, or what shows it for a while (``editor.unedited``).
        known: answers to token ids of prompts that are there already, and into which new ones go; for several of these
            that show the same unedited model.
        max_new_tokens: an answer is cut off after so many.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        known: dict[tuple[int, ...], tuple[int, ...]] | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        self._reference, self._room = reference, max_new_tokens
        self._answers = {} if known is None else known

    def shown(self) -> AbstractContextManager[nn.Module]:
        """The unedited model, within this context."""
        return nullcontext(self._reference) if isinstance(self._reference, nn.Module) else self._reference()

    def to(
        self,
        tokenizer,
        prompts: Sequence[tuple[int, ...]],
        *,
        end: int | None = None,
        max_tokens: int = 2048,
        on_done: Callable[[int], object] | None = None,
    ) -> list[TokenSequence]:
        """Each prompt with its answer, up to the token that ends it, or as long as the context allows.

        Args:
            prompts: token ids, no longer than the model's context; the same one may come several times.
            end: a token that ends an answer beside those at which the model's generation stops.
            max_tokens: prompt tokens, padding included, in one batch.
            on_done: called with the number of prompts after each batch.

        Raises:
            ModelBroken: if the unedited model answers NaN.
        """
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._answers]
        if fresh:
            with self.shown() as model:
                limit = context_length(model)
                room = [self._room if limit is None else min(self._room, limit - len(p) + 1) for p in fresh]
                asked = [TokenSequence(prompt, ()) for prompt in fresh]
                how = {"end": end, "max_tokens": max_tokens, "on_done": on_done}
                written = write_greedily(model, tokenizer, asked, room, **how)
                broken = [f"unrelated prompt {index}" for index, answer in enumerate(written) if answer.broken]
                refuse_broken(model, broken, len(fresh), "the unedited model")
            self._answers.update({prompt: answer.tokens for prompt, answer in zip(fresh, written, strict=True)})
        if on_done is not None:
            on_done(len(prompts) - len(fresh))
        return [TokenSequence(prompt + answer[:-1], answer) for prompt in prompts for answer in [self._answers[prompt]]]


class Locality(NamedTuple):
    """Of each prompt, ``[prompts]`` float64 on the CPU.

    Attributes:
        same: 1 where the edited model's greedy answer is the unedited one's, the whole of it, and 0 elsewhere.
        agreement: share of the answer's tokens at which both models have the same top choice.
        kl: mean over these tokens of KL(unedited || edited) of the next-token distributions, in nats; NaN where the
            edited model is broken (the others are 0 there).
    """

    same: torch.Tensor
    agreement: torch.Tensor
    kl: torch.Tensor


def locality(
    model: nn.Module,
    unedited: UneditedAnswers,
    answers: Sequence[TokenSequence],
    *,
    max_tokens: int,
    trunk: TrunkCache | None = None,
    on_done: Callable[[int], object] | None = None,
) -> Locality:
    """Run the edited model over the answers that the unedited one gives of its own accord.

    Where both have the same top choice at every token of such an answer, the edited model's own greedy answer is that
    answer: nothing has to be generated.

    Args:
        answers: of ``unedited.to``; the same one may come several times and is run once.
        max_tokens: tokens, padding included, in one forward pass.
        trunk: keeps and reuses the output of the layers that no edit changes, for both where they are one model.
        on_done: called with the number of answers after each batch.

    Raises:
        ValueError: if the two have vocabularies of different sizes; a trunk cache whose layers have changed.
        ModelBroken: if the unedited model answers NaN.
    """
    owners: dict[TokenSequence, list[int]] = {}
    for index, answer in enumerate(answers):
        owners.setdefault(answer, []).append(index)
    different = list(owners)
    found = torch.zeros(len(Locality._fields), len(answers), dtype=torch.float64, device="cpu")
    for part in _parts(different, max(1, _KEPT // _vocabulary(model))):
        with unedited.shown() as shown:
            if _vocabulary(shown) != _vocabulary(model):
                raise ValueError(
                    f"the reference model has a vocabulary of {_vocabulary(shown)} tokens, the model one of "
                    f"{_vocabulary(model)}; expected the unedited version of the same model"
                )
            expected = answer_log_probabilities(
                shown, part, max_tokens=max_tokens, trunk=trunk if shown is model else None
            )
            broken = [f"unrelated prompt {owners[part[i]][0]}" for i, rows in enumerate(expected) if rows.isnan().any()]
            refuse_broken(shown, broken, len(part), "the unedited model")

        def read(batch: AnswerBatch, expected: list[torch.Tensor] = expected) -> list[torch.Tensor]:
            after = log_probabilities(batch.logits)
            before = torch.cat([expected[index] for index in batch.indices]).to(after.device)
            kl = kl_divergence(before, after)
            agrees = (before.argmax(-1) == after.argmax(-1)).double().cpu()
            agrees[kl.isnan()] = 0.0  # the top choice among NaN is none
            return [
                torch.stack([rows.min(), rows.mean(), distances.mean()])
                for rows, distances in zip(agrees.split(batch.sizes), kl.split(batch.sizes), strict=True)
            ]

        def done(indices: Sequence[int], part: list[TokenSequence] = part) -> None:
            if on_done is not None:
                on_done(sum(len(owners[part[index]]) for index in indices))

        how = {"max_tokens": max_tokens, "trunk": trunk, "on_done": done}
        for indices, values in read_batches(model, part, read, **how):
            for index, value in zip(indices, values, strict=True):
                found[:, owners[part[index]]] = value.unsqueeze(1)
    return Locality(*found)


def answer_log_probabilities(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    trunk: TrunkCache | None = None,
    kept_as: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """The next-token distributions along each answer, ``[answer tokens, vocabulary]`` natural logarithms.

    Args:
        max_tokens, trunk: as ``locality``.
        kept_as: in this dtype and in host memory, for a reference that is kept; None leaves them where the model puts
            them, in float32 or better.
    """
    found: list[torch.Tensor] = [torch.empty(0, device="cpu")] * len(sequences)

    def read(batch: AnswerBatch) -> list[torch.Tensor]:
        rows = log_probabilities(batch.logits)
        rows = rows if kept_as is None else rows.to("cpu", kept_as)
        parts = rows.split(batch.sizes)
        return [part if kept_as is None else part.clone() for part in parts]  # without the rest of the batch

    for indices, parts in read_batches(model, sequences, read, max_tokens=max_tokens, trunk=trunk):
        for index, part in zip(indices, parts, strict=True):
            found[index] = part
    return found


def _parts(sequences: Sequence[TokenSequence], size: int) -> Iterator[list[TokenSequence]]:
    """In order, cut where ``size`` answer tokens are reached."""
    part: list[TokenSequence] = []
    held = 0
    for sequence in sequences:
        part.append(sequence)
        held += len(sequence.answer)
        if held >= size:
            yield part
            part, held = [], 0
    if part:
        yield part


def _vocabulary(model: nn.Module) -> int:
    """Its size, or that of a large one where the config does not say."""
    return getattr(model.config.get_text_config(), "vocab_size", 2**18)

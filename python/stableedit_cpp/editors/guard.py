"""Watches what the model says to prompts that no edit is about, so that edits stop before they ruin it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import ClassVar, NamedTuple, Protocol

import torch
from tqdm.auto import tqdm

from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.drawing import drawn_by
from stableedit_cpp.errors import DriftLimitReached, ModelBroken
from stableedit_cpp.evaluation.divergence import kl_divergence, log_probabilities
from stableedit_cpp.evaluation.locality import UneditedAnswers, answer_log_probabilities
from stableedit_cpp.files.words import check_whole
from stableedit_cpp.model.form import Form
from stableedit_cpp.model.running import AnswerBatch, read_batches
from stableedit_cpp.model.tokens import TokenSequence, context_length, prompt_ids
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["Drift", "LocalityGuard", "guarded_prompts"]

_SAMPLE = 4  # of our own prompts are looked at after a pass
_MANY = 16  # sequences in a turn, from which on a look takes two forward passes, which processes can share out
_ANSWER = 8  # tokens of the unedited model's own answer that are watched
# The limit, where the user gives none: this share of what a prompt tells the unedited model about its answer, and for
# models that hardly tell one prompt from another, so many nats.
_SHARE = 2 / 3
_LEAST = 0.5
_TURN = 0.25  # of that limit one turn may add, or so many nats as above


@cache
def guarded_prompts() -> tuple[str, ...]:
    """Facts, sums, requests and beginnings of sentences in several languages, written for this package."""
    text = files("stableedit_cpp.data").joinpath("guarded.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


@dataclass(frozen=True)
class Drift:
    """KL(unedited || edited) of the next-token distributions along the unedited model's own answers, in nats.

    Attributes:
        mean, largest: over the prompts; NaN where the model answers NaN to one of them.
        per_prompt: mean over the tokens of the answer, ``[prompts]`` float64 on the CPU.
    """

    mean: float
    largest: float
    per_prompt: torch.Tensor


class Look(NamedTuple):
    """What the guard saw after a pass, in nats.

    Attributes:
        drift: mean over the prompts that were run. rise: of the sample's mean since the turn began.
        within: whether the pass may stay.
    """

    drift: float
    rise: float
    within: bool


class Guarded(Protocol):
    """What of an editor its guard needs."""

    model: torch.nn.Module
    tokenizer: object
    form: Form

    @property
    def config(self) -> EditorConfig: ...

    def unedited(self) -> AbstractContextManager[torch.nn.Module]: ...

    def make_trunk_cache(self) -> TrunkCache | None: ...


class LocalityGuard:
    """Keeps the drift of an editor's model on unrelated prompts below a limit.

    An editor has one with the defaults below, made at its first edit; another one is set with ``editor.guard = ...``,
    and None turns it off. After every pass the prompts are run along the answers that the unedited model gave of its
    own accord. A pass that takes the mean drift beyond the limit, or the model to NaN, is solved again with half the
    step and twice the ridge, up to ``back_offs`` times. If that does not help, a turn that has solved before ends with
    its best pass, and one that has not is taken back and ends the stream with ``DriftLimitReached`` or ``ModelBroken``.
    Every pass begins with the step and ridge that it has without a guard; where nothing is refused, the guard changes
    no bit.

    The default limit is two thirds of what a prompt tells the unedited model about its answer: the mean KL divergence
    of its distributions along all answers from their average. A model that said the same to every prompt, as well as
    that can be said, would have a drift of the whole of it (3.0 nats for SmolLM2 and plain text, 3.8 as chats). Under
    this limit a prompt counts with no more than the whole: after long streams some prompts are answered in the form of
    the edits and drift without bounds, where the others are as they were. It is at least 0.5 nats, since a model with
    random weights tells prompts hardly apart. And one turn may add no more than a quarter of it, or 0.5 nats: a hundred
    edits add some hundredths to two tenths, a single one that ruins adds nats.

    The reference, the unedited model's log-probabilities, is taken once, in float16 and host memory: ``2 * vocabulary``
    bytes for each of up to eight tokens of an answer (13 MB for the default prompts and 49,152 tokens).

    Args:
        editor: edited already or not; the reference is that of its unedited model.
        prompts: texts that no edit is about, and whose answers shall stay; in the editor's form (as a user's turn where
            it edits chats). All of them are run after each pass. None takes 16 of ours (``guarded_prompts``), which are
            no anchors; four of them, drawn by what a turn edits, are run before it and after each pass, and the others
            as well where these have drifted beyond half of the limit.
        limit: of the mean drift, in nats, > 0, with no bound for one prompt or one turn; None takes those above.
        back_offs: how often a pass is tried again, >= 0.
        progress: show a bar while the reference is taken; None shows it on a terminal.

    Attributes:
        limit: may be set. turn_limit: so much one turn may add, in nats; may be set.
        trunk: output of the layers below the edited ones, of its prompts.

    Raises:
        ValueError: for a bad argument, or a prompt without tokens or longer than the model's context.
        ModelBroken: if the unedited model answers NaN to a prompt.
    """

    # With each back-off step_size is multiplied by the first and ridge by the second.
    step_factor: ClassVar[float] = 0.5
    ridge_factor: ClassVar[float] = 2.0

    def __init__(
        self,
        editor: Guarded,
        prompts: Sequence[str] | None = None,
        *,
        limit: float | None = None,
        back_offs: int = 3,
        progress: bool | None = None,
    ) -> None:
        if limit is not None and not 0.0 < limit < math.inf:
            raise ValueError(f"limit must be greater than 0, in nats, not {limit!r}")
        check_whole("back_offs", back_offs, 0)
        ids = _own(editor) if prompts is None else _given(editor, prompts)
        self.back_offs = back_offs
        self._sample = _SAMPLE if prompts is None else len(ids)
        self._automatic = editor.config.step_size == "auto"
        self._model = editor.model
        self._max_tokens = editor.config.max_tokens_per_forward
        self.trunk = editor.make_trunk_cache()
        bar = tqdm(total=len(ids), desc="Guard", unit="prompt", disable=None if progress is None else not progress)
        with bar, editor.unedited() as model:
            answers, how = UneditedAnswers(model, max_new_tokens=_ANSWER), {"max_tokens": self._max_tokens}
            end = editor.form.end
            self._sequences = answers.to(editor.tokenizer, ids, end=end, on_done=bar.update, **how)
            how |= {"trunk": self.trunk, "kept_as": torch.float16}
            self._reference = answer_log_probabilities(model, self._sequences, **how)
        whole = max(_LEAST / _SHARE, _information(self._reference)) if limit is None else math.inf
        self.limit = _SHARE * whole if limit is None else float(limit)
        self.turn_limit = math.inf if limit is not None else max(_LEAST, _TURN * self.limit)
        self._most = whole  # that one prompt counts with
        self._sampled: Sequence[int] = range(len(ids))
        self._halved = False
        self._start = 0.0

    def __len__(self) -> int:
        return len(self._sequences)

    def drift(self) -> Drift:
        """Measure the drift of the model as it is now, on all prompts."""
        found = self._measure(range(len(self)))
        return Drift(float(found.mean()), float(found.max()), found)

    def begin(self, edited: Sequence[TokenSequence]) -> None:
        """Before a turn.

        Args:
            edited: what it edits, which draws the sample: the same turn is looked at in the same way.
        """
        self._sampled = drawn_by(edited).sample(range(len(self)), min(self._sample, len(self)))
        self._halved = len(edited) >= _MANY
        self._start = self._mean(self._measure(self._sampled, self._halved)) if self.turn_limit < math.inf else 0.0

    def look(self) -> Look:
        """After a pass: run the sample, and all prompts where that has drifted far."""
        drift = self._mean(self._measure(self._sampled, self._halved))
        rise = drift - self._start
        if len(self._sampled) < len(self) and not drift <= 0.5 * self.limit:
            drift = self._mean(self._measure(range(len(self)), self._halved))
        return Look(drift, rise, drift <= self.limit and rise <= self.turn_limit)

    def refusal(self, look: Look) -> DriftLimitReached | ModelBroken:
        """The error that says why a pass was refused for good, after whose last attempt this was seen."""
        tries = f"also after {self.back_offs} back-offs; the turn in flight was taken back"
        if not math.isfinite(look.drift):
            return ModelBroken(f"the model would answer NaN or infinity to the {len(self)} guarded prompts, {tries}")
        beyond = f"beyond the limit of {self.limit:.3g}"
        if look.drift <= self.limit:
            beyond = f"and {look.rise:.3g} more by this turn alone, beyond the {self.turn_limit:.3g} that one may add"
        instead = "" if self._automatic else "the automatic step in the place of a number, "
        return DriftLimitReached(
            f"the mean drift of the {len(self)} guarded prompts would be {look.drift:.3g} nats, {beyond}, {tries}. "
            f"What may help: fewer edits or smaller turns, {instead}other edit_modules; or a higher limit of the "
            "guard, or none, if other answers do not matter",
            look.drift,
        )

    def _mean(self, drift: torch.Tensor) -> float:
        return float(drift.clamp_max(self._most).mean())  # NaN stays NaN

    def _measure(self, indices: Sequence[int], halved: bool = False) -> torch.Tensor:
        """Drift of some prompts, ``[len(indices)]`` float64 on the CPU; ``halved`` runs them in two halves at least."""
        sequences = [self._sequences[index] for index in indices]
        if self.trunk is not None:
            try:
                self.trunk.check(sequences)
            except ValueError:  # the caller has changed other weights: what was kept is of no use, the reference stays
                self.trunk.clear()
        found = torch.zeros(len(sequences), dtype=torch.float64, device="cpu")

        def read(batch: AnswerBatch) -> torch.Tensor:
            likely = log_probabilities(batch.logits)
            reference = torch.cat([self._reference[indices[place]] for place in batch.indices]).to(likely)
            # Rounded to half precision it is no longer a distribution to the last digit, and the divergence could
            # become negative.
            divergence = kl_divergence(reference.log_softmax(-1), likely)
            return torch.stack([part.mean() for part in divergence.split(batch.sizes)]).double().cpu()

        most = -(-len(sequences) // 2) if halved else None
        how = {"max_tokens": self._max_tokens, "most": most, "trunk": self.trunk}
        for places, values in read_batches(self._model, sequences, read, **how):
            found[places] = values
        return found


def _given(editor: Guarded, prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """The user's prompts as token ids."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be a list of texts, at least one")
    limit = context_length(editor.model)
    found = [tuple(ids) for ids in prompt_ids(editor.tokenizer, prompts, editor.form)]
    for index, ids in enumerate(found):
        if not ids:
            raise ValueError(f"prompt {index} ({prompts[index]!r:.60}) has no tokens")
        if limit is not None and len(ids) > limit:
            raise ValueError(f"prompt {index} has {len(ids)} tokens, more than the model's context of {limit}")
    return found


def _own(editor: Guarded) -> list[tuple[int, ...]]:
    """Ours, as token ids; those that the model has room for."""
    limit = context_length(editor.model)
    found = [tuple(ids) for ids in prompt_ids(editor.tokenizer, guarded_prompts(), editor.form)]
    found = [ids for ids in found if ids and (limit is None or len(ids) < limit)]
    if not found:
        raise ValueError(
            f"the model's context of {limit} has room for none of the guard's {len(guarded_prompts())} prompts"
        )
    return found


def _information(rows: Sequence[torch.Tensor]) -> float:
    """Mean KL divergence, in nats, of next-token distributions from the average of all.

    Args:
        rows: of each answer, ``[answer tokens, vocabulary]`` log-probabilities.
    """
    total = sum(len(part) for part in rows)
    likely = [part.float().log_softmax(-1) for part in rows]
    average = sum(part.exp().sum(0) for part in likely) / total
    average = average.clamp_min(torch.finfo(average.dtype).tiny).log()  # 0, rounded, of what all but rule out
    return float(sum(kl_divergence(part, average).sum() for part in likely) / total)

"""Watches what the model says to prompts that no edit is about."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tqdm.auto import tqdm

from stableedit_cpp.editors.anchors import unrelated_prompts
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.errors import DriftLimitReached, ModelBroken
from stableedit_cpp.evaluation.divergence import kl_divergence, log_probabilities
from stableedit_cpp.files.words import check_whole
from stableedit_cpp.model.running import batches
from stableedit_cpp.model.tokens import TokenSequence, context_length, prompt_ids

__all__ = ["Drift", "LocalityGuard"]

_OWN = 64  # prompts, where the user gives none


@dataclass(frozen=True)
class Drift:
    """KL divergence of the unedited model's next-token distribution to the edited one's, in nats.

    Attributes:
        mean, largest: over the prompts; NaN where the model answers NaN to one of them.
        per_prompt: ``[prompts]`` float64 on the CPU.
    """

    mean: float
    largest: float
    per_prompt: torch.Tensor


class LocalityGuard:
    """Keeps the drift of an editor's model on unrelated prompts below a limit.

    Set ``editor.guard`` to it: after every pass the prompts are run, and a pass that takes the mean drift beyond the
    limit, or the model to NaN, is solved again with half the step and twice the ridge, up to ``back_offs`` times; then
    editing stops with ``DriftLimitReached``, or ``ModelBroken``. Every pass begins with the configured step and ridge.

    The reference, the unedited model's log-probabilities of the token after each prompt, is taken once, in float16:
    ``2 * vocabulary`` bytes a prompt (0.1 MB for 49,152 tokens).

    Args:
        editor: edited already or not; the reference is that of its unedited model.
        prompts: texts that no edit is about, and whose continuation shall stay; in the editor's form (as a user's turn
            where it edits chats). Some dozens give a steady mean. None takes 64 of ``unrelated_prompts``, which are not
            among the anchors of an editor that has 59 or fewer.
        limit: of the mean drift, in nats, > 0.
        back_offs: how often a pass is tried again, >= 0.
        progress: show a bar while the reference is computed; None shows it on a terminal.

    Raises:
        ValueError: for a bad argument, or a prompt without tokens or longer than the model's context.
        ModelBroken: if the unedited model answers NaN to a prompt.
    """

    # With each back-off step_size is multiplied by the first and ridge by the second.
    step_factor: ClassVar[float] = 0.5
    ridge_factor: ClassVar[float] = 2.0

    def __init__(
        self,
        editor: Editor,
        prompts: Sequence[str] | None = None,
        *,
        limit: float,
        back_offs: int = 3,
        progress: bool | None = None,
    ) -> None:
        if prompts is None:
            prompts = unrelated_prompts()[-_OWN:]
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("prompts must be a list of texts, at least one")
        if not 0.0 < limit < math.inf:
            raise ValueError(f"limit must be greater than 0, in nats, not {limit!r}")
        check_whole("back_offs", back_offs, 0)
        self.limit = float(limit)
        self.back_offs = back_offs
        self._model = editor.model
        self._max_tokens = editor.config.max_tokens_per_forward
        self._sequences = _sequences(editor, prompts)
        self.trunk = editor.make_trunk_cache()
        self._reference: list[torch.Tensor] = [torch.empty(0, device="cpu")] * len(prompts)
        bar = tqdm(total=len(prompts), desc="Guard", unit="prompt", disable=None if progress is None else not progress)
        with bar, editor.unedited():
            for indices, likely in self._log_probabilities():
                for index, row in zip(indices, likely.half().cpu(), strict=True):
                    if row.isnan().any():
                        raise ModelBroken(f"the unedited model answers NaN to prompt {index} ({prompts[index]!r:.60})")
                    self._reference[index] = row.clone()
                bar.update(len(indices))

    def __len__(self) -> int:
        return len(self._sequences)

    def drift(self) -> Drift:
        """Measure the drift of the model as it is now."""
        found = torch.zeros(len(self), dtype=torch.float64, device="cpu")
        for indices, likely in self._log_probabilities():
            reference = torch.stack([self._reference[index] for index in indices]).to(likely)
            # Rounded to half precision it is no longer a distribution to the last digit, and the divergence could
            # become negative.
            found[indices] = kl_divergence(reference.log_softmax(-1), likely)
        return Drift(float(found.mean()), float(found.max()), found)

    def refusal(self, drift: float) -> DriftLimitReached | ModelBroken:
        """The error that says why a pass was refused for good, whose last attempt had this mean drift."""
        tries = f"also after {self.back_offs} back-offs; the turn in flight was taken back"
        if not math.isfinite(drift):
            return ModelBroken(f"the model would answer NaN or infinity to the {len(self)} guarded prompts, {tries}")
        return DriftLimitReached(
            f"the mean drift of the {len(self)} guarded prompts would be {drift:.3g} nats, beyond the limit of "
            f"{self.limit:.3g}, {tries}",
            drift,
        )

    def _log_probabilities(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Batch by batch: indices of the prompts and ``[prompts, vocabulary]`` log-probabilities, float32 at least."""
        for batch in batches(self._model, self._sequences, max_tokens=self._max_tokens, trunk=self.trunk):
            yield batch.indices, log_probabilities(batch.logits)


def _sequences(editor: Editor, prompts: Sequence[str]) -> list[TokenSequence]:
    """Each prompt, ready to predict one token after it."""
    limit = context_length(editor.model)
    found = []
    for index, ids in enumerate(prompt_ids(editor.tokenizer, prompts, editor.form)):
        if not ids:
            raise ValueError(f"prompt {index} ({prompts[index]!r:.60}) has no tokens")
        if limit is not None and len(ids) > limit:
            raise ValueError(f"prompt {index} has {len(ids)} tokens, more than the model's context of {limit}")
        found.append(TokenSequence(tuple(ids), (ids[-1],)))  # which token is asked for does not matter here
    return found

"""Watches what the model says to prompts that no edit is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from stableedit_cpp.model.running import answer_logits, input_device, untouched
from stableedit_cpp.model.tokens import TokenSequence, collate, context_length, pack, prompt_ids

if TYPE_CHECKING:
    from stableedit_cpp.editors.editor import Editor

__all__ = ["Drift", "LocalityGuard"]


@dataclass(frozen=True)
class Drift:
    """KL divergence of the unedited model's next-token distribution to the edited one's, in nats.

    Attributes:
        mean, largest: over the prompts. per_prompt: ``[prompts]`` float64 on the CPU.
    """

    mean: float
    largest: float
    per_prompt: torch.Tensor


class LocalityGuard:
    """Keeps the drift of an editor's model on unrelated prompts below a limit.

    Set ``editor.guard`` to it: after every pass the prompts are run, and a pass that takes the mean drift beyond the
    limit is solved again with a smaller step and a stronger ridge, up to ``back_offs`` times; then editing stops with
    ``DriftLimitReached``. Every pass begins with the configured step and ridge.

    The reference, the unedited model's log-probabilities of the token after each prompt, is taken once, in float16:
    ``2 * vocabulary`` bytes a prompt (0.1 MB for 49,152 tokens), or ``6 * top_k``.

    Args:
        editor: edited already or not; the reference is that of its unedited model.
        prompts: texts that no edit is about, and whose continuation shall stay. Some dozens give a steady mean.
        limit: of the mean drift, in nats, > 0.
        top_k: keep only so many of the largest log-probabilities and the rest as one; the divergence is then a lower
            bound of the whole one. None keeps all.
        back_offs: how often a pass is tried again.
        step_factor, ridge_factor: of step_size and ridge with each back-off; (0, 1) and >= 1.
        progress: show a bar while the reference is computed; None shows it on a terminal.

    Raises:
        ValueError: for a bad argument, or a prompt without tokens or longer than the model's context.
    """

    def __init__(
        self,
        editor: Editor,
        prompts: Sequence[str],
        *,
        limit: float,
        top_k: int | None = None,
        back_offs: int = 3,
        step_factor: float = 0.5,
        ridge_factor: float = 2.0,
        progress: bool | None = None,
    ) -> None:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("prompts must be a list of texts, at least one")
        if not 0.0 < limit < float("inf"):
            raise ValueError(f"limit must be greater than 0, in nats, not {limit!r}")
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise ValueError(f"top_k must be a whole number, at least 1, or None, not {top_k!r}")
        if not isinstance(back_offs, int) or isinstance(back_offs, bool) or back_offs < 0:
            raise ValueError(f"back_offs must be a whole number, at least 0, not {back_offs!r}")
        if not 0.0 < step_factor < 1.0 or not 1.0 <= ridge_factor < float("inf"):
            raise ValueError(
                f"step_factor must be between 0 and 1 and ridge_factor at least 1, not {step_factor!r} and "
                f"{ridge_factor!r}"
            )
        self.limit = float(limit)
        self.top_k = top_k
        self.back_offs = back_offs
        self.step_factor = step_factor
        self.ridge_factor = ridge_factor
        self._model = editor.model
        self._max_tokens = editor.config.max_tokens_per_forward
        self._sequences = _sequences(editor, prompts)
        self._trunk = editor.make_trunk_cache()
        self._reference: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
        self._tokens: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
        bar = tqdm(total=len(prompts), desc="Guard", unit="prompt", disable=None if progress is None else not progress)
        with bar, editor.unedited():
            for indices, likely in self._log_probabilities():
                kept = likely.topk(min(top_k, likely.shape[1])) if top_k else None
                values = (kept.values if kept else likely).half().cpu()
                tokens = kept.indices.int().cpu() if kept else None
                for row, index in enumerate(indices):
                    self._reference[index] = values[row].clone()
                    if tokens is not None:
                        self._tokens[index] = tokens[row].clone()
                bar.update(len(indices))

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def memory_bytes(self) -> int:
        """Of the reference and the prompts' trunk states."""
        kept = sum(t.numel() * t.element_size() for t in (*self._reference, *self._tokens))
        return kept + (self._trunk.bytes if self._trunk is not None else 0)

    def drift(self) -> Drift:
        """Measure the drift of the model as it is now."""
        found = torch.zeros(len(self), dtype=torch.float64)
        for indices, likely in self._log_probabilities():
            reference = torch.stack([self._reference[index] for index in indices]).to(likely)
            if self.top_k:
                tokens = torch.stack([self._tokens[index] for index in indices]).to(likely.device).long()
                likely = _with_rest(likely.gather(1, tokens))
                reference = _with_rest(reference)
            # Rounded to half precision it is no longer a distribution to the last digit, and the divergence could
            # become negative.
            reference = reference.log_softmax(-1)
            terms = reference.exp() * (reference - likely)
            found[indices] = terms.nan_to_num(0.0).sum(-1).double().cpu()
        return Drift(float(found.mean()), float(found.max()), found)

    def _log_probabilities(self):
        """Batch by batch: indices of the prompts and ``[prompts, vocabulary]`` log-probabilities, float32 at least."""
        if self._trunk is not None:
            self._trunk.check()
            groups = self._trunk.split(self._sequences)
        else:
            groups = [list(range(len(self)))]
        device = input_device(self._model)
        for group in groups:
            for batch in pack([self._sequences[index] for index in group], self._max_tokens):
                indices = [group[position] for position in batch]
                chosen = [self._sequences[index] for index in indices]
                with untouched(self._model), torch.inference_mode():
                    logits = answer_logits(self._model, collate(chosen, device), self._trunk, chosen)
                    wide = logits if logits.dtype == torch.float64 else logits.float()
                    likely = wide.log_softmax(-1)
                yield indices, likely


def _sequences(editor: Editor, prompts: Sequence[str]) -> list[TokenSequence]:
    """Each prompt, ready to predict one token after it."""
    limit = context_length(editor.model)
    found = []
    for index, ids in enumerate(prompt_ids(editor.tokenizer, prompts)):
        if not ids:
            raise ValueError(f"prompt {index} ({prompts[index]!r:.60}) has no tokens")
        if limit is not None and len(ids) > limit:
            raise ValueError(f"prompt {index} has {len(ids)} tokens, more than the model's context of {limit}")
        found.append(TokenSequence(tuple(ids), (ids[-1],)))  # which token is asked for does not matter here
    return found


def _with_rest(likely: torch.Tensor) -> torch.Tensor:
    """Log-probabilities and, as one more column, that of everything else."""
    rest = torch.log1p(-likely.exp().sum(-1, keepdim=True).clamp(max=1.0))
    return torch.cat([likely, rest], -1)

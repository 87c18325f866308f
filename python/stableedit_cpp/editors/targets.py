"""What a layer is to give at the last token of a subject, for the model to say the target: the z of MEMIT."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

from stableedit_cpp.errors import ModelBroken
from stableedit_cpp.model.attached import forward_pre_hook
from stableedit_cpp.model.located import hidden_of
from stableedit_cpp.model.logits import answer_logits
from stableedit_cpp.model.prefix import alike
from stableedit_cpp.model.prefixes import Prefixes, pack_behind
from stableedit_cpp.model.tokens import TokenSequence, collate
from stableedit_cpp.model.trunk import TrunkCache, pack_apart
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["LocatedFact", "TargetOptions", "Targets", "find_targets"]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of Adam


@dataclass(frozen=True)
class LocatedFact:
    """One statement, ready to be located.

    Attributes:
        texts: prompt and target, the bare prompt first, then in each context.
        ends: index of the last token of the subject in each of ``texts``.
        about: the subject alone, as ``"{subject} is a"`` begins, up to its last token; its answer plays no part.
    """

    texts: tuple[TokenSequence, ...]
    ends: tuple[int, ...]
    about: TokenSequence


class TargetOptions(Protocol):
    """Of the search; ``LocateConfig`` says what they are."""

    target_steps: int
    target_learning_rate: float
    target_clamp: float
    target_kl: float
    target_decay: float
    target_loss: float


@dataclass(frozen=True)
class Targets:
    """
    Attributes:
        z: what the layer is to give, ``[n, d]`` float32 (float64 for a float64 model). z0: what it gives now.
        losses: at z, in nats; with the terms that hold z back, ``[n]`` float64 on the CPU.
        steps: that each took, ``[n]`` int64 on the CPU.
        losses_before: mean cross-entropy of the target after the bare prompt, before, ``[n]``.
        correct_before: share of the target's tokens that the model said already, ``[n]``.
    """

    z: torch.Tensor
    z0: torch.Tensor
    losses: torch.Tensor
    steps: torch.Tensor
    losses_before: torch.Tensor
    correct_before: torch.Tensor


def find_targets(
    model: nn.Module,
    layer: nn.Module,
    facts: Sequence[LocatedFact],
    options: TargetOptions,
    *,
    names: Sequence[str],
    max_tokens: int,
    trunk: TrunkCache | None = None,
) -> Targets:
    """Search a change delta of what ``layer`` is called with at the last token of the subject, for all facts at once.

    The loss of a fact is (Meng et al. 2023, arXiv 2210.07229, and its released code, ``compute_z``)

        mean over contexts of (cross-entropy of the target / its tokens)
        + target_kl KL(changed || unchanged) of what follows the bare subject + target_decay |delta| / |z0|^2

    and Adam takes at most ``target_steps - 1`` steps from delta = 0, the last loss being only looked at; after each,
    |delta| <= target_clamp |z0|. A fact whose loss is below ``target_loss`` is done and takes part no more. The facts
    do not see each other, so that each gets what a search for it alone would give, up to rounding.

    Args:
        layer: the one above the layer whose output is changed.
        names: what to call each fact in an error message.
        max_tokens: tokens, padding included, in one forward pass.
        trunk: of the layers below ``layer``, which are run once; filled here.

    Raises:
        ModelBroken: if a loss or a gradient is not finite, naming the fact.
    """
    search = _Search(model, layer, facts, options, max_tokens, trunk)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.inference_mode(False))
        search.begin()
        return search.run(names)


class _Search:
    """The sequences of all facts in a row: of each its texts, then the subject alone."""

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        facts: Sequence[LocatedFact],
        options: TargetOptions,
        max_tokens: int,
        trunk: TrunkCache | None,
    ) -> None:
        self.model, self.layer, self.options = model, layer, options
        self.max_tokens, self.trunk = max_tokens, trunk
        self.device = input_device(model)
        self.sequences: list[TokenSequence] = []
        self.ends: list[int] = []
        self.owners: list[int] = []  # fact of each sequence
        self.bare: list[int] = []  # sequence of each fact's bare prompt
        self.subjects: set[int] = set()  # sequences that are a subject alone
        weights: list[float] = []
        for number, fact in enumerate(facts):
            self.bare.append(len(self.sequences))
            self.subjects.add(len(self.sequences) + len(fact.texts))
            self.sequences += [*fact.texts, fact.about]
            self.ends += [*fact.ends, len(fact.about) - 1]
            self.owners += [number] * (len(fact.texts) + 1)
            weights += [1.0 / (len(fact.texts) * len(text.answer)) for text in fact.texts] + [options.target_kl]
        self.weights = torch.tensor(weights, dtype=torch.float64, device="cpu")
        self.unchanged: dict[int, torch.Tensor] = {}  # log-probabilities after the subject alone, by sequence

    def begin(self) -> None:
        """Run everything as it is."""
        if self.trunk is not None:
            self.trunk.check(self.sequences)
        self.z0: torch.Tensor | None = None
        losses = torch.zeros(len(self.bare), dtype=torch.float64, device="cpu")
        correct = torch.zeros_like(losses)
        fact_of = {sequence: number for number, sequence in enumerate(self.bare)}
        kept = Prefixes(self.model, self.trunk.depth) if self.trunk is not None and self.trunk.in_use else None
        for indices in pack_apart(self.sequences, self.max_tokens, self.trunk, device=self.device):
            cache = None if kept is None else kept.fresh()
            with torch.no_grad():
                logits, seen = self._logits(indices, None, past=cache)
            kept = self._keep(kept, cache, indices)
            if self.z0 is None:
                self.z0 = seen.new_empty(len(self.bare), seen.shape[1])
            sizes = [len(self.sequences[index].answer) for index in indices]
            for place, (index, part) in enumerate(zip(indices, logits.split(sizes), strict=True)):
                if index in self.subjects:
                    self.unchanged[index] = part.log_softmax(-1)
                elif index in fact_of:
                    number, labels = fact_of[index], torch.tensor(self.sequences[index].answer, device=part.device)
                    losses[number] = F.cross_entropy(part, labels)
                    correct[number] = (part.argmax(-1) == labels).double().mean()
                    self.z0[number] = seen[place]
        self.losses_before, self.correct_before = losses, correct
        # From a prefix only the upper layers can go on, so the lower ones must be there of all.
        whole = kept is not None and all(sequence in self.trunk for sequence in self.sequences)
        self.prefixes = kept if whole and self._same_from(kept) else None

    def _keep(self, kept: Prefixes | None, cache: DynamicCache | None, indices: Sequence[int]) -> Prefixes | None:
        """What lies before the subjects' ends, which no change there reaches; None where a model keeps it otherwise."""
        width = max(len(self.sequences[index]) for index in indices)
        try:
            for row, index in enumerate(indices if kept is not None else ()):
                kept.keep(index, cache, row, self.ends[index], width)
        except (ValueError, AttributeError, IndexError):
            return None
        return kept

    def _same_from(self, prefixes: Prefixes) -> bool:
        """No model is taken at its word: two sequences run in full and from their prefixes, with the gradient at the
        ends of their subjects."""
        pair = sorted(range(len(self.sequences)), key=lambda index: (self.ends[index], len(self.sequences[index])))[-2:]
        skip = min(self.ends[index] for index in pair)
        found = []
        try:
            for past in (None, prefixes.past(pair, skip)):
                leaf = torch.zeros(len(pair), self.z0.shape[1], dtype=self.z0.dtype, device=self.z0.device)
                leaf.requires_grad_()
                with torch.enable_grad():
                    logits, _ = self._logits(pair, leaf, past=past, skip=0 if past is None else skip)
                    mixture = torch.arange(logits.shape[-1], device=logits.device).cos().to(logits.dtype)
                    (gradient,) = torch.autograd.grad((logits @ mixture).sum(), leaf)
                found.append((logits.detach(), gradient))
            return skip > 0 and all(alike(mine, exact) for exact, mine in zip(*found, strict=True))
        except Exception:  # whatever stands in the way, everything works in full
            return False

    def run(self, names: Sequence[str]) -> Targets:
        options, z0 = self.options, self.z0
        delta = torch.zeros_like(z0)
        first, second = torch.zeros_like(z0), torch.zeros_like(z0)
        norms = z0.norm(dim=1)
        losses = torch.full((len(z0),), torch.inf, dtype=torch.float64, device="cpu")
        steps = torch.zeros(len(z0), dtype=torch.int64, device="cpu")
        active = list(range(len(z0)))
        for number in range(1, options.target_steps + 1):
            last = number == options.target_steps
            found, gradient = self._losses(active, delta, want_gradient=not last)
            length = delta[active].norm(dim=1, keepdim=True)
            found += (options.target_decay * length[:, 0] / norms[active].square()).double().cpu()
            self._check_finite(found, gradient, active, names)
            losses[active] = found
            going = [place for place, loss in enumerate(found.tolist()) if loss >= options.target_loss]
            if last or not going:
                break
            active, gradient, length = [active[place] for place in going], gradient[going], length[going]
            # The norm has no gradient at 0; there it is taken for 0, as autograd has it.
            pull = delta[active] / length.where(length > 0, torch.ones_like(length))
            gradient = gradient + options.target_decay * pull / norms[active, None].square()
            first[active] = _BETAS[0] * first[active] + (1 - _BETAS[0]) * gradient
            second[active] = _BETAS[1] * second[active] + (1 - _BETAS[1]) * gradient.square()
            spread = (second[active] / (1 - _BETAS[1] ** number)).sqrt() + _EPSILON
            moved = delta[active] - options.target_learning_rate / (1 - _BETAS[0] ** number) * first[active] / spread
            most = options.target_clamp * norms[active, None]
            delta[active] = moved * (most / moved.norm(dim=1, keepdim=True).clamp_min(most))
            steps[active] += 1
        return Targets(z0 + delta, z0, losses, steps, self.losses_before, self.correct_before)

    def _losses(
        self, active: Sequence[int], delta: torch.Tensor, *, want_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the facts ``active``: the part of the loss that the model computes, ``[active]`` float64 on the CPU, and
        its gradient ``[active, d]``."""
        place_of = {number: place for place, number in enumerate(active)}
        chosen = [index for index, owner in enumerate(self.owners) if owner in place_of]
        losses = torch.zeros(len(active), dtype=torch.float64, device="cpu")
        gradient = torch.zeros(len(active), delta.shape[1], dtype=delta.dtype, device=delta.device)
        mine = [self.sequences[index] for index in chosen]
        for batch, skip in self._batches(mine, [self.ends[index] for index in chosen]):
            indices = [chosen[place] for place in batch]
            places = torch.tensor([place_of[self.owners[index]] for index in indices], device="cpu")
            leaf = delta[[self.owners[index] for index in indices]].requires_grad_(want_gradient)
            with torch.set_grad_enabled(want_gradient):
                past = self.prefixes.past(indices, skip) if skip else None
                logits, _ = self._logits(indices, leaf, past=past, skip=skip)
                each = self._each(indices, logits)
            weights = self.weights[indices]
            losses.index_add_(0, places, each.detach().double().cpu() * weights)
            if want_gradient:
                # Weighted only here, which keeps small numbers out of a half-precision backward pass.
                (rows,) = torch.autograd.grad(each.sum(), leaf)
                rows = rows * weights.to(rows).unsqueeze(1)
                gradient.index_add_(0, places.to(rows.device), rows)
        return losses, gradient

    def _batches(self, sequences: Sequence[TokenSequence], ends: Sequence[int]) -> list[tuple[list[int], int]]:
        """Indices of each batch, and how many tokens at the head of its sequences are left out."""
        if self.prefixes is not None:
            return pack_behind(sequences, ends, self.max_tokens, self.device)
        return [(batch, 0) for batch in pack_apart(sequences, self.max_tokens, self.trunk, device=self.device)]

    def _each(self, indices: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Of each sequence the sum of cross-entropies, or where it is a subject alone, KL(changed || unchanged)."""
        rows = [(place, token) for place, index in enumerate(indices) for token in self.sequences[index].answer]
        places = torch.tensor([place for place, _ in rows], device=logits.device)
        labels = torch.tensor([token for _, token in rows], device=logits.device)
        values = F.cross_entropy(logits, labels, reduction="none")
        alone = [row for row, (place, _) in enumerate(rows) if indices[place] in self.subjects]
        if alone:  # their one row has no label
            changed = logits[alone].log_softmax(-1)
            unchanged = torch.cat([self.unchanged[indices[rows[row][0]]] for row in alone])
            divergence = (changed.exp() * (changed - unchanged)).sum(-1)
            values = values.index_put((torch.tensor(alone, device=logits.device),), divergence)
        return values.new_zeros(len(indices)).index_add(0, places, values)

    def _logits(
        self, indices: Sequence[int], leaf: torch.Tensor | None, *, past: DynamicCache | None = None, skip: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[answer tokens, vocabulary]`` of sequences, with ``leaf`` ``[sequences, d]`` added at the ends of
        their subjects, and what was there before; float32 at least.

        Args:
            past: what the model keeps of the first ``skip`` tokens of each.
        """
        chosen = [self.sequences[index] for index in indices]
        batch = collate(chosen, self.device, skip=skip)
        seen: list[torch.Tensor] = []

        def change(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            states = hidden_of(args, kwargs)
            rows = torch.arange(len(indices), device=states.device)
            ends = torch.tensor([self.ends[index] - skip for index in indices], device=states.device)
            seen.append(_wide(states[rows, ends]))
            if leaf is None:
                return args, kwargs
            states = states.index_put((rows, ends), leaf.to(states), accumulate=True)
            return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

        with ExitStack() as stack:
            if self.trunk is not None:
                stack.enter_context(self.trunk.attached(chosen, batch))
            stack.enter_context(forward_pre_hook(self.layer, change))  # behind that of the trunk cache
            logits = answer_logits(self.model, batch, past=past)
        return _wide(logits), seen[0].detach()

    @staticmethod
    def _check_finite(
        losses: torch.Tensor, gradient: torch.Tensor, active: Sequence[int], names: Sequence[str]
    ) -> None:
        broken = ~losses.isfinite() | ~gradient.isfinite().all(1).cpu()
        if broken.any():
            name = names[active[int(broken.nonzero()[0])]]
            raise ModelBroken(f"{name}: the loss of its target, or a gradient of it, is NaN or infinite; the turn was "
                              "not applied")  # fmt: skip


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

"""The head with which all prompts of a chat begin: run once a call, and not with each of them.

Under a causal mask nothing that comes later changes what a model makes of the first tokens, so that their keys and
values are those of every sequence, which goes on from there. In the chat form that is half of all tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache

from stableedit_cpp.model.attached import forward_hook
from stableedit_cpp.model.heads import head_of
from stableedit_cpp.model.logits import answer_logits
from stableedit_cpp.model.tokens import Batch, TokenSequence, collate
from stableedit_cpp.model.trunk import TrunkCache
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["SharedPrefix", "alike", "objection", "shared_prefix"]

_FEWEST = 8  # tokens of a prefix; the rounding of a shorter one is not worth what it saves
_PROOF_TOKENS = (8, 3)  # after the prefix, of the two sequences

# Of each model by how many layers a trunk cache skips, 0 without one: why it runs in full, or None where it need not.
_objections: WeakKeyDictionary[nn.Module, dict[int, str | None]] = WeakKeyDictionary()


class _NotFinite(Exception):
    """A model that answers NaN proves nothing."""


class SharedPrefix:
    """Token ids, and what the model as it is now keeps of them: good until its weights change."""

    def __init__(self, ids: tuple[int, ...], kept: DynamicCache) -> None:
        self.ids, self._kept = ids, kept

    def __len__(self) -> int:
        return len(self.ids)

    def past(self, batch: Batch) -> DynamicCache:
        """What all sequences of a batch go on from: for one forward pass, which adds to it."""
        past = copy.deepcopy(self._kept)
        past.batch_repeat_interleave(len(batch.input_ids))
        return past


def shared_prefix(
    model: nn.Module, sequences: Sequence[TokenSequence], trunk: TrunkCache | None = None
) -> SharedPrefix | None:
    """Run the model's chat head (``learn_head``), if all sequences begin with it: a single one, too, which costs a
    little, but gives the same bits as in the company of others.

    No model is taken at its word: before the first use a small batch runs in full and from its prefix, and where
    logits or gradients differ by more than rounding, or an error is raised, everything of this model runs in full.

    Args:
        trunk: skips the layers below the first edited module, as for ``answer_logits``; it has been checked.

    Returns:
        None where the sequences are to be run in full.
    """
    # The last token of a prompt predicts the answer.
    length = len(head_of(model, [sequence.ids[: sequence.first + 1] for sequence in sequences])) if sequences else 0
    if length < _FEWEST:
        return None
    if trunk is not None and not trunk.in_use:
        trunk = None
    with untouched(model), torch.inference_mode(False):
        for known in [None] if trunk is None else [None, trunk]:
            if not _proven(model, sequences, length, known):
                return None
        return _run(model, sequences, length, trunk)


def objection(model: nn.Module, trunk: TrunkCache | None = None) -> str | None:
    """Why this model, or this model with such a trunk cache, runs in full; None where nothing is known against it."""
    known = _objections.get(model, {})
    return known.get(0) or (None if trunk is None else known.get(trunk.depth))


def _run(model: nn.Module, sequences: Sequence[TokenSequence], length: int, trunk: TrunkCache | None) -> SharedPrefix:
    prefix = TokenSequence(sequences[0].ids[:length], ())
    batch = collate([prefix], input_device(model))
    # Sequences that the trunk cache does not hold need the prefix in the layers below, too.
    if trunk is not None and prefix in trunk and not all(sequence in trunk for sequence in sequences):
        trunk = None
    kept = DynamicCache(config=model.config)
    with torch.no_grad():
        answer_logits(model, batch, trunk, [prefix], kept)
    # Masks and positions are made for the length of the first layer, which may have been skipped.
    full = next(layer.keys for layer in kept.layers if layer.get_seq_length() > 0)
    for index, layer in enumerate(kept.layers):
        if layer.get_seq_length() == 0:
            nothing = full.new_zeros(*full.shape[:-2], length, full.shape[-1])
            kept.update(nothing, nothing, index)
    return SharedPrefix(prefix.ids, kept)


def _proven(model: nn.Module, sequences: Sequence[TokenSequence], length: int, trunk: TrunkCache | None) -> bool:
    known, depth = _objections.setdefault(model, {}), 0 if trunk is None else trunk.depth
    if depth not in known:
        try:
            known[depth] = _difference(model, sequences, length, trunk)
        except _NotFinite:
            return False  # it may be whole again next time
        except Exception as error:  # whatever stands in the way, everything works in full
            known[depth] = f"{type(error).__name__}: {error}"
    return known[depth] is None


def _difference(
    model: nn.Module, sequences: Sequence[TokenSequence], length: int, trunk: TrunkCache | None
) -> str | None:
    """Run two short sequences in full and from their prefix; says what differs.

    Without a trunk cache logits and, for those who differentiate, gradients at all tokens after the prefix; with one,
    logits where it holds nothing, the prefix or all, filled by either kind of run.
    """
    ids = sequences[0].ids
    ends = [(ids[length:] + ids)[:size] for size in _PROOF_TOKENS]
    pair = [TokenSequence(ids[:length] + end, end) for end in ends]
    device = input_device(model)
    full, rest = collate(pair, device), collate(pair, device, skip=length)
    if trunk is None:
        exact = _logits_and_gradient(model, full, None)
        found = _logits_and_gradient(model, rest, _run(model, pair, length, None).past(rest))
        return _apart(found[0], exact[0], "logits") or _apart(found[1], exact[1][:, length:], "gradients")
    empty, filled = trunk.emptied(), trunk.emptied()
    with torch.no_grad():
        exact = answer_logits(model, full, filled, pair)
        for cache in (empty, empty, filled, filled):
            logits = answer_logits(model, rest, cache, pair, _run(model, pair, length, cache).past(rest))
            different = _apart(logits, exact, "logits with a trunk cache")
            if different:
                return different
    return None


def _logits_and_gradient(
    model: nn.Module, batch: Batch, past: DynamicCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, vocabulary]``, and the gradient of a mixture of them at the embeddings, ``[sequences, length, d]``."""
    embeddings: list[torch.Tensor] = []

    def leaf(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    with torch.enable_grad(), forward_hook(model.get_input_embeddings(), leaf):
        logits = answer_logits(model, batch, past=past)
        mixture = torch.arange(logits.shape[-1], device=logits.device).cos().to(logits.dtype)
        (gradient,) = torch.autograd.grad((logits @ mixture).sum(), embeddings)
    return logits.detach(), gradient


def _apart(mine: torch.Tensor, exact: torch.Tensor, what: str) -> str | None:
    if not exact.isfinite().all():
        raise _NotFinite
    return None if alike(mine, exact) else f"from the prefix on the {what} are others"


def alike(mine: torch.Tensor, exact: torch.Tensor) -> bool:
    """Half of the digits are the same: rounding takes a few of them, a wrong position or mask leaves none."""
    # Models compute in part in float32 whatever their dtype.
    limit = max(torch.finfo(exact.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    return bool((mine - exact).norm() <= limit * exact.norm())

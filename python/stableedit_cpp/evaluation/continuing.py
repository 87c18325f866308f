"""Calls of ``model.generate`` over prompts of several lengths, which may go on from the head of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from stableedit_cpp.model.logits import past_keyword
from stableedit_cpp.model.prefix import SharedPrefix, alike, shared_prefix
from stableedit_cpp.model.tokens import TokenSequence, collate
from stableedit_cpp.model.untouched import input_device

__all__ = ["continued", "generation_prefix"]

_PROOF_STEPS = 3

# Whether a model writes the same from a head that padding follows as in full.
_proven: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def continued(model: nn.Module, prompts: Sequence[TokenSequence], prefix: SharedPrefix | None, **how: object):
    """What ``model.generate`` gives for prompts without an answer, and the width of its input.

    Prompts are padded on the left, so that every one ends where its continuation begins; behind the head, where all go
    on from that.
    """
    batch = collate(prompts, input_device(model), padding_side="left", skip=len(prefix or ()))
    ids, how = batch.input_ids, {"attention_mask": batch.attention_mask, **how}
    if prefix is not None:
        head = torch.tensor([prefix.ids], dtype=ids.dtype, device=ids.device)
        ids, how[past_keyword(model)] = torch.cat([head.expand(len(ids), -1), ids], 1), prefix.past(batch)
    return model.generate(input_ids=ids, **how), ids.shape[1]


def generation_prefix(model: nn.Module, prompts: Sequence[TokenSequence], room: int) -> SharedPrefix | None:
    """The head that all prompts can go on from, with at most ``room`` tokens after each; None where they are to be run
    in full: where a model minds the padding behind the head because it counts positions for itself (MPT), or where a
    window of its attention, which counts padding, too, may end."""
    window, longest = _window(model), max(map(len, prompts), default=0) + room
    prefix = shared_prefix(model, prompts) if window is None or longest <= window else None
    if prefix is not None and model not in _proven:
        _proven[model] = _same(model, prompts[0].ids, prefix)
    return prefix if prefix is not None and _proven[model] else None


def _window(model: nn.Module) -> int | None:
    config = model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if size), default=None)


def _same(model: nn.Module, ids: tuple[int, ...], prefix: SharedPrefix) -> bool:
    pair = [TokenSequence((prefix.ids + ids[len(prefix) :] + ids)[: len(prefix) + size], ()) for size in (3, 8)]
    how = {"max_new_tokens": _PROOF_STEPS, "return_dict_in_generate": True, "output_logits": True}
    try:
        exact, found = (torch.stack(continued(model, pair, start, **how)[0].logits) for start in (None, prefix))
        return alike(found, exact)
    except Exception:  # whatever stands in the way, everything works in full
        return False

"""One forward pass of a model, read only where it predicts answer tokens."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from stableedit_cpp.model.attached import forward_pre_hook
from stableedit_cpp.model.tokens import Batch, TokenSequence
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["answer_logits", "past_keyword"]


def answer_logits(
    model: nn.Module,
    batch: Batch,
    trunk: TrunkCache | None = None,
    sequences: Sequence[TokenSequence] = (),
    past: object | None = None,
) -> torch.Tensor:
    """Logits that predict the answer tokens of a batch, ``[n, vocabulary]``.

    The output embedding, a large share of a small model's work, sees only these positions.

    Args:
        trunk: skips the layers below the first edited module where it has kept their output for ``sequences``, those
            of the batch, and keeps it where it has not;
            ``trunk.check(sequences)`` comes first.
        past: keys and values of the ``batch.skipped`` tokens that come before those of the batch
            (``SharedPrefix.past``).
    """
    head = model.get_output_embeddings()

    def select(_head: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (_rows(args[0], batch).unsqueeze(0), *args[1:]), kwargs

    how = {"use_cache": False} if past is None else {"use_cache": True, past_keyword(model): past}
    with ExitStack() as stack:
        if head is not None:
            stack.enter_context(forward_pre_hook(head, select))
        if trunk is not None:
            stack.enter_context(trunk.attached(sequences, batch))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **how).logits
    return logits.reshape(-1, logits.shape[-1]) if head is not None else _rows(logits, batch)


def past_keyword(model: nn.Module) -> str:
    """What its ``forward`` and ``generate`` call the keys and values of earlier tokens.

    transformers has renamed them in 5.24; a model with code of its own may know either name with any version.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _rows(tensor: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Rows of ``[batch, length, d]`` at answer positions, wherever the layer runs that made it."""
    return tensor.reshape(-1, tensor.shape[-1])[batch.positions.to(tensor.device)]

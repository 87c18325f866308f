"""What every prompt of a chat begins with: the template's own tokens, a system message among them.

They are known of a model and not found in the prompts that happen to run together, so that a prompt is computed in the
same way in whatever company: what is edited again comes to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["head_of", "learn_head"]

_heads: WeakKeyDictionary[nn.Module, set[tuple[int, ...]]] = WeakKeyDictionary()


def learn_head(model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
    """Remember what these prompts, which have nothing but their template in common, begin with."""
    common = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    _heads.setdefault(model, set()).add(tuple(tokens[0] for tokens in common))


def head_of(model: nn.Module, prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest of the model's heads with which all of these begin, and none ends; empty where there is none."""
    for head in sorted(_heads.get(model, ()), key=lambda head: (-len(head), head)):
        if all(len(prompt) > len(head) and prompt[: len(head)] == head for prompt in prompts):
            return head
    return ()

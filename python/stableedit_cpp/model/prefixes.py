"""What the upper layers of a model keep of the first tokens of sequences, each its own: for those who run the rest of
them again and again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import DynamicCache

from stableedit_cpp.model.tokens import TokenSequence, fixed_cost

__all__ = ["Prefixes", "pack_behind"]


class Prefixes:
    """Keys and values of attention, by sequence: under a causal mask nothing that comes later changes them.

    Args:
        depth: layers below it are skipped where the prefixes are of use, and need nothing.
        max_bytes: of what is kept, on the model's devices.
    """

    def __init__(self, model: nn.Module, depth: int, *, max_bytes: int = 4 * 2**30) -> None:
        self._config, self._depth, self._room = model.config, depth, max_bytes
        self._kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def fresh(self) -> DynamicCache:
        """For a forward pass in full, which fills it."""
        return DynamicCache(config=self._config)

    def keep(self, index: int, cache: DynamicCache, row: int, size: int, width: int) -> None:
        """Of sequence ``index``, run as a row of a batch of ``width`` tokens, the first ``size``.

        Raises:
            ValueError: for layers that do not keep all of their tokens, as those with a window of attention, or if
                there is no room.
        """
        layers = []
        for layer in cache.layers[self._depth :]:
            if layer.keys is None or layer.keys.ndim != 4 or layer.keys.shape[2] != width:
                raise ValueError("not every layer keeps keys and values of all tokens")
            layers.append((layer.keys[row, :, :size].clone(), layer.values[row, :, :size].clone()))
            self._room -= sum(tensor.numel() * tensor.element_size() for tensor in layers[-1])
        if self._room < 0:
            raise ValueError("there is no room for the prefixes of so many sequences")
        self._kept[index] = layers

    def past(self, indices: Sequence[int], size: int) -> DynamicCache:
        """What these sequences go on from behind their first ``size`` tokens, for one forward pass, which adds to
        it."""
        past = self.fresh()
        kept = [self._kept[index] for index in indices]
        for number in range(len(kept[0])):
            keys = torch.stack([layers[number][0][:, :size] for layers in kept])
            values = torch.stack([layers[number][1][:, :size] for layers in kept])
            if number == 0:  # masks and positions are made for the length of the first layer of all
                for below in range(self._depth):
                    past.update(torch.zeros_like(keys[:1, :1]), torch.zeros_like(values[:1, :1]), below)
            past.update(keys, values, number + self._depth)
        return past


def pack_behind(
    sequences: Sequence[TokenSequence], skips: Sequence[int], max_tokens: int, device: torch.device
) -> list[tuple[list[int], int]]:
    """Batches of indices, and how many tokens at the head of each sequence of a batch are left out: no more than
    ``skips`` of any. Sequences are taken in the order of that, and cut so that padding and the fixed cost of a forward
    pass are smallest together."""
    order = sorted(range(len(sequences)), key=lambda index: (-skips[index], -len(sequences[index])))
    fixed = fixed_cost(max_tokens, device)
    cost, start = [0] + [0] * len(order), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        longest, skip = 0, skips[order[end - 1]]  # in this order the last of a batch has the fewest
        for begin in range(end - 1, -1, -1):
            index = order[begin]
            longest = max(longest, len(sequences[index]))
            size = (longest - skip) * (end - begin)
            if size > max_tokens and begin < end - 1:
                break
            if begin == end - 1 or cost[begin] + size + fixed < cost[end]:
                cost[end], start[end] = cost[begin] + size + fixed, begin
    batches: list[tuple[list[int], int]] = []
    end = len(order)
    while end > 0:
        batches.append((order[start[end] : end], skips[order[end - 1]]))
        end = start[end]
    return batches[::-1]

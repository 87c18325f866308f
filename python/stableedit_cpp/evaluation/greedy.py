"""Greedy answers of many prompts at once, as token ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stableedit_cpp.model.running import batches
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["greedy_answers"]


def greedy_answers(
    model: torch.nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    trunk: TrunkCache | None = None,
) -> list[tuple[int, ...]]:
    """What the model answers freely to each prompt, as many tokens as the sequence's answer has.

    Args:
        sequences: prompts with some answer; its tokens do not matter, only how many they are.
        max_tokens: tokens, padding included, in one forward pass.
        trunk: keeps and reuses the output of the layers that no edit changes.

    Returns:
        The most likely token after the prompt, then the most likely after that, and so on. An end-of-sequence token is
        a token like any other.
    """
    prompts = [sequence.ids[: len(sequence.ids) - len(sequence.answer) + 1] for sequence in sequences]
    answers: list[tuple[int, ...]] = [()] * len(sequences)
    for length in range(max((len(sequence.answer) for sequence in sequences), default=0)):
        growing = [index for index, sequence in enumerate(sequences) if len(sequence.answer) > length]
        asked = [TokenSequence(prompts[index] + answers[index], (0,)) for index in growing]
        for index, token in zip(growing, _next_tokens(model, asked, max_tokens, trunk), strict=True):
            answers[index] += (token,)
    return answers


def _next_tokens(
    model: torch.nn.Module, sequences: Sequence[TokenSequence], max_tokens: int, trunk: TrunkCache | None
) -> list[int]:
    tokens = [0] * len(sequences)
    for batch in batches(model, sequences, max_tokens=max_tokens, trunk=trunk):
        for index, token in zip(batch.indices, batch.logits.argmax(-1).tolist(), strict=True):
            tokens[index] = token
    return tokens

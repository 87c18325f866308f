"""Models whose answers are known beforehand."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn


class Successor(nn.Module):
    """A language model that answers each character with the next one of the alphabet."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.eye(vocabulary))
        self.head = nn.Linear(vocabulary, vocabulary, bias=False)
        self.head.weight.data = torch.eye(vocabulary).roll(1, 0)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=32))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))


def readable(model: nn.Module, tokenizer) -> nn.Module:
    """Let a random model choose only printable characters, so that its choices can be written into a target."""
    vocabulary = tokenizer.get_vocab()
    chosen = [vocabulary[letter] for letter in map(chr, range(ord("!"), ord("~") + 1))]
    head = model.get_output_embeddings()
    with torch.no_grad():
        keep = torch.zeros(head.weight.shape[0], 1, dtype=head.weight.dtype)
        keep[chosen] = 1
        head.weight.mul_(keep)
        if head.bias is not None:
            head.bias.copy_(torch.where(keep[:, 0] > 0, head.bias, -100.0))
    return model

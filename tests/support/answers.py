"""Models whose answers are known beforehand."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from stableedit_cpp.editors import turn as turns
from stableedit_cpp.evaluation.answers import AnswerScores


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


def follower(tokenizer, chain: str) -> nn.Module:
    """A model of transformers that writes each letter of a chain after the one before it, and then ends its text."""
    ids = [*tokenizer(chain, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert len(set(ids)) == len(ids), "a letter that comes twice has two successors"
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        layer = model.model.layers[0]
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        model.lm_head.weight[ids[1:], ids[:-1]] = 1.0
    return model


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


def none_takes(monkeypatch) -> None:
    """Let no request take, however often a turn is solved, though each pass seems to bring it nearer."""
    looks = itertools.count()

    def scores(_model, sequences, **_how) -> AnswerScores:
        likely = 1.0 - 1.0 / (2.0 + next(looks))
        return AnswerScores(torch.zeros(len(sequences)), torch.full((len(sequences),), likely, dtype=torch.float64))

    monkeypatch.setattr(turns, "answer_scores", scores)

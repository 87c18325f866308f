"""Chats that begin with the same tokens on tiny models that know so, and what comes out of them without that."""

from __future__ import annotations

import torch

import stableedit_cpp as se
from stableedit_cpp.model.capture import CapturedTurn, capture
from stableedit_cpp.model.heads import learn_head
from stableedit_cpp.model.running import batches
from stableedit_cpp.model.tokens import TokenSequence
from support import tiny
from support.captures import MICRO_BATCH
from support.tiny import VOCABULARY, pattern_of

HEAD = tuple(range(40, 52))  # shared by all
MAX_TOKENS = 60  # three forward passes of what comes after it


def chatting(model):
    """The model, of which the head is known."""
    learn_head(model, [(*HEAD, 3), (*HEAD, 4, 5)])
    return model


def tiny_model(*args):
    return chatting(tiny.tiny_model(*args))


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def chats(head: tuple[int, ...] = HEAD) -> list[TokenSequence]:
    """Eleven prompts of 1 to 5 tokens after the head, with answers of 1 to 3."""
    answers = [tokens(1 + seed % 3, 100 + seed) for seed in range(11)]
    return [TokenSequence(head + tokens(1 + seed % 5, seed) + a[:-1], a) for seed, a in enumerate(answers)]


def modules_of(model, architecture: str):
    """All but the first layer's MLP output: the first layer is the trunk."""
    return se.find_modules(model, pattern_of(architecture))[1:]


def captured(model, modules, sequences, **how) -> CapturedTurn:
    return capture(model, modules, sequences, micro_batch=MICRO_BATCH, max_tokens=MAX_TOKENS, **how)


def logits_of(model, sequences, **how) -> torch.Tensor:
    """``[n, vocabulary]``, sequence by sequence."""
    found = [torch.empty(0)] * len(sequences)
    for batch in batches(model, sequences, max_tokens=MAX_TOKENS, **how):
        for index, part in zip(batch.indices, batch.logits.split(batch.sizes), strict=True):
            found[index] = part
    return torch.cat(found)


def plain_logits(model, sequences) -> torch.Tensor:
    """The same of each sequence alone, from the model as anybody would call it."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([s.ids])).logits[0, s.first :] for s in sequences])


def assert_close(mine: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert mine.shape == exact.shape
    assert ((mine - exact).norm() <= tolerance * exact.norm()).item()


class Watch:
    """How many tokens, padding included, the last layer of a tiny Llama has seen in each forward pass."""

    def __init__(self, model) -> None:
        self.seen: list[int] = []
        model.model.layers[-1].mlp.register_forward_hook(lambda _m, args, _o: self.seen.append(args[0][..., 0].numel()))

"""What a hypernetwork is trained on: the tokens of a stream, turn by turn, and the prompts of a turn's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.hypernetwork.config import HypernetworkConfig
from stableedit_cpp.editors.hypernetwork.losses import micro_batch_weights
from stableedit_cpp.editors.stream import names_of, turns_of
from stableedit_cpp.model.tokens import TokenSequence, context_length, tokenize

__all__ = ["LossPrompts", "TrainingTurn", "loss_prompts", "training_turns"]


class TrainingTurn(NamedTuple):
    """Tokens of a turn of the training stream.

    Attributes:
        edits: what is edited. names: what to call each of these in a message.
        rephrases: what the edits shall generalise to, one of each request. unrelated: what they shall leave alone,
            likewise, or none.
    """

    edits: list[TokenSequence]
    names: list[str]
    rephrases: list[TokenSequence]
    unrelated: list[TokenSequence]


class LossPrompts(NamedTuple):
    """Prompts of the loss of a turn, its own before those of earlier ones.

    Attributes:
        rephrases, unrelated: see ``TrainingTurn``.
        of_rephrases, of_unrelated: what an answer token of each weighs in the loss.
    """

    rephrases: list[TokenSequence]
    of_rephrases: list[float]
    unrelated: list[TokenSequence]
    of_unrelated: list[float]


def training_turns(editor: Editor, requests: Sequence[EditRequest], locality: bool) -> list[TrainingTurn]:
    """
    Args:
        locality: whether unrelated prompts are needed.

    Raises:
        ValueError: for a request without what training needs, naming it; or where there is none.
    """
    needed = {"rephrase": "the question in other words"}
    if locality:
        needed |= dict.fromkeys(("locality_prompt", "locality_target"), "an unrelated prompt and its answer")
    for index, request in enumerate(requests):
        for name, what in needed.items():
            if getattr(request, name) is None:
                called = f"request {index}" + (f" ({request.id})" if request.id else "")
                raise ValueError(f"{called} has no {name}, {what}, which training a hypernetwork needs")
    if not requests:
        raise ValueError("there is nothing to train on: requests is empty")

    def tokens(kind: str, pairs: list[tuple[str, str]]) -> list[TokenSequence]:
        names = [f"{kind} of request {index}" for index in range(len(pairs))]
        return tokenize(editor.tokenizer, pairs, context_length(editor.model), names, editor.form)

    rephrases = tokens("rephrase", [(request.rephrase, request.target) for request in requests])
    unrelated = [(request.locality_prompt, request.locality_target) for request in requests] if locality else []
    unrelated = tokens("locality_prompt", unrelated)
    return [
        TrainingTurn(editor.tokenize(requests[part]), names_of(requests[part]), rephrases[part], unrelated[part])
        for part in turns_of(requests, editor.config.turn_size)
    ]


def loss_prompts(past: Sequence[TrainingTurn], config: HypernetworkConfig, seed: int) -> LossPrompts:
    """All of the present turn, and of earlier ones as many requests as ``past_sample`` says, drawn evenly by ``seed``
    and weighted up, so that the loss is that of all of them in the mean over draws.

    Args:
        past: the turns of the horizon, the present one first.
    """
    own, count = len(past[0].rephrases), sum(len(turn.rephrases) for turn in past)
    chosen, factor = list(range(count)), 1.0
    if config.past_sample is not None and count - own > config.past_sample:
        draw = torch.randperm(count - own, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        chosen[own:] = [own + index for index in sorted(draw[: config.past_sample].tolist())]
        factor = (count - own) / config.past_sample
    found: list[list] = []
    for parts, share in (
        ([turn.rephrases for turn in past], 1.0),
        ([turn.unrelated for turn in past], config.locality_weight),
    ):
        sequences = [sequence for part in parts for sequence in part]
        weights = [
            share * config.discount**age * (factor if age else 1.0) * weight
            for age, part in enumerate(parts)
            for weight in micro_batch_weights(part, config.micro_batch)
        ]
        kept = chosen if sequences else []
        found += [[sequences[index] for index in kept], [weights[index] for index in kept]]
    return LossPrompts(*found)

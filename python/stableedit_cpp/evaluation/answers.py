"""What a model makes of expected answers, and what it answers itself: every score of an answer starts here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from stableedit_cpp.errors import ModelBroken
from stableedit_cpp.files.offloaded import present
from stableedit_cpp.model.running import AnswerBatch, read_batches
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.model.trunk import TrunkCache

__all__ = [
    "AnswerScores",
    "ReadAnswer",
    "accuracy_of",
    "answer_scores",
    "greedy_answers",
    "no_distribution",
    "read_answers",
    "refuse_broken",
    "token_accuracy",
]


class ReadAnswer(NamedTuple):
    """One answer, teacher-forced: at each of its tokens the model has read the prompt and the answer so far.

    Attributes:
        top: the model's top choice, ``[answer tokens]`` int64 on the CPU.
        log_probability: of the answer's own token, natural logarithm, ``[answer tokens]`` float64 on the CPU. -inf
            where the model rules it out, NaN where the model is broken: its logits are NaN or positive infinity.
    """

    top: torch.Tensor
    log_probability: torch.Tensor

    @property
    def broken(self) -> bool:
        return bool(self.log_probability.isnan().any())


class AnswerScores(NamedTuple):
    """Of each sequence, ``[sequences]`` float64 on the CPU; NaN where the model is broken.

    Attributes:
        accuracy: share of its answer tokens that are the model's top choice.
        probability: that the model gives to the least likely of its answer tokens, in [0, 1].
    """

    accuracy: torch.Tensor
    probability: torch.Tensor


def read_answers(
    model: torch.nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    most: int | None = None,
    trunk: TrunkCache | None = None,
    on_done: Callable[[int], object] | None = None,
) -> list[ReadAnswer]:
    """Run the model over prompts with their answers.

    Sequences that feed the same tokens, as the choices of one token each after one question do, share a forward pass.

    Args:
        max_tokens: tokens, padding included, in one forward pass. most: sequences that share one.
        trunk: keeps and reuses the output of the layers that no edit changes.
        on_done: called with the number of sequences after each forward pass.

    Raises:
        ValueError: for a trunk cache whose layers have changed.
    """
    sharing: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, sequence in enumerate(sequences):
        sharing.setdefault((sequence.ids, len(sequence.answer)), []).append(index)
    groups = list(sharing.values())
    different = [sequences[group[0]] for group in groups]
    found: list[ReadAnswer | None] = [None] * len(sequences)

    def read(batch: AnswerBatch) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        logits = batch.logits.to(torch.promote_types(batch.logits.dtype, torch.float32))
        members, rows, begin = [], [], 0
        for index, size in zip(batch.indices, batch.sizes, strict=True):
            members += groups[index]
            rows += list(range(begin, begin + size)) * len(groups[index])
            begin += size
        place = torch.tensor(rows, dtype=torch.long, device=logits.device)
        token = torch.tensor([t for m in members for t in sequences[m].answer], dtype=torch.long, device=logits.device)
        normalizer = logits.logsumexp(-1).double()
        normalizer[~normalizer.isfinite()] = torch.nan  # as no_distribution has it
        likely = (logits[place, token].double() - normalizer[place]).cpu()
        return members, logits.argmax(-1)[place].cpu(), likely

    def done(indices: Sequence[int]) -> None:
        if on_done is not None:
            on_done(sum(len(groups[index]) for index in indices))

    how = {"max_tokens": max_tokens, "most": most, "trunk": trunk, "on_done": done}
    # Cut up only now: thousands of little tensors among those of the passes would leave free memory in pieces.
    for _, (members, *both) in read_batches(model, different, read, **how):
        sizes = [len(sequences[member].answer) for member in members]
        for member, *parts in zip(members, *(tensor.split(sizes) for tensor in both), strict=True):
            found[member] = ReadAnswer(*parts)
    return found


def answer_scores(
    model: torch.nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    most: int | None = None,
    trunk: TrunkCache | None = None,
    on_done: Callable[[int], object] | None = None,
) -> AnswerScores:
    """Accuracy and probability of each sequence's answer. Arguments as ``read_answers``."""
    read = read_answers(model, sequences, max_tokens=max_tokens, most=most, trunk=trunk, on_done=on_done)
    probability = torch.full((len(sequences),), torch.nan, dtype=torch.float64, device="cpu")
    for index, answer in enumerate(read):
        if not answer.broken:
            probability[index] = answer.log_probability.min().exp()
    return AnswerScores(accuracy_of(sequences, read), probability)


def accuracy_of(sequences: Sequence[TokenSequence], read: Sequence[ReadAnswer]) -> torch.Tensor:
    """The accuracy of ``answer_scores``, ``[sequences]``, of answers that are read already."""
    accuracy = torch.full((len(sequences),), torch.nan, dtype=torch.float64, device="cpu")
    for index, (sequence, answer) in enumerate(zip(sequences, read, strict=True)):
        if not answer.broken:
            pairs = zip(sequence.answer, answer.top.tolist(), strict=True)
            accuracy[index] = sum(own == top for own, top in pairs) / len(sequence.answer)
    return accuracy


def token_accuracy(
    model: torch.nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    most: int | None = None,
    trunk: TrunkCache | None = None,
) -> torch.Tensor:
    """The accuracy of ``answer_scores`` alone, ``[sequences]``."""
    return answer_scores(model, sequences, max_tokens=max_tokens, most=most, trunk=trunk).accuracy


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
        max_tokens, trunk: as ``read_answers``.

    Returns:
        The most likely token after the prompt, then the most likely after that, and so on. An end-of-sequence token is
        a token like any other.

    Raises:
        ModelBroken: if the model answers NaN.
    """
    prompts = [sequence.ids[: sequence.first + 1] for sequence in sequences]
    answers: list[tuple[int, ...]] = [()] * len(sequences)
    for length in range(max((len(sequence.answer) for sequence in sequences), default=0)):
        growing = [index for index, sequence in enumerate(sequences) if len(sequence.answer) > length]
        asked = [TokenSequence(prompts[index] + answers[index], (0,)) for index in growing]
        read = read_answers(model, asked, max_tokens=max_tokens, trunk=trunk)
        broken = [f"prompt {index}" for index, answer in zip(growing, read, strict=True) if answer.broken]
        refuse_broken(model, broken, len(sequences))
        for index, answer in zip(growing, read, strict=True):
            answers[index] += (int(answer.top),)
    return answers


def no_distribution(logits: torch.Tensor) -> torch.Tensor:
    """Where logits ``[..., vocabulary]`` hold NaN or positive infinity, or rule everything out: ``[...]`` bool."""
    return ~logits.logsumexp(-1).isfinite()


def refuse_broken(model: torch.nn.Module, broken: Sequence[str], count: int, what: str = "the model") -> None:
    """What every score does about a model that answers NaN: say so, instead of a number.

    Args:
        broken: names of the prompts to which it does. count: how many prompts there were. what: which model it is.

    Raises:
        ModelBroken: if there are any, with the weights that are to blame.
    """
    if not broken:
        return
    weights = [name for name, weight in model.named_parameters() if not _finite(present(model, name, weight))]
    if weights:
        more = f" and {len(weights) - 1} other weights" if len(weights) > 1 else ""
        cause = f"NaN or infinity is in {weights[0]}{more}; load the model anew"
    else:
        cause = "its weights are finite, so its activations overflow; try a wider dtype, or the model as it was before"
    raise ModelBroken(
        f"{what} is broken: its logits are NaN or infinite for {len(broken)} of {count} prompts, first for "
        f"{broken[0]}; {cause}"
    )


def _finite(weight: torch.Tensor) -> bool:
    """What is nowhere cannot be looked at, and weights of a few bits hold no NaN."""
    if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
        return True
    return bool(weight.isfinite().all())

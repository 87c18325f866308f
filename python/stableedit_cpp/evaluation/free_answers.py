"""Free answers: what a model says when no answer is given to it, and whether that is the answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence

import torch

from stableedit_cpp.evaluation.answers import ReadAnswer, read_answers
from stableedit_cpp.evaluation.generation import Continuation, Written, as_text, write_greedily
from stableedit_cpp.model.form import stop_tokens
from stableedit_cpp.model.tokens import TokenSequence, context_length
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["free_answers", "is_answer", "judge"]

_ROOM = 8  # tokens that a free answer may take beyond those of the expected one


def free_answers(
    model: torch.nn.Module,
    tokenizer,
    sequences: Sequence[TokenSequence],
    read: Sequence[ReadAnswer],
    *,
    end: int | None = None,
    max_tokens: int,
    trunk: TrunkCache | None = None,
    on_done: Callable[[int], object] | None = None,
) -> list[Continuation]:
    """Greedy answers to prompts, up to 8 tokens longer than those that are expected, or as long as the context allows.

    The model's top choices along an expected answer are its greedy answer up to the first that is another token. Where
    it ends by then, or right after the expected answer, which one more look tells, nothing has to be generated.

    Args:
        sequences: prompts with expected answers. read: of ``read_answers`` of these.
        end: a token that ends a text beside those at which the model's generation stops.
        max_tokens: tokens, padding included, in one forward pass.
        trunk: saves that look the layers that no edit changes.
        on_done: called with the number of prompts after each batch.

    Raises:
        ValueError: for a trunk cache whose layers have changed.
    """
    ends = {*stop_tokens(model, tokenizer), end} - {None}
    limit = context_length(model)
    prompts = [TokenSequence(sequence.ids[: sequence.first + 1], ()) for sequence in sequences]
    room = [len(sequence.answer) + _ROOM for sequence in sequences]
    if limit is not None:
        room = [min(new, limit - len(prompt) + 1) for new, prompt in zip(room, prompts, strict=True)]
    found: list[Written | None] = [None] * len(sequences)
    asked = []
    for index, (sequence, answer) in enumerate(zip(sequences, read, strict=True)):
        said = () if answer.broken else _up_to_another(answer.top.tolist(), sequence.answer, ends)
        if said and said[-1] in ends:
            found[index] = Written(said, ended=True, broken=False)
        elif said == sequence.answer and ends and room[index] > len(said):
            asked.append(index)
    looks = [TokenSequence((*sequences[i].ids, sequences[i].answer[-1]), (min(ends),)) for i in asked]
    for index, look in zip(asked, read_answers(model, looks, max_tokens=max_tokens, trunk=trunk), strict=True):
        if int(look.top) in ends and not look.broken:
            found[index] = Written((*sequences[index].answer, int(look.top)), ended=True, broken=False)
    rest = [index for index, written in enumerate(found) if written is None]
    if on_done is not None:
        on_done(len(found) - len(rest))
    how = {"end": end, "max_tokens": max_tokens, "on_done": on_done}
    written = write_greedily(model, tokenizer, [prompts[i] for i in rest], [room[i] for i in rest], **how)
    for index, one in zip(rest, written, strict=True):
        found[index] = one
    return [as_text(tokenizer, one) for one in found]


def _up_to_another(choices: Sequence[int], answer: Sequence[int], ends: Collection[int]) -> tuple[int, ...]:
    """The choices up to the first that is not the answer's token, or that ends the text."""
    for place, (choice, token) in enumerate(zip(choices, answer, strict=True)):
        if choice != token or choice in ends:
            return tuple(choices[: place + 1])
    return tuple(choices)


def is_answer(continuation: Continuation, answer: str) -> bool:
    """Whether a continuation is the answer and nothing else: the model says it and stops.

    Letter case, spacing, how letters are composed, and a full stop at the end make no other answer: they depend on
    where in a sentence an answer stands. Any other word or mark does. The model stops if it ends its text, or writes
    nothing but white space as far as it was let.
    """
    stops = continuation.ended or continuation.text != continuation.text.rstrip()
    return stops and _plain(continuation.text) == _plain(answer)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).removesuffix(".").rstrip()


def judge(continuation: Continuation, answer: str) -> tuple[bool, bool]:
    """Whether a continuation contains the answer, and whether it contains it and then stops.

    The answer has to occur as whole words, in any case and spacing. The model stops if an end of sequence, line or
    sentence follows; what comes after that does not matter.
    """
    words = r"\s+".join(re.escape(word) for word in answer.split())
    found = list(re.finditer(rf"(?<!\w){words}(?!\w)", continuation.text, re.IGNORECASE))
    return bool(found), any(_stops(continuation.text[match.end() :], continuation.ended) for match in found)


def _stops(rest: str, ended: bool) -> bool:
    if not rest.strip(" \t"):
        return ended
    return re.match(r"[ \t]*(\n|[.!?](?!\w))", rest) is not None

"""Free generation: what a user of the model would see."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from stableedit_cpp.model.running import input_device, untouched
from stableedit_cpp.model.tokens import TokenSequence, collate, pack, prompt_ids

__all__ = ["Continuation", "generate", "generate_continuations", "judge"]


class Continuation(NamedTuple):
    """What a model wrote after a prompt, and whether it closed with an end-of-sequence token."""

    text: str
    ended: bool


def generate(model: torch.nn.Module, tokenizer, prompts: Sequence[str], *, max_new_tokens: int = 12) -> list[str]:
    """Greedy continuations of prompts, without the prompts themselves."""
    found = generate_continuations(model, tokenizer, prompts, [max_new_tokens] * len(prompts))
    return [continuation.text for continuation in found]


def generate_continuations(
    model: torch.nn.Module,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: Sequence[int],
    *,
    max_tokens: int = 2048,
    on_done: Callable[[int], object] | None = None,
) -> list[Continuation]:
    """Greedy continuations, many prompts at a time.

    Args:
        max_new_tokens: for each prompt.
        max_tokens: prompt tokens, padding included, in one batch.
        on_done: called with the number of prompts after each batch.

    Raises:
        ValueError: for a prompt without tokens.
    """
    if not prompts:
        return []
    sequences = [TokenSequence(tuple(ids), ()) for ids in prompt_ids(tokenizer, prompts)]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        if not sequence.ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    answers: list[Continuation | None] = [None] * len(prompts)
    device = input_device(model)
    with untouched(model):
        for indices in pack(sequences, max_tokens):
            # On the left, so that every prompt ends where its continuation begins.
            batch = collate([sequences[index] for index in indices], device, padding_side="left")
            output = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max(max_new_tokens[index] for index in indices),
                pad_token_id=pad,
            )
            for index, row in zip(indices, output[:, batch.input_ids.shape[1] :].tolist(), strict=True):
                row = row[: max_new_tokens[index]]
                stop = next((place for place, token in enumerate(row) if token in ends), None)
                text = tokenizer.decode(row[:stop], skip_special_tokens=True)
                # The token that ends a model's text need not be special to its tokenizer.
                closing = "" if stop is None else tokenizer.decode(row[stop : stop + 1], skip_special_tokens=True)
                answers[index] = Continuation(text + closing, stop is not None)
            if on_done is not None:
                on_done(len(indices))
    return answers


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

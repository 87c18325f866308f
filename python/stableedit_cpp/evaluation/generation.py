"""Free generation: what a user of the model would see."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor

from stableedit_cpp.evaluation.answers import no_distribution, refuse_broken
from stableedit_cpp.model.form import RAW, Form, find_form
from stableedit_cpp.model.tokens import TokenSequence, collate, context_length, pack, prompt_ids
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["Continuation", "check_room", "generate", "generate_continuations", "judge"]


class Continuation(NamedTuple):
    """What a model wrote after a prompt.

    Attributes:
        ended: whether it closed with an end-of-sequence token.
        broken: whether one of its tokens was chosen among NaN, so that the text says nothing.
    """

    text: str
    ended: bool
    broken: bool = False


def generate(
    model: torch.nn.Module,
    tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 12,
    chat_template: bool | None = False,
) -> list[str]:
    """Greedy continuations of prompts, without the prompts themselves; a single text is one prompt.

    Always the likeliest token, whatever the model's own ``generation_config`` says of sampling and penalties.

    Args:
        chat_template: ask as a user in a chat does; see ``EditorConfig``.

    Raises:
        ValueError: for a prompt without tokens, or one that leaves no room for the new tokens in the model's context; a
            chat template that is not there, or of no use.
        ModelBroken: if the model answers NaN.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    form = find_form(model, tokenizer, chat_template=chat_template)
    found = generate_continuations(model, tokenizer, prompts, [max_new_tokens] * len(prompts), form=form)
    broken = [f"{prompt!r:.60}" for prompt, text in zip(prompts, found, strict=True) if text.broken]
    refuse_broken(model, broken, len(prompts))
    return [continuation.text for continuation in found]


def generate_continuations(
    model: torch.nn.Module,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: Sequence[int],
    *,
    form: Form = RAW,
    max_tokens: int = 2048,
    on_done: Callable[[int], object] | None = None,
) -> list[Continuation]:
    """Greedy continuations, many prompts at a time.

    Args:
        max_new_tokens: for each prompt.
        form: of the prompts.
        max_tokens: prompt tokens, padding included, in one batch.
        on_done: called with the number of prompts after each batch.

    Raises:
        ValueError: for a prompt without tokens, or one that leaves no room in the model's context.
    """
    if not prompts:
        return []
    sequences = [TokenSequence(tuple(ids), ()) for ids in prompt_ids(tokenizer, prompts, form)]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        if not sequence.ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens")
    limit = context_length(model)
    check_room([len(s) for s in sequences], max_new_tokens, limit, [f"the prompt {p!r:.60}" for p in prompts])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = model.generation_config.eos_token_id
    answers: list[Continuation | None] = [None] * len(prompts)
    device = input_device(model)
    with untouched(model), _greedy(model.generation_config, eos_token_id=ends, pad_token_id=pad):
        for indices in _batches(sequences, max_new_tokens, max_tokens, limit):
            # On the left, so that every prompt ends where its continuation begins.
            batch = collate([sequences[index] for index in indices], device, padding_side="left")
            watch = _Watch()
            output = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=max(max_new_tokens[index] for index in indices),
                logits_processor=[watch],
            )
            rows = output[:, batch.input_ids.shape[1] :].tolist()
            for index, row, broken in zip(indices, rows, watch.by_row(), strict=True):
                answers[index] = _continuation(tokenizer, row[: max_new_tokens[index]], broken, ends)
            if on_done is not None:
                on_done(len(indices))
    return answers


def _continuation(tokenizer, tokens: list[int], broken: list[bool], ends: int | Sequence[int] | None) -> Continuation:
    """The text of new tokens, up to the first that ends it."""
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    stop = next((place for place, token in enumerate(tokens) if token in ends), None)
    if any(broken[: len(tokens) if stop is None else stop + 1]):
        return Continuation("", False, broken=True)
    text = tokenizer.decode(tokens[:stop], skip_special_tokens=True)
    # The token that ends a model's text need not be special to its tokenizer.
    closing = "" if stop is None else tokenizer.decode(tokens[stop : stop + 1], skip_special_tokens=True)
    return Continuation(text + closing, stop is not None)


def check_room(lengths: Sequence[int], room: Sequence[int], limit: int | None, names: Sequence[str]) -> None:
    """Find out before anything is run which prompt leaves too little room for its answer.

    Args:
        lengths: tokens of each prompt. room: for new tokens after it. names: what to call it in the message.
        limit: context length of the model, if it has one.

    Raises:
        ValueError: if a prompt and what may follow it are longer than the context.
    """
    for length, new, name in zip(lengths, room, names, strict=True):
        if limit is not None and length + new - 1 > limit:  # the last token is written but not read
            raise ValueError(
                f"{name}: {length} tokens with up to {new} new ones need a context of {length + new - 1}; the model's "
                f"is {limit}"
            )


def _batches(
    sequences: Sequence[TokenSequence], room: Sequence[int], max_tokens: int, limit: int | None
) -> Iterator[list[int]]:
    """All of a batch write as much as the one with most room; where the longest could not, each prompt is one."""
    for batch in pack(sequences, max_tokens):
        longest = max(len(sequences[index]) for index in batch) + max(room[index] for index in batch) - 1
        yield from [batch] if limit is None or longest <= limit else [[index] for index in batch]


@contextmanager
def _greedy(config: GenerationConfig, **settings: object) -> Iterator[None]:
    """Let a model's generation config say nothing but these settings for a while.

    What a saved model brings along (sampling, a repetition penalty, forced tokens) fills whatever a call leaves open,
    so it cannot be overruled by arguments; and wrappers of models share the one config object.
    """
    before = dict(vars(config))
    vars(config).clear()
    vars(config).update(vars(GenerationConfig(do_sample=False, num_beams=1, **settings)))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)


class _Watch(LogitsProcessor):
    """Changes nothing, and remembers at which steps which rows of a batch were no distribution."""

    def __init__(self) -> None:
        self._steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._steps.append(no_distribution(scores))
        return scores

    def by_row(self) -> list[list[bool]]:
        return torch.stack(self._steps, 1).tolist()


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

"""Free generation: what a user of the model would see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor

from stableedit_cpp.evaluation.answers import no_distribution, refuse_broken
from stableedit_cpp.evaluation.continuing import continued, generation_prefix
from stableedit_cpp.model.form import RAW, Form, find_form, stop_tokens
from stableedit_cpp.model.kind import check_tokenizer, language_model, writes_alone
from stableedit_cpp.model.shares import shared_passes
from stableedit_cpp.model.tokens import TokenSequence, context_length, pack, prompt_ids
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = [
    "Continuation",
    "Written",
    "as_text",
    "check_room",
    "generate",
    "generate_continuations",
    "write_greedily",
]


class Written(NamedTuple):
    """Tokens that a model wrote after a prompt.

    Attributes:
        tokens: up to the first that ends the text, that one included.
        ended: whether there is such a one.
        broken: whether one of them was chosen among NaN.
    """

    tokens: tuple[int, ...]
    ended: bool
    broken: bool


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
    chat_template: bool | None = None,
    split_special_tokens: bool = True,
) -> list[str]:
    """Greedy continuations of prompts, without the prompts themselves; a single text is one prompt.

    Always the likeliest token, whatever the model's own ``generation_config`` says of sampling and penalties.

    Args:
        chat_template: ask as a user in a chat does, or with the text as it stands, which the model continues; None asks
            in the form in which the default editor edits: in a chat where the template belongs to the model, as that
            of an instruct model does (see ``EditorConfig``).
        split_special_tokens: what prompts spell is text, also where it is the name of a control token. False lets the
            tokenizer find control tokens in them: for prompts that are rendered already, with ``chat_template=False``.

    Raises:
        ValueError: for what is no causal language model; a prompt without tokens, or one that leaves no room for the
            new tokens in the model's context; a chat template that is not there, or of no use.
        ModelBroken: if the model answers NaN.
    """
    model = language_model(model)
    check_tokenizer(tokenizer)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    form = find_form(model, tokenizer, chat_template=chat_template, split_special_tokens=split_special_tokens)
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
    sequences = [TokenSequence(tuple(ids), ()) for ids in prompt_ids(tokenizer, prompts, form)] if prompts else []
    for prompt, sequence in zip(prompts, sequences, strict=True):
        if not sequence.ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens")
    names = [f"the prompt {prompt!r:.60}" for prompt in prompts]
    check_room([len(s) for s in sequences], max_new_tokens, context_length(model), names)
    how = {"end": form.end, "max_tokens": max_tokens, "on_done": on_done}
    return [as_text(tokenizer, found) for found in write_greedily(model, tokenizer, sequences, max_new_tokens, **how)]


def write_greedily(
    model: torch.nn.Module,
    tokenizer,
    prompts: Sequence[TokenSequence],
    max_new_tokens: Sequence[int],
    *,
    end: int | None = None,
    max_tokens: int,
    on_done: Callable[[int], object] | None = None,
) -> list[Written]:
    """What a model writes after each prompt, always the likeliest token, many prompts at a time.

    Args:
        prompts, max_new_tokens: token ids, and how many may follow each; there is room for them in the context.
        end: a token that ends a text beside those at which the model's generation stops.
        max_tokens, on_done: as for ``generate_continuations``.
    """
    ends = list(dict.fromkeys([*stop_tokens(model, tokenizer), *([] if end is None else [end])]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def write(indices: Sequence[int]) -> list[Written]:
        watch, room = _Watch(), max(max_new_tokens[index] for index in indices)
        chosen = [prompts[index] for index in indices]
        output, width = continued(model, chosen, prefix, max_new_tokens=room, logits_processor=[watch])
        rows = zip(indices, output[:, width:].tolist(), watch.by_row(), strict=True)
        written = [_up_to_the_end(row[: max_new_tokens[index]], broken, ends) for index, row, broken in rows]
        if len({len(prompt) for prompt in chosen}) > 1:
            # Some models, MPT among them, answer NaN to padding on the left: these prompts are asked alone.
            written = [write([index])[0] if one.broken else one for index, one in zip(indices, written, strict=True)]
        return written

    with untouched(model), _greedy(model.generation_config, eos_token_id=ends or None, pad_token_id=pad):
        prefix = generation_prefix(model, prompts, max(max_new_tokens, default=0))
        together = 1 if writes_alone(model) else max_tokens  # a prompt of more is a batch of its own
        run = list(_batches(prompts, max_new_tokens, together, context_length(model)))
        how = {"max_tokens": max_tokens, "skip": len(prefix or ()), "device": input_device(model)}
        done = None if on_done is None else lambda indices: on_done(len(indices))
        parts = shared_passes("writing answers", run, prompts, write, on_done=done, **how)
    found: dict[int, Written] = {}
    for indices, part in zip(run, parts, strict=True):
        found |= zip(indices, part, strict=True)
    return [found[index] for index in range(len(prompts))]


def _up_to_the_end(tokens: list[int], broken: list[bool], ends: Sequence[int]) -> Written:
    stop = next((place for place, token in enumerate(tokens) if token in ends), None)
    kept = tokens if stop is None else tokens[: stop + 1]
    return Written(tuple(kept), stop is not None, any(broken[: len(kept)]))


def as_text(tokenizer, written: Written) -> Continuation:
    if written.broken:
        return Continuation("", False, broken=True)
    body = list(written.tokens[:-1] if written.ended else written.tokens)
    text = tokenizer.decode(body, skip_special_tokens=True)
    # The token that ends a model's text need not be special to its tokenizer.
    closing = tokenizer.decode([written.tokens[-1]], skip_special_tokens=True) if written.ended else ""
    return Continuation(text + closing, written.ended)


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

"""Where the subject of a request stands in its prompt: the token at which locate-and-edit methods read and write."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stableedit_cpp.model.encoding import Encoded, Passage, encode
from stableedit_cpp.model.form import RAW, Form

__all__ = ["find_subject", "subject_prefixes"]


def find_subject(prompt: str, subject: str) -> tuple[int, int] | None:
    """Where the subject stands in a prompt, begin and end in characters; None where it does not.

    As a word of its own rather than within one, and as it is written rather than in other letters' case; of several
    places the last, which alone has all of the prompt's mentions before it. White space may be any.
    """
    words = r"\s+".join(map(re.escape, subject.split()))
    for pattern in (rf"(?<!\w){words}(?!\w)", words):
        for flags in (0, re.IGNORECASE):
            found = list(re.finditer(pattern, prompt, flags)) if words else []
            if found:
                return found[-1].span()
    return None


def subject_prefixes(
    tokenizer,
    prompts: Sequence[str],
    subjects: Sequence[str | None],
    names: Sequence[str],
    form: Form = RAW,
    contexts: Sequence[str] = ("",),
) -> list[list[tuple[int, ...]]]:
    """Of each prompt, in each context, its token ids up to the last token of the subject, that one included.

    The ids are those that ``prompt_ids`` gives for the whole prompt, whatever the tokenizer's padding side.

    Args:
        names: what to call each prompt in an error message.
        form: of the prompts.
        contexts: texts before the prompt, with the white space between; ``""`` for the bare prompt.

    Returns:
        By prompt, then by context.

    Raises:
        ValueError: for a subject that is missing or does not occur in its prompt; says what to add.
    """
    spans = [_span(name, *pair) for name, *pair in zip(names, prompts, subjects, strict=True)]
    texts = [context + prompt for prompt in prompts for context in contexts]
    opened = form.prompts(tokenizer, texts)
    found = encode(tokenizer, opened, opened=not form.chat, templated=form.chat, spans=True)
    ends = []
    for place, (text, whole) in enumerate(zip(texts, opened, strict=True)):
        number, context = divmod(place, len(contexts))
        begin = whole.whole.rfind(text)  # a chat template writes before and after it
        if begin < 0:
            raise ValueError(f"{names[number]}: the chat template changes the prompt {text!r:.60}; edit plain prompts")
        ends.append(begin + len(contexts[context]) + spans[number][1])
    counts = [_tokens_until(tokenizer, *one, form) for one in zip(opened, found, ends, strict=True)]
    prefixes = [tuple(one.ids[:count]) for one, count in zip(found, counts, strict=True)]
    return [prefixes[begin : begin + len(contexts)] for begin in range(0, len(prefixes), len(contexts))]


def _span(name: str, prompt: str, subject: str | None) -> tuple[int, int]:
    if not subject:
        raise ValueError(
            f"{name}: it has no subject, at whose last token this editor works; add the field 'subject' with what the "
            f"fact is about, as the prompt {prompt!r:.60} has it"
        )
    span = find_subject(prompt, subject)
    if span is None:
        raise ValueError(
            f"{name}: the subject {subject!r} does not occur in the prompt {prompt!r:.60}; give 'subject' as the "
            "prompt has it"
        )
    return span


def _tokens_until(tokenizer, text: Passage, found: Encoded, end: int, form: Form) -> int:
    """How many of the tokens of a text it takes to hold its characters up to ``end``."""
    if found.spans is None:
        return _common(tokenizer, text.part(0, end), found.ids, form)
    # Special tokens are of no width. The bytes of one character have the span of all of it.
    return max(index for index, (begin, stop) in enumerate(found.spans) if begin < stop and begin < end) + 1


def _common(tokenizer, beginning: Passage, ids: Sequence[int], form: Form) -> int:
    """For a tokenizer that does not say where its tokens stand: as many as the beginning alone has, or up to the token
    that goes beyond it."""
    ((alone, _),) = encode(tokenizer, [beginning], opened=not form.chat, templated=form.chat)
    same = next((i for i, (mine, whole) in enumerate(zip(alone, ids, strict=False)) if mine != whole), len(alone))
    return min(same + (same < len(alone)), len(ids))

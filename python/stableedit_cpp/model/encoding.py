"""From texts to token ids: what a user wrote is text, also where it spells a control token (``<|im_end|>``, ``</s>``).

Tokenizers look for these in whatever they are given. In plain text they can be told not to (transformers'
``split_special_tokens=True``); in a chat those of the template are meant, and those in the user's words are not. A
template is therefore shown a user's words with blanks for what spells a control token, and so is the tokenizer; between
the control tokens that it finds, it is then given the words themselves, as text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

from stableedit_cpp.model.chat import control_tokens

__all__ = ["Encoded", "Passage", "encode", "words_of"]

_MARKS = ("", "\n", ".", ":")  # behind one of which a tokenizer puts no space of its own before a text
_AT_A_TIME = 1024  # texts that a tokenizer is given: what it makes of one takes kilobytes until it has returned
_said: set[str] = set()  # of control tokens that somebody spelled: once a process


@dataclass(frozen=True)
class Passage:
    """A text, and what of it is shown to those who look for control tokens: each character with which a user's words
    spell one is a blank there, a character of private use that the words do not hold."""

    whole: str
    shown: str

    @property
    def spells(self) -> bool:
        """Whether the user's words spell a control token."""
        return self.whole != self.shown

    def within(self, rendered: str) -> Passage | None:
        """What a template made of ``shown``; None where it does not have all of the blanks."""
        spelled = [(letter, blank) for letter, blank in zip(self.whole, self.shown, strict=True) if letter != blank]
        if not spelled:
            return Passage(rendered, rendered)
        blank, count = spelled[0][1], rendered.count(spelled[0][1])
        if not count or count % len(spelled):
            return None
        letters = cycle(letter for letter, _ in spelled)
        return Passage("".join(next(letters) if mark == blank else mark for mark in rendered), rendered)

    def then(self, other: Passage) -> Passage:
        return Passage(self.whole + other.whole, self.shown + other.shown)

    def part(self, begin: int, end: int) -> Passage:
        return Passage(self.whole[begin:end], self.shown[begin:end])


class Encoded(NamedTuple):
    """
    Attributes:
        spans: where each token stands in the text, begin and end in characters; None where nobody asked, or the
            tokenizer does not say.
    """

    ids: list[int]
    spans: list[tuple[int, int]] | None


def words_of(tokenizer, texts: Sequence[str]) -> list[Passage]:
    """Texts that a user wrote."""
    names = _pattern(tokenizer)
    return [_words(text, names) if names.search(text) else Passage(text, text) for text in texts]


def _words(text: str, names: re.Pattern) -> Passage:
    blank = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)
    return Passage(text, names.sub(lambda found: blank * len(found[0]), text))


def encode(
    tokenizer, texts: Sequence[Passage], *, opened: bool, templated: bool = False, spans: bool = False
) -> list[Encoded]:
    """Token ids of texts. Those in which no user spells a control token have the ids that the tokenizer gives them.

    Where a tokenizer cannot be kept from finding a control token in a user's words (Unigram models find it among their
    ordinary pieces), it finds it, and a warning says so.

    Args:
        opened: with the tokens that the tokenizer puts before a text; never with one with which it closes every text,
            since an answer has to follow.
        templated: a chat template wrote of them what no user did, and nothing goes before it.
    """
    if not texts:
        return []
    found = _call(tokenizer, [text.shown for text in texts], opened, spans)
    end, token = tokenizer.eos_token, tokenizer.eos_token_id  # slow attributes
    for index, text in enumerate(texts):
        # Whether the tokenizer closed it.
        ids = found[index].ids
        closed = opened and bool(end) and len(ids) > 1 and ids[-1] == token and not text.shown.endswith(end)
        if text.spells:
            better = (_between if templated else _as_text)(tokenizer, text, opened, spans)
            _say(tokenizer, text, kept=better is not None)
            found[index] = better or _call(tokenizer, [text.whole], opened, spans)[0]
        if closed:
            ids, where = found[index]
            found[index] = Encoded(ids[:-1], where and where[:-1])
    return found


def _pattern(tokenizer) -> re.Pattern:
    """Of the names of all control tokens, the longest first."""
    names = control_tokens(tokenizer).values() if hasattr(tokenizer, "added_tokens_decoder") else ()
    return re.compile("|".join(map(re.escape, sorted(filter(None, names), key=len, reverse=True))) or r"(?!)")


def _call(tokenizer, texts: Sequence[str], opened: bool, spans: bool, **how: object) -> list[Encoded]:
    fast = getattr(tokenizer, "is_fast", False)
    spans = spans and fast
    if fast:  # what nobody reads takes half of the time
        how |= {"return_attention_mask": False, "return_token_type_ids": False, "return_offsets_mapping": spans}
    encoded: list[Encoded] = []
    for begin in range(0, len(texts), _AT_A_TIME):
        part = list(texts[begin : begin + _AT_A_TIME])
        # Not with the tokenizer's warning about the length: callers check it.
        found = tokenizer(part, add_special_tokens=opened, verbose=False, **how)
        places = found["offset_mapping"] if spans else [None] * len(part)
        encoded += [Encoded(*both) for both in zip(found["input_ids"], places, strict=True)]
    return encoded


def _as_text(tokenizer, text: Passage, opened: bool, spans: bool) -> Encoded | None:
    """All of it as text; None where the tokenizer finds more control tokens in it than in what is shown."""
    try:
        (found,) = _call(tokenizer, [text.whole], opened, spans, split_special_tokens=True)
    except (TypeError, ValueError, NotImplementedError):  # it knows no such thing
        return None
    finally:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:  # which would go on so until the next call of the tokenizer
            backend.encode_special_tokens = tokenizer.split_special_tokens
    (shown,) = _call(tokenizer, [text.shown], opened, False)
    control = control_tokens(tokenizer).keys() - {tokenizer.unk_token_id}
    counts = [sum(token in control for token in one.ids) for one in (found, shown)]
    return found if counts[0] == counts[1] else None


def _between(tokenizer, text: Passage, _opened: bool, _spans: bool) -> Encoded | None:
    """The control tokens of what is shown, and between them as text what is text."""
    (shown,) = _call(tokenizer, [text.shown], False, True)
    ids, spans, token, place = [], [], 0, 0
    for at, (begin, end) in [*_control(tokenizer, text.shown, shown), (len(shown.ids), (len(text.shown),) * 2)]:
        piece = text.part(place, begin)
        own = Encoded(shown.ids[token:at], shown.spans and shown.spans[token:at])
        if piece.spells:
            own = next((found for mark in _MARKS if (found := _behind(tokenizer, mark, piece, own.ids))), None)
            if own is None:
                return None
            own = Encoded(own.ids, own.spans and [(place + left, place + right) for left, right in own.spans])
        ids += [*own.ids, *shown.ids[at : at + 1]]
        spans += [*(own.spans or ()), *((shown.spans or ())[at : at + 1])]
        token, place = at + 1, end
    return Encoded(ids, None if shown.spans is None else spans)


def _control(tokenizer, text: str, found: Encoded) -> Iterator[tuple[int, tuple[int, int]]]:
    """Number and place of the control tokens that were found in a text, with the white space that they take in."""
    names, pattern = control_tokens(tokenizer), _pattern(tokenizer)
    places = (match.span() for match in pattern.finditer(text))
    for number, token in enumerate(found.ids):
        if found.spans is not None:  # a blank may be an unknown character
            place = found.spans[number] if pattern.fullmatch(text[slice(*found.spans[number])].strip()) else None
        else:
            place = next(places, None) if token in names and token != tokenizer.unk_token_id else None
        if token in names and place is not None:
            yield number, place


def _behind(tokenizer, mark: str, piece: Passage, expected: list[int]) -> Encoded | None:
    """A piece as text, from behind a mark; None where the tokens of what is shown are not those there that it has in
    place."""
    marked = Passage(mark, mark).then(piece)
    head, shown = _call(tokenizer, [mark, marked.shown], False, False)
    size = len(head.ids)
    if shown.ids[:size] != head.ids or shown.ids[size:] != expected:
        return None
    found = _as_text(tokenizer, marked, False, True)
    if found is None or found.ids[:size] != head.ids:
        return None
    places = found.spans and [(left - len(mark), right - len(mark)) for left, right in found.spans[size:]]
    return Encoded(found.ids[size:], places)


def _say(tokenizer, text: Passage, *, kept: bool) -> None:
    """Once for each control token, so that whoever hands over what is rendered already learns how."""
    begin = next(place for place, letter in enumerate(text.whole) if letter != text.shown[place])
    names = _pattern(tokenizer)
    name = names.match(text.whole, begin)[0]
    if name in _said:
        return
    _said.add(name)
    # Behind the template's own.
    around = max((found.end() for found in names.finditer(text.shown, 0, begin)), default=0)
    words = names.split(text.shown[begin:])[0]
    place = text.whole[max(around, begin - 30) : begin + min(len(words), len(name) + 30)]
    what = (
        "is taken for text; where prompts are rendered already, have it parsed: split_special_tokens=False "
        "(--no-split-special-tokens)"
        if kept
        else "this tokenizer finds in any text: it is taken for that token"
    )
    warnings.warn(f"{place!r} spells {name!r}, a control token's name, which {what}", stacklevel=2)

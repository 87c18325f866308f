"""The form of prompts and answers: a plain text that goes on, or a turn of a chat; and whether an answer has an end."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stableedit_cpp.model.chat import Template, control_tokens, read_template, render
from stableedit_cpp.model.encoding import Passage, words_of
from stableedit_cpp.model.heads import learn_head

__all__ = ["PARSED", "RAW", "Form", "find_form", "stop_tokens"]


@dataclass(frozen=True)
class Form:
    """How a prompt and a target become a text. ``find_form`` makes one for a model and its tokenizer.

    Attributes:
        chat: prompts are a user's turn, rendered by the tokenizer's chat template up to where the assistant's answer
            begins. Otherwise they are texts as they stand, which the answer continues.
        opening: what the template writes at the head of an answer beyond its generation prompt, an empty thought, say;
            belongs to the prompt.
        space: the white space between prompt and target; belongs to the answer. See ``gap``.
        end: the token that ends the assistant's turn, or a text; None where it does not matter.
        ended: whether it is the last token of every answer. Otherwise an answer only stops.
        split_special_tokens: what prompts and targets spell is text, also where it is the name of a control token, and
            only what the template writes is one. Otherwise a tokenizer finds control tokens wherever they are spelled.
    """

    chat: bool = False
    opening: str = ""
    space: str = " "
    end: int | None = None
    ended: bool = False
    split_special_tokens: bool = True

    @property
    def closing(self) -> tuple[int, ...]:
        """What every answer ends in: a token or none."""
        return (self.end,) if self.ended else ()

    @property
    def asked(self) -> dict[str, bool]:
        """How ``evaluate`` and ``generate`` ask in this form."""
        return {"chat_template": self.chat, "split_special_tokens": self.split_special_tokens}

    def gap(self, prompt: str) -> str:
        """What stands between a prompt and its target: ``space``, but in plain text nothing after a character of a
        script that sets no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan)."""
        return "" if not self.chat and _UNSPACED.search(prompt) else self.space

    def cut(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Of what a model has written, the answer: up to the first token that ends it, that one included."""
        return tokens[: tokens.index(self.end) + 1] if self.ended and self.end in tokens else tokens

    def text(self, tokenizer, tokens: tuple[int, ...]) -> str:
        """What an answer says, without the token that ends it and what may follow."""
        answer = self.cut(tokens)
        return tokenizer.decode(answer[:-1] if answer[-1:] == self.closing else answer)

    def words(self, tokenizer, texts: Sequence[str]) -> list[Passage]:
        """Texts that a user wrote."""
        return words_of(tokenizer, texts) if self.split_special_tokens else [Passage(text, text) for text in texts]

    def prompts(self, tokenizer, prompts: Sequence[str]) -> list[Passage]:
        """The texts after which an answer begins.

        Raises:
            ValueError: for a prompt that the chat template refuses, or that is rendered already.
        """
        if not self.chat:
            return self.words(tokenizer, prompts)
        template = read_template(tokenizer)
        return [self._rendered(tokenizer, words, template) for words in self.words(tokenizer, prompts)]

    def _rendered(self, tokenizer, words: Passage, template: Template) -> Passage:
        prompt = words.whole
        found = template.written_in(prompt, whole=self.split_special_tokens)
        if found is not None:
            raise ValueError(
                f"the prompt {prompt!r:.60} holds {found!r}, which the chat template writes by itself; give the bare "
                "question (chat_template=False and split_special_tokens=False take it as it stands, and put a space "
                "before its target)"
            )
        text = words.within(render(tokenizer, words.shown) + self.opening)
        if text is None:
            raise ValueError(
                f"the chat template rewrites the prompt {prompt!r:.60}, in which a control token is spelled, so that "
                "nobody can tell it from the template's own; edit plain prompts (chat_template=False)"
            )
        return text

    def describe(self, tokenizer) -> str:
        """For people: "plain text", "turns of a chat, answers ending in '<|im_end|>'"."""
        end = f", answers ending in {tokenizer.decode([self.end])!r}" if self.ended else ""
        return ("turns of a chat" if self.chat else "plain text") + end

    def dated(self, tokenizer) -> bool:
        """Whether prompts hold the date on which they are rendered."""
        return self.chat and "strftime_now" in tokenizer.get_chat_template()

    def identity(self, tokenizer) -> dict[str, object]:
        """What tells this form from others, ready for JSON."""
        template = tokenizer.get_chat_template() if self.chat else None
        digest = None if template is None else hashlib.blake2b(template.encode(), digest_size=32).hexdigest()
        return {"chat_template": digest, "opening": self.opening, "space": self.space, "closing": [*self.closing]}


RAW = Form()
PARSED = Form(split_special_tokens=False)  # texts that are no words of a user: corpora, benchmarks
# The last character: of such a script, or one of its marks of punctuation.
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\uff01-\uff9f\U00020000-\U000323af]\Z"
)
_BEGINNINGS = ("A", "1", '"', "(")  # of prompts that have nothing in common


def find_form(
    model,
    tokenizer,
    *,
    chat_template: bool | None = False,
    end_of_answer: bool = False,
    split_special_tokens: bool = True,
) -> Form:
    """The form that a model and its tokenizer have.

    Args:
        chat_template: True renders prompts by the tokenizer's chat template. None does so where the template belongs to
            the model, as that of an instruct model does: it closes an answer with a token at which this model's
            generation stops. Base models often come with the template of their instruct version, but stop at another
            token, at the end of a document; one whose template closes with just that token is taken for an instruct
            model. Where a template is missing or cannot be used, None leaves prompts as they are.
        end_of_answer: whether answers have a token that ends them. In a chat it is the first token after the
            assistant's text at which the model's generation stops, or is meant to by its tokenizer; where there is none
            (a template that is not the model's), the first control token. A warning says where ``model.generate`` does
            not stop at it. In plain text it is the tokenizer's end-of-sequence token if generation stops at it, or else
            the first at which it does.
        split_special_tokens: whether what prompts and targets spell is text, also where it is a control token's name.

    Raises:
        ValueError: for ``chat_template=True`` and a tokenizer without a template, or one that refuses a plain question,
            or after whose generation prompt no answer can follow; for ``end_of_answer`` where no token ends a text.
    """
    chat = None if chat_template is False else _chat(model, tokenizer, needed=chat_template is True)
    if chat is not None:
        opened = [text.whole for text in chat.prompts(tokenizer, _BEGINNINGS)]
        learn_head(model, tokenizer(opened, add_special_tokens=False)["input_ids"])
    if chat is not None and (chat.end is not None or not end_of_answer):
        if end_of_answer and chat.end not in _model_stops(model):
            warnings.warn(
                f"the chat template ends an answer with {tokenizer.decode([chat.end])!r}, at which the generation of "
                "this model does not stop; add its id to model.generation_config.eos_token_id",
                stacklevel=2,
            )
        return replace(chat, ended=end_of_answer, split_special_tokens=split_special_tokens)
    end = _end_of_text(model, tokenizer) if end_of_answer else None
    return replace(chat or RAW, end=end, ended=end_of_answer, split_special_tokens=split_special_tokens)


def stop_tokens(model, tokenizer) -> tuple[int, ...]:
    """The tokens at which a text ends: those of the model's generation config, or else of its config, and the
    tokenizer's end-of-sequence token, which not all generation configs know."""
    own = tokenizer.eos_token_id
    return tuple(dict.fromkeys([*_model_stops(model), *([] if own is None else [own])]))


def _model_stops(model) -> list[int]:
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(holder, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def _end_of_text(model, tokenizer) -> int:
    stops, own = _model_stops(model), tokenizer.eos_token_id
    if not stops and own is None:
        raise ValueError(
            "end_of_answer needs an end-of-sequence token, and neither the model nor its tokenizer has one; set the "
            "tokenizer's eos_token, or end_of_answer=False"
        )
    return own if own is not None and (own in stops or not stops) else stops[0]


def _chat(model, tokenizer, *, needed: bool) -> Form | None:
    """The form of a chat; None where the template is not needed and belongs to another model, or is of no use."""
    try:
        template = read_template(tokenizer)
    except ValueError:
        if needed:
            raise
        return None
    stops, control = stop_tokens(model, tokenizer), control_tokens(tokenizer)
    end = next((token for token in template.closing if token in stops), None)
    if end is None and not needed:
        return None
    if end is None:
        end = next((token for token in template.closing if token in control), None)
    return Form(True, template.opening, template.space, end)

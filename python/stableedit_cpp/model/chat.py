"""What a tokenizer's chat template writes around a question and around its answer."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Template", "control_tokens", "read_template", "render"]

# A conversation to find that out with: sentences that no template holds.
_QUESTION, _ANSWER, _NEXT = "Who keeps the lighthouse of Zembla?", "Old Ottokar keeps it.", "And who lit it before?"


class Template(NamedTuple):
    """
    Attributes:
        opening: text between the generation prompt and an answer, an empty thought, say; "" where it is only ``space``.
        space: white space between the generation prompt and an answer.
        closing: ids of the tokens after an answer: those that end the conversation, then those before the user's next
            turn, which are all that some templates (GLM) have.
        control: control tokens that it writes, as text.
        around: of these the last before a question, and those between it and the answer.
    """

    opening: str
    space: str
    closing: tuple[int, ...]
    control: tuple[str, ...]
    around: tuple[str, ...]

    def written_in(self, prompt: str, *, whole: bool) -> str | None:
        """A control token in a prompt that is rendered already, which is said by any that the template writes, or by a
        ``whole`` turn of them in their order; None for a bare question."""
        if not whole:
            return next((token for token in self.control if token in prompt), None)
        turn = re.search(".*".join(map(re.escape, self.around)), prompt, re.DOTALL) if len(self.around) > 1 else None
        return self.around[0] if turn else None


def read_template(tokenizer) -> Template:
    """Render a conversation and look.

    Raises:
        ValueError: for no template, or one that refuses a plain question, or after whose generation prompt no answer
            can follow.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "chat_template is asked for, but the tokenizer has no chat template; edit plain prompts "
            "(chat_template=False), or set tokenizer.chat_template"
        )
    prompt, whole = render(tokenizer, _QUESTION), render(tokenizer, _QUESTION, _ANSWER)
    if _QUESTION not in prompt:
        raise ValueError("the chat template leaves out what the user says, so that no prompt can be rendered with it")
    before, answer, after = whole[len(prompt) :].partition(_ANSWER)
    if not whole.startswith(prompt) or not answer:
        raise ValueError(
            f"the chat template's generation prompt, which ends in {prompt[-40:]!r}, is not how it begins an answer: "
            f"{whole[-80:]!r}; no answer can follow it. Edit plain prompts (chat_template=False), or set a template "
            "that ends where an answer begins"
        )
    closing = tokenizer([after, _between(tokenizer)], add_special_tokens=False)["input_ids"]
    opening, space = (before, "") if before.strip() else ("", before)
    control = tuple(token for token in control_tokens(tokenizer).values() if token in whole)
    names = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")
    asked, _, answered = prompt.partition(_QUESTION)
    around = (*names.findall(asked)[-1:], *names.findall(answered))
    return Template(opening, space, tuple(closing[0] + closing[1]), control, around)


def render(tokenizer, *said: str) -> str:
    """What is said, by the user first and then in turns: up to where the assistant's answer begins, where the user was
    the last; else the whole conversation.

    Raises:
        ValueError: if the template refuses it.
    """
    roles = ("user", "assistant")
    turns = [{"role": roles[index % 2], "content": text} for index, text in enumerate(said)]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=len(said) % 2 == 1)
    except Exception as error:  # whatever a template, which is a program, comes upon
        raise ValueError(f"the chat template refuses the prompt {said[0]!r:.60}: {error}") from error


def control_tokens(tokenizer) -> dict[int, str]:
    """All control tokens of a tokenizer, by id."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _between(tokenizer) -> str:
    """What stands between an answer and the user's next question; nothing where a template knows no second one."""
    try:
        whole = render(tokenizer, _QUESTION, _ANSWER, _NEXT)
    except ValueError:
        return ""
    between, _, rest = whole.partition(_ANSWER)[2].partition(_NEXT)
    return between if rest else ""

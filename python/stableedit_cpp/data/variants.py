"""Variants of a request: paraphrases, reversed statements and consequences that are edited with it as one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from stableedit_cpp.data.values import absent
from stableedit_cpp.files.words import with_nearest

__all__ = ["MOVABLE", "as_variants", "check_movable", "clean_text", "is_variant_column", "numbered_variants"]

_BLANKS_AT_THE_END = re.compile(r"[^\S\r\n]+\Z")
_COLUMN = re.compile(r"variant(?:_(\d+))?(_target)?")

# Questions of a data set that can be edited instead of scored: name -> fields of prompt and answer in EditRequest.
MOVABLE = {
    "rephrase": ("rephrase", "target"),
    "persona": ("persona", "target"),
    "multi_hop": ("multi_hop_prompt", "multi_hop_target"),
    "portability": ("portability_prompt", "portability_target"),
}


def clean_text(name: str, value: object, *, required: bool) -> str | None:
    """A text of a request without the blanks and line ends around it.

    After a prompt of several lines its line end stays: it may be a rendered chat, which needs it.

    Raises:
        ValueError: for what is not text, or is empty though it is required; with the name of the field.
    """
    if value is None and not required:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {type(value).__name__} ({value!r:.60})")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can smuggle in half of a surrogate pair, which no tokenizer takes
        raise ValueError(f"{name} is not valid Unicode text ({value!r:.60})") from None
    if required and not value.strip():
        raise ValueError(f"{name} is empty; an edit request needs a prompt and a target answer")
    text = value.strip()
    if "\n" in text and not name.endswith("target"):
        return _BLANKS_AT_THE_END.sub("", value.lstrip())
    return text


def as_variants(value: object, prompt: str, target: str) -> tuple[tuple[str, str], ...]:
    """Variants of a request as ``(prompt, target)`` pairs.

    A text alone is a paraphrase: its target is the request's own. What says the same as the request, or as a variant
    before it, is left out.

    Args:
        value: a list of pairs, objects with "prompt" and "target", and texts; or one text; or None.
        prompt, target: of the request.

    Raises:
        ValueError: for a variant of another form, without a target, or with another answer to a prompt that the request
            has already.
    """
    if value is None or (isinstance(value, Sequence) and not value):
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or isinstance(items, bytes):
        raise ValueError(f"variants must be a list of (prompt, target) pairs or texts, not {value!r:.60}")
    answers = {prompt.strip(): target}
    found: list[tuple[str, str]] = []
    for index, item in enumerate(items):
        name = f"variants[{index}]"
        own_prompt, own_target = _pair(name, item, target)
        own_prompt = clean_text(f"{name}: prompt", own_prompt, required=True)
        if own_target is None or (isinstance(own_target, str) and not own_target.strip()):
            raise ValueError(
                f"{name} ({own_prompt!r:.60}) has no target; give the answer, or the prompt alone as a text if the "
                "request's own target answers it"
            )
        own_target = clean_text(f"{name}: target", own_target, required=True)
        known = answers.setdefault(own_prompt.strip(), own_target)
        if known.strip() != own_target.strip():
            raise ValueError(
                f"{name} answers {own_prompt!r:.60} with {own_target!r:.60}, but the request has the target "
                f"{known!r:.60} for that prompt; it cannot hold both"
            )
        if len(answers) > len(found) + 1:
            found.append((own_prompt, own_target))
    return tuple(found)


def _pair(name: str, item: object, target: str) -> tuple[object, object]:
    if isinstance(item, str):
        return item, target
    if isinstance(item, Mapping):
        if "prompt" in item and item.keys() <= {"prompt", "target"}:
            return item["prompt"], item.get("target")
    elif isinstance(item, Sequence) and not isinstance(item, bytes) and len(item) in (1, 2):
        return item[0], item[1] if len(item) == 2 else None
    raise ValueError(
        f'{name} must be a pair (prompt, target), an object with "prompt" and "target", or a text, not {item!r:.60}'
    )


def is_variant_column(name: str) -> bool:
    """Whether a column of a table is one of variants: ``variant_1``, ``variant_1_target`` and so on."""
    return _COLUMN.fullmatch(name) is not None


def numbered_variants(record: Mapping[str, object]) -> list[object]:
    """Variants that have columns of their own: ``variant_1``, ``variant_1_target``, ``variant_2`` and so on.

    Empty cells are no variants; where only the target is empty, it is the request's own.

    Raises:
        ValueError: for a target without its variant.
    """
    prompts: dict[int, tuple[str, object]] = {}
    targets: dict[int, tuple[str, object]] = {}
    for column, cell in record.items():
        match = _COLUMN.fullmatch(str(column))
        if match and not absent(cell):
            (targets if match[2] else prompts)[int(match[1] or 0)] = (str(column), cell)
    for number, (column, _) in sorted(targets.items()):
        if number not in prompts:
            raise ValueError(f"{column} is given without {column.removesuffix('_target')}, the prompt that it answers")
    return [
        (prompt, targets[number][1]) if number in targets else prompt for number, (_, prompt) in sorted(prompts.items())
    ]


def check_movable(names: Sequence[str]) -> tuple[str, ...]:
    """Names of questions that are to become variants.

    Raises:
        ValueError: for one that cannot, with those that can.
    """
    if isinstance(names, str):
        raise ValueError(f"variants must be a list of names of {', '.join(MOVABLE)}, not the text {names!r}")
    for name in names:
        if name not in MOVABLE:
            raise ValueError(f"unknown question to be edited as a variant {with_nearest(name, MOVABLE)}")
    return tuple(names)

"""Field names of the published data sets, mapped to those of EditRequest."""

from __future__ import annotations

import difflib
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from stableedit_cpp.data.knowedit import NESTED, nested_questions
from stableedit_cpp.data.variants import MOVABLE, is_variant_column, numbered_variants
from stableedit_cpp.files.words import with_nearest

__all__ = ["FORMATS", "Format", "choose_format", "detect", "parse_fields"]

# The fields of an EditRequest, which is made of what a format finds.
_REQUIRED = ("prompt", "target")
_NAMES = (*_REQUIRED, "rephrase", "locality_prompt", "locality_target", "subject", "id", "persona")
_NAMES += ("multi_hop_prompt", "multi_hop_target", "variants", "portability_prompt", "portability_target")


@dataclass(frozen=True)
class Format:
    """Which field of a record is which field of an EditRequest.

    Attributes:
        name: of the data set, e.g. ``"zsre"``.
        fields: name in EditRequest -> name in the record. Those of ``prompt`` and ``target`` identify the format.
        locality_suffix: what the published evaluation appends to unrelated prompts.
        strict: every record has to have all fields, not only prompt and target.
    """

    name: str
    fields: Mapping[str, str]
    locality_suffix: str = ""
    strict: bool = False

    def fits(self, record: Mapping[str, object]) -> bool:
        return all(self.fields[name] in record for name in _REQUIRED)

    def uses(self, name: str) -> bool:
        """Whether a field of a record with this name makes up a part of a request."""
        more = {"stableedit": is_variant_column, "counterfact": NESTED.__contains__}.get(self.name)
        return name in self.fields.values() or (more is not None and more(name))

    def values(self, record: Mapping[str, object], seed: int = 0, variants: Sequence[str] = ()) -> dict[str, object]:
        """What a record says of each field of an EditRequest.

        Where a record gives several rephrased prompts (FEVER), one is drawn from ``seed`` and the record's prompt, so
        that neither the order of the records nor how many are read changes it. Fields that no request has are left out,
        with a warning where one looks like a slip.

        Args:
            variants: questions of the record that are to be edited with the request ("rephrase", "persona",
                "multi_hop"): they become variants and are no longer there to be scored. Of several rephrased prompts
                all do.

        Raises:
            ValueError: for a field that is missing (the message lists those that are there), or a question for
                ``variants`` that the format does not have.
        """
        needed = self.fields if self.strict else _REQUIRED
        missing = [f"{self.fields[name]!r} ({name})" for name in needed if self.fields[name] not in record]
        if missing:
            raise ValueError(
                f"the record lacks the field {' and '.join(missing)} of the {self.name} format; its fields are: "
                f"{', '.join(map(str, record)) or 'none'}"
            )
        values = {name: record.get(own) for name, own in self.fields.items()}
        if self.name == "counterfact":
            values |= {name: value for name, value in nested_questions(record).items() if values[name] is None}
        if self.name == "stableedit" and (numbered := numbered_variants(record)):
            values["variants"] = [*_listed(values["variants"]), *numbered]
        if variants:
            self._move(values, variants)
        if isinstance(values.get("rephrase"), (list, tuple)):
            draw = random.Random(f"{seed}:{values['prompt']}")
            values["rephrase"] = draw.choice(values["rephrase"]) if values["rephrase"] else None
        if self.locality_suffix and isinstance(values["locality_prompt"], str):
            values["locality_prompt"] += self.locality_suffix
        if self.name == "stableedit":
            for own in record:
                meant = _slip_of(str(own))
                if meant is not None and meant not in record:
                    warnings.warn(f"the field {own!r} of the records is not used; is it {meant!r}?", stacklevel=3)
        return values

    def _move(self, values: dict[str, object], names: Sequence[str]) -> None:
        """Make variants of these questions."""
        moved = []
        for name in names:
            prompt, target = MOVABLE[name]
            if prompt not in self.fields:
                there = [known for known, fields in MOVABLE.items() if fields[0] in self.fields]
                raise ValueError(
                    f"the {self.name} format has no {prompt} that could be edited as a variant; it has "
                    f"{', '.join(there) or 'no such question'}"
                )
            questions, answer = _listed(values.pop(prompt)), values.get(target)
            if target != "target":
                values.pop(target, None)
            moved += [(question, answer) for question in questions if question and answer]
        values["variants"] = [*_listed(values.get("variants")), *moved]


def _listed(value: object) -> list[object]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


@lru_cache(maxsize=256)
def _slip_of(name: str) -> str | None:
    """The field of a request that a name is a slip of: nearly the same, or it with something around it."""
    if name in _NAMES or is_variant_column(name):
        return None
    around = sorted((known for known in _NAMES if len(known) >= 6 and known in name.lower()), key=len, reverse=True)
    near = difflib.get_close_matches(name.lower(), _NAMES, n=1, cutoff=0.8)
    return next(iter((*near, *around)), None)


_SUBJECT_AND_ID = {"subject": "subject", "id": "id"}
_LOC = {"locality_prompt": "loc", "locality_target": "loc_ans", **_SUBJECT_AND_ID}

# In the order in which they are tried.
FORMATS = (
    Format("stableedit", {name: name for name in _NAMES}),
    # ZsRE's unrelated questions come without a question mark; the published evaluation appends it.
    Format("zsre", {"prompt": "src", "target": "ans", "rephrase": "rephrase", **_LOC}, locality_suffix="?"),
    Format("wikifactdiff", {"prompt": "src", "target": "alt", "rephrase": "rephrase", **_LOC}),
    Format(
        "counterfact",
        {
            "prompt": "prompt",
            "target": "target_new",
            "rephrase": "rephrase_prompt",
            "locality_prompt": "locality_prompt",
            "locality_target": "locality_ground_truth",
            "portability_prompt": "portability_prompt",
            "portability_target": "portability_ground_truth",
            "subject": "subject",
            "id": "case_id",
        },
    ),
    Format("ultraeditbench", {"prompt": "prompt", "target": "ans", "rephrase": "rephrase_prompt", **_LOC}),
    Format(
        "wikibigedit",
        {
            "prompt": "update",
            "target": "ans",
            "rephrase": "rephrase",
            **_LOC,
            "persona": "personas",
            "multi_hop_prompt": "mhop",
            "multi_hop_target": "mhop_ans",
        },
    ),
    Format(
        "fever",
        {
            "prompt": "prompt",
            "target": "alt",
            "rephrase": "equiv_prompt",
            "locality_prompt": "unrel_prompt",
            "locality_target": "unrel_ans",
            **_SUBJECT_AND_ID,
        },
    ),
)


def detect(record: Mapping[str, object]) -> Format:
    """The format of a record, by its prompt and target fields.

    Raises:
        ValueError: if it has those of no known format.
    """
    for format_ in FORMATS:
        if format_.fits(record):
            return format_
    known = ", ".join(f"{f.fields['prompt']} and {f.fields['target']} ({f.name})" for f in FORMATS)
    found = ", ".join(map(str, record)) or "none"
    raise ValueError(
        f"the record lacks a prompt or a target field; its fields are: {found}; expected {known}, or a mapping like "
        "--fields prompt=question,target=answer"
    )


def choose_format(format: str | Format | Mapping[str, str] | None) -> Format | None:
    """A format by its name or by a mapping from the fields of EditRequest to those of the records.

    Raises:
        ValueError: for an unknown name (with the known ones and the nearest), or a mapping without prompt and target or
            with a field that an EditRequest does not have.
    """
    if format is None or isinstance(format, Format):
        return format
    if isinstance(format, str):
        known = {f.name: f for f in FORMATS}
        if format not in known:
            raise ValueError(f"unknown data set format {with_nearest(format, known)}")
        return known[format]
    for name in format:
        if name not in _NAMES:
            raise ValueError(f"unknown field of an edit request {with_nearest(name, _NAMES)}")
    absent = [name for name in _REQUIRED if name not in format]
    if absent:
        raise ValueError(f"the field mapping lacks {' and '.join(absent)}; expected e.g. prompt=question,target=answer")
    return Format("mapped", dict(format), strict=True)


def parse_fields(text: str) -> dict[str, str]:
    """``"prompt=question,target=answer"`` as a mapping for ``choose_format``.

    Raises:
        ValueError: for a part that is not NAME=FIELD, or a name that occurs twice.
    """
    mapping: dict[str, str] = {}
    for part in text.split(","):
        name, equals, own = (piece.strip() for piece in part.partition("="))
        if not (name and equals and own):
            raise ValueError(f"--fields has {part!r}; expected NAME=FIELD pairs like prompt=question,target=answer")
        if name in mapping:
            raise ValueError(f"--fields names {name} twice: {mapping[name]} and {own}")
        mapping[name] = own
    return mapping

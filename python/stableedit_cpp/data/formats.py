"""Field names of the published data sets, mapped to those of EditRequest."""

from __future__ import annotations

import difflib
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from stableedit_cpp.data.knowedit import NESTED, nested_questions
from stableedit_cpp.data.names import with_known_names
from stableedit_cpp.data.nested import look_up
from stableedit_cpp.data.notes import Notes
from stableedit_cpp.data.values import absent, texts_in
from stableedit_cpp.data.variants import MOVABLE, clean_text, is_variant_column, numbered_variants
from stableedit_cpp.files.words import with_nearest

__all__ = ["FORMATS", "Format", "choose_format", "detect", "parse_fields"]

# The fields of an EditRequest, which is made of what a format finds.
_REQUIRED = ("prompt", "target")
_NAMES = (*_REQUIRED, "rephrase", "locality_prompt", "locality_target", "subject", "id", "persona")
_NAMES += ("multi_hop_prompt", "multi_hop_target", "variants", "portability_prompt", "portability_target", "aliases")
# What the templates of CounterFact, MQuAKE and EasyEdit have in place of the subject.
_SUBJECT = ("{}", "{subject}")


@dataclass(frozen=True)
class Format:
    """Which field of a record is which field of an EditRequest.

    Attributes:
        name: of the data set, e.g. ``"zsre"``.
        fields: name in EditRequest -> name in the record, or a path in it with dots. Those of ``prompt`` and ``target``
            identify the format.
        locality_suffix: what the published evaluation appends to unrelated prompts that do not end in it.
        strict: every record has to have all fields, not only prompt and target.
    """

    name: str
    fields: Mapping[str, str]
    locality_suffix: str = ""
    strict: bool = False

    def fits(self, record: Mapping[str, object]) -> bool:
        return all(self._has(record, self.fields[name]) for name in _REQUIRED)

    def uses(self, name: str) -> bool:
        """Whether a field of a record with this name makes up a part of a request."""
        if self.name == "stableedit" and is_variant_column(name):
            return True
        if (name in NESTED and self.name in _WITH_NESTED) or (name == "rephrase" and not self.strict):
            return True
        return any(own == name or own.startswith(f"{name}.") for own in self.fields.values())

    def unused(self, record: Mapping[str, object]) -> list[str]:
        """Fields of a record that make up no part of a request, as the record calls them."""
        return [str(own) for own in record if not any(map(self.uses, with_known_names({own: None}, self.names)))]

    def values(
        self, record: Mapping[str, object], seed: int = 0, variants: Sequence[str] = (), notes: Notes | None = None
    ) -> dict[str, object]:
        """What a record says of each field of an EditRequest.

        Where a record gives several rephrased prompts (FEVER), one is drawn from ``seed`` and the record's prompt, so
        that neither the order of the records nor how many are read changes it. Of several answers the first is the
        target, the others are its aliases. Numbers and dates are texts, NaN is None. A template (``"The capital of {}
        is"``) is filled in with the subject. Fields that no request has are left out, with a warning where one looks
        like a slip.

        Args:
            variants: questions of the record that are to be edited with the request ("rephrase", "persona",
                "multi_hop"): they become variants and are no longer there to be scored. Of several rephrased prompts
                all do.
            notes: is told what was changed on the way.

        Raises:
            ValueError: for a field that is missing (the message lists those that are there), a template without its
                subject, or a question for ``variants`` that the format does not have.
        """
        record = with_known_names(record, self.names)
        needed = self.fields if self.strict else _REQUIRED
        missing = [f"{self.fields[name]!r} ({name})" for name in needed if not self._has(record, self.fields[name])]
        if missing:
            raise ValueError(
                f"the record lacks the field {' and '.join(missing)} of the {self.name} format; its fields are: "
                f"{', '.join(map(str, record)) or 'none'}"
            )
        notes = notes or Notes()
        values = {name: look_up(record, own) for name, own in self.fields.items()}
        if self.name in _WITH_NESTED:
            values |= {name: value for name, value in nested_questions(record).items() if absent(values.get(name))}
        if absent(values.get("rephrase")) and not self.strict:  # KnowEdit has it under another name than CounterFact
            values["rephrase"] = record.get("rephrase")
        if self.name == "stableedit" and (numbered := numbered_variants(record)):
            values["variants"] = [*_listed(values["variants"]), *numbered]
        if variants:
            self._move(values, variants)
        values = self._as_texts(values, seed, notes)
        _fill_in(values)
        if self.locality_suffix and isinstance(values["locality_prompt"], str):
            values["locality_prompt"] = values["locality_prompt"].rstrip().removesuffix(self.locality_suffix)
            values["locality_prompt"] += self.locality_suffix
        self._say_what_is_not_used(record, notes)
        for name in _REQUIRED:
            text = values[name]
            if isinstance(text, str) and text != (plain := clean_text(name, text, required=True)):
                values[name] = plain
                notes.add("blanks", repr(text)[:60])
        return values

    def _has(self, record: Mapping[str, object], own: str) -> bool:
        return own in record or ("." in own and look_up(record, own) is not None)

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the fields of a record that it knows."""
        return frozenset(own.partition(".")[0] for own in self.fields.values()) | frozenset(self.fields.values())

    def _as_texts(self, values: Mapping[str, object], seed: int, notes: Notes) -> dict[str, object]:
        """Each field as a text or None; those of ``variants`` and ``aliases`` as lists."""
        found: dict[str, object] = {"aliases": texts_in(values.get("aliases"))}
        for name, value in values.items():
            if value is None or type(value) is str:
                if name != "aliases":
                    found[name] = value
                continue
            if name == "aliases":
                continue
            if name == "variants":
                found[name] = None if absent(value) else value
                continue
            texts = texts_in(value)
            if len(texts) > 1:
                if name == "prompt":
                    raise ValueError(f"prompt must be text, not {type(value).__name__} ({value!r:.60})")
                if name == "rephrase":
                    texts = [random.Random(f"{seed}:{values['prompt']}").choice(texts)]
                elif name == "target":
                    notes.add("answers", name)
                    found["aliases"] += texts[1:]
                elif name != "multi_hop_prompt":
                    notes.add("lists", self.fields.get(name, name))
            found[name] = texts[0] if texts else None
        return found

    def _say_what_is_not_used(self, record: Mapping[str, object], notes: Notes) -> None:
        if self.name not in ("stableedit", "mapped"):
            return
        for own in map(str, record):
            if self.uses(own):
                continue
            meant = _slip_of(own, tuple(self.fields.values()))
            if meant is not None and meant not in record:
                warnings.warn(f"the field {own!r} of the records is not used; is it {meant!r}?", stacklevel=4)
            else:
                notes.add("unused", own)

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


def _fill_in(values: dict[str, object]) -> None:
    """Put the subject where a template has a place for it.

    Raises:
        ValueError: for a template of a prompt without a subject.
    """
    subject = values.get("subject")
    for name, value in values.items():
        if type(value) is str and "{" in value and name != "subject" and any(place in value for place in _SUBJECT):
            if isinstance(subject, str):
                for place in _SUBJECT:
                    value = value.replace(place, subject)
                values[name] = value
            elif name == "prompt":
                raise ValueError(
                    f"the prompt {value!r:.60} is a template, and there is no subject to fill in; give a subject, or "
                    "write the prompt out"
                )


def _listed(value: object) -> list[object]:
    return [] if absent(value) else list(value) if isinstance(value, (list, tuple)) else [value]


@lru_cache(maxsize=256)
def _slip_of(name: str, known: tuple[str, ...] = _NAMES) -> str | None:
    """The field of a request that a name is a slip of: nearly the same, or it with something around it."""
    if name in known or is_variant_column(name):
        return None
    around = sorted((one for one in known if len(one) >= 6 and one in name.lower()), key=len, reverse=True)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.8)
    return next(iter((*near, *around)), None)


_SUBJECT_AND_ID = {"subject": "subject", "id": "id"}
_WITH_NESTED = ("counterfact", "stableedit", "zsre", "wikifactdiff")  # of EasyEdit
_REWRITE = {"prompt": "requested_rewrite.prompt", "target": "requested_rewrite.target_new.str"}
_REWRITE |= {"subject": "requested_rewrite.subject", "id": "case_id"}
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
    # As ROME and MEMIT have it: the right answer to a neighbour is the one that the subject had.
    Format(
        "counterfact-rome",
        {
            **_REWRITE,
            "rephrase": "paraphrase_prompts",
            "locality_prompt": "neighborhood_prompts",
            "locality_target": "requested_rewrite.target_true.str",
        },
    ),
    Format(
        "mquake",
        {
            **_REWRITE,
            "rephrase": "requested_rewrite.question",
            "multi_hop_prompt": "questions",
            "multi_hop_target": "new_answer",
        },
    ),
    Format(
        "rippleedits",
        {
            "prompt": "edit.prompt",
            "target": "edit.target",
            "rephrase": "rephrase",
            "locality_prompt": "locality_prompt",
            "locality_target": "locality_target",
            "portability_prompt": "portability_prompt",
            "portability_target": "portability_target",
        },
    ),
    Format(
        "hallueditbench",
        {
            "prompt": "question",
            "target": "object",
            "rephrase": "paraphrased_question",
            "locality_prompt": "locality_question",
            "subject": "subject",
            "multi_hop_prompt": "question_2hop",
            "multi_hop_target": "answer_2hop",
        },
    ),
)
_KNOWN = frozenset(own.partition(".")[0] for format_ in FORMATS for own in format_.fields.values()) | {*NESTED}


def detect(record: Mapping[str, object]) -> Format:
    """The format of a record, by its prompt and target fields; case, blanks and hyphens in their names do not matter.

    Raises:
        ValueError: if it has those of no known format.
    """
    named = with_known_names(record, _KNOWN)
    for format_ in FORMATS:
        if format_.fits(named) and not (format_.name == "counterfact-rome" and "new_answer" in named):
            return format_
    slips = {str(own): _slip_of(str(own)) for own in named}
    meant = " and ".join(f"{own!r} for {slip!r}" for own, slip in slips.items() if slip in _REQUIRED)
    known = ", ".join(f"{f.fields['prompt']} and {f.fields['target']} ({f.name})" for f in FORMATS)
    found = ", ".join(map(str, record)) or "none"
    raise ValueError(
        f"the record lacks a prompt or a target field{f' (is {meant}?)' if meant else ''}; its fields are: {found}; "
        f"expected {known}, or a mapping like --fields prompt=question,target=answer"
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

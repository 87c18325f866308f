"""What is asked of a model about a request, and what each answer is worth."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.evaluation.answers import accuracy_of, read_answers, refuse_broken
from stableedit_cpp.evaluation.free_answers import free_answers, is_answer, judge
from stableedit_cpp.evaluation.locality import Reference, UneditedAnswers, locality
from stableedit_cpp.model.form import Form
from stableedit_cpp.model.tokens import TokenSequence, context_length, prompt_ids, tokenize
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["ALL_PROBES", "PROBES", "Asked", "Asking", "Question", "names_of_scores"]

# What is asked of a model about a request: name of the score -> prompt and answer, as fields of EditRequest.
PROBES = {
    "efficacy": ("prompt", "target"),
    "generalization": ("rephrase", "target"),
    "specificity": ("locality_prompt", "locality_target"),
    "portability": ("portability_prompt", "portability_target"),
    "persona": ("persona", "target"),
}
# Of its variants, a request may have several.
ALL_PROBES = (*PROBES, "variants")
_ALWAYS = ("efficacy", "generalization", "specificity")
_GENERATED = ("efficacy", "generalization", "portability", "persona", "variants")
_FREE = ("free", "contains", "contains_and_stops")
_LOCALITY = ("locality_same", "locality_agreement", "locality_kl")


# Of the questions, prompts and answers; and of the unrelated prompts.
Tokens = tuple[list[tuple[tuple[int, ...], tuple[int, ...]]], list[tuple[int, ...]]]


class Question(NamedTuple):
    """One prompt of one request."""

    request: int
    probe: str
    name: str
    prompt: str
    answer: str
    others: tuple[str, ...] = ()  # other spellings of the answer

    @property
    def right(self) -> tuple[str, ...]:
        return (self.answer, *self.others)

    def put(self, records: Sequence[dict[str, object]], name: str, value: object) -> None:
        """Write a value into the record of the request, or add it to those of the other variants."""
        record = records[self.request]
        record[name] = [*(record.get(name) or []), value] if self.probe == "variants" else value


class Asked(NamedTuple):
    """What is asked about some requests: questions with the tokens of prompts and answers, which of them are answered
    freely, and the tokens of unrelated prompts by the index of their request. ids: of the requests."""

    ids: list[str]
    questions: list[Question]
    sequences: list[TokenSequence]
    free: list[int]
    unrelated: dict[int, tuple[int, ...]]

    @property
    def probes(self) -> set[str]:
        return {question.probe for question in self.questions}

    @property
    def prompts(self) -> int:
        return len(self.sequences) + len(self.free) + 2 * len(self.unrelated)

    @property
    def tokens(self) -> Tokens:
        """Of all prompts and answers, for ``Asking.ask`` of the same requests."""
        return [(sequence.ids, sequence.answer) for sequence in self.sequences], [*self.unrelated.values()]


@dataclass(frozen=True)
class Asking:
    """How a model is asked; see ``evaluate``."""

    model: torch.nn.Module
    tokenizer: object
    metrics: tuple[str, ...]
    reference: Reference | UneditedAnswers | None
    form: Form
    max_tokens: int
    trunk: TrunkCache | None
    allow_broken: bool

    def ask(
        self,
        requests: Sequence[EditRequest],
        begin: int = 0,
        places: Sequence[str] | None = None,
        tokens: Tokens | None = None,
    ) -> Asked:
        """
        Args:
            begin: number of the first request in its stream. places: where they come from, if that says more.
            tokens: what ``Asked.tokens`` was of these requests: nothing is tokenised or checked again.

        Raises:
            ValueError: for what cannot be asked.
        """
        places = places or [f"request {begin + index}" for index in range(len(requests))]
        questions = [
            question for index, request in enumerate(requests) for question in _questions(index, request, places[index])
        ]
        free = [i for i, q in enumerate(questions) if q.probe in _GENERATED] if "generation" in self.metrics else []
        unrelated = [i for i, r in enumerate(requests) if r.locality_prompt] if self.reference is not None else []
        ids = [request.id or str(begin + index) for index, request in enumerate(requests)]
        if tokens is None:
            limit = context_length(self.model)
            pairs = [(question.prompt, question.answer) for question in questions]
            sequences = tokenize(self.tokenizer, pairs, limit, [question.name for question in questions], self.form)
            prompts = [requests[index].locality_prompt for index in unrelated]
            found = _unrelated_ids(self.tokenizer, prompts, [places[index] for index in unrelated], limit, self.form)
        else:
            sequences, found = [TokenSequence(*pair) for pair in tokens[0]], tokens[1]
        return Asked(ids, questions, sequences, free, dict(zip(unrelated, found, strict=True)))

    def score(self, asked: Asked, names: Sequence[str], bar: tqdm) -> list[dict[str, object]]:
        """A record of each request; ``bar`` goes on by the prompts."""
        model, questions, sequences = self.model, asked.questions, asked.sequences
        records: list[dict[str, object]] = [{"id": id, **dict.fromkeys(names)} for id in asked.ids]

        def mark_broken(broken: list[int], count: int) -> None:
            if not self.allow_broken:
                refuse_broken(model, [questions[i].name for i in broken], count)
            for i in broken:
                records[questions[i].request]["broken"] = True

        passes = {"max_tokens": self.max_tokens, "on_done": bar.update}
        read = read_answers(model, sequences, trunk=self.trunk, **passes)
        accuracy = accuracy_of(sequences, read)
        mark_broken(accuracy.isnan().nonzero().flatten().tolist(), len(sequences))
        for question, value in zip(questions, accuracy.nan_to_num(0.0).tolist(), strict=True):
            question.put(records, question.probe, value)
            if "exact_match" in self.metrics:
                question.put(records, f"{question.probe}_exact_match", float(value == 1))
        if asked.free:
            expected, how = [sequences[i] for i in asked.free], {"end": self.form.end, "trunk": self.trunk, **passes}
            written = free_answers(model, self.tokenizer, expected, [read[i] for i in asked.free], **how)
            mark_broken([i for i, text in zip(asked.free, written, strict=True) if text.broken], len(asked.free))
            for i, continuation in zip(asked.free, written, strict=True):
                probe, right = questions[i].probe, questions[i].right
                found = [judge(continuation, answer) for answer in right]
                questions[i].put(records, f"{probe}_free", float(any(is_answer(continuation, a) for a in right)))
                questions[i].put(records, f"{probe}_contains", float(any(contains for contains, _ in found)))
                questions[i].put(records, f"{probe}_contains_and_stops", float(any(stops for _, stops in found)))
                questions[i].put(records, f"{probe}_text", continuation.text)
        if asked.unrelated:
            reference = self.reference
            unedited = reference if isinstance(reference, UneditedAnswers) else UneditedAnswers(reference)
            own = unedited.to(self.tokenizer, list(asked.unrelated.values()), end=self.form.end, **passes)
            kept = locality(model, unedited, own, trunk=self.trunk, **passes)
            for i, answer, *values in zip(asked.unrelated, own, *(column.tolist() for column in kept), strict=True):
                records[i] |= {n: None if math.isnan(v) else v for n, v in zip(_LOCALITY, values, strict=True)}
                records[i]["unedited_text"] = self.tokenizer.decode(answer.answer, skip_special_tokens=True)
        return [_variants_together(record) for record in records]


def _variants_together(record: dict[str, object]) -> dict[str, object]:
    """With one value for the variants of the request instead of one each; a text each stays."""
    lists = {name: values for name, values in record.items() if isinstance(values, list) and not name.endswith("_text")}
    return record | {name: fmean(values) if name == "variants" else min(values) for name, values in lists.items()}


def _questions(index: int, request: EditRequest, place: str) -> list[Question]:
    """Those that the request has prompt and answer for; a null multi-hop question is none.

    A multi-hop question is one of portability, where there is no other.
    """
    found = []
    whose = place + (f" ({request.id})" if request.id else "")
    for probe, names in PROBES.items():
        prompt, answer = (getattr(request, name) for name in names)
        if probe == "portability" and not (prompt and answer):
            prompt, answer = request.multi_hop_prompt, request.multi_hop_target
        if prompt and answer:
            others = request.aliases if answer == request.target else ()
            found.append(Question(index, probe, f"{whose}, {probe}", prompt, answer, others))
    for number, (prompt, answer) in enumerate(request.variants):
        found.append(Question(index, "variants", f"{whose}, variant {number}", prompt, answer))
    return found


def names_of_scores(asked: Collection[str], metrics: Collection[str], with_locality: bool) -> tuple[str, ...]:
    """Of all scores, in order."""
    probes = [probe for probe in ALL_PROBES if probe in asked or probe in _ALWAYS]
    names = list(probes)
    if "exact_match" in metrics:
        names += [f"{probe}_exact_match" for probe in probes]
    if "generation" in metrics:
        names += [f"{probe}_{score}" for probe in probes if probe in _GENERATED for score in _FREE]
    return tuple(names) + _LOCALITY * with_locality


def _unrelated_ids(
    tokenizer, prompts: Sequence[str], places: Sequence[str], limit: int | None, form: Form
) -> list[tuple[int, ...]]:
    """Of unrelated prompts, which are asked without any answer.

    Raises:
        ValueError: for one without tokens, or longer than the model's context.
    """
    found = [tuple(ids) for ids in prompt_ids(tokenizer, prompts, form)] if prompts else []
    for place, ids in zip(places, found, strict=True):
        if not ids or (limit is not None and len(ids) > limit):
            raise ValueError(
                f"{place}, locality: the unrelated prompt has {len(ids)} tokens; expected 1 to the model's "
                f"context of {limit}"
            )
    return found

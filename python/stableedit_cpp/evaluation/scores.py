"""Scores of a model on edit requests: those of the field, and stricter ones beside them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest, as_requests
from stableedit_cpp.evaluation.answers import accuracy_of, read_answers, refuse_broken
from stableedit_cpp.evaluation.free_answers import free_answers, is_answer, judge
from stableedit_cpp.evaluation.locality import Reference, UneditedAnswers, locality
from stableedit_cpp.files.words import with_nearest
from stableedit_cpp.model.form import Form, find_form
from stableedit_cpp.model.kind import check_tokenizer, language_model
from stableedit_cpp.model.tokens import context_length, prompt_ids, tokenize
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["DEFAULT_METRICS", "METRICS", "PROBES", "Score", "Scores", "check_metrics", "evaluate", "mean_and_error"]

METRICS = ("accuracy", "exact_match", "generation", "locality")
DEFAULT_METRICS = ("accuracy", "generation")  # and locality wherever the unedited model is known

# What is asked of a model about a request: name of the score -> prompt and answer, as fields of EditRequest.
PROBES = {
    "efficacy": ("prompt", "target"),
    "generalization": ("rephrase", "target"),
    "specificity": ("locality_prompt", "locality_target"),
    "portability": ("portability_prompt", "portability_target"),
    "persona": ("persona", "target"),
}
# Of its variants, a request may have several.
_ALL_PROBES = (*PROBES, "variants")
_ALWAYS = ("efficacy", "generalization", "specificity")
_EARLIER = {"multi_hop": "portability"}  # names that scores had
_GENERATED = ("efficacy", "generalization", "portability", "persona", "variants")
_FREE = ("free", "contains", "contains_and_stops")
_LOCALITY = ("locality_same", "locality_agreement", "locality_kl")


class Score(NamedTuple):
    """
    Attributes:
        mean: over the requests that have the prompt for it; None where none has.
        standard_error: of the mean. scored, skipped: requests with and without the prompt.
    """

    mean: float | None
    standard_error: float | None
    scored: int
    skipped: int


@dataclass(frozen=True, repr=False)
class Scores(Mapping[str, Score]):
    """All scores by name: ``scores["efficacy_exact_match"].mean``; ``str(scores)`` is a table.

    Attributes:
        names: of the scores, in order.
        per_request: for each request, in order, ``id`` (its own or its index) and its value of each score by name, None
            where it lacks the prompt; with free generation also the text, e.g. ``efficacy_text``, with locality the
            unedited model's, ``unedited_text``, and with ``allow_broken`` a ``broken`` where the model answered NaN.
        efficacy: mean token accuracy on the edit prompts. generalization: on the rephrased ones. specificity: on the
            unrelated ones, against the data set's answer (it may rise above the unedited model's). portability: on
            what follows from the edit (``multi_hop`` is an earlier name). persona: on those questions. variants: on
            those that are edited with the request. Each is None where no request has such a prompt.
    """

    names: tuple[str, ...]
    per_request: list[dict[str, object]]
    efficacy: float | None = field(init=False, compare=False)
    generalization: float | None = field(init=False, compare=False)
    specificity: float | None = field(init=False, compare=False)
    portability: float | None = field(init=False, compare=False)
    persona: float | None = field(init=False, compare=False)
    variants: float | None = field(init=False, compare=False)

    def __post_init__(self) -> None:
        for probe in _ALL_PROBES:
            object.__setattr__(self, probe, self[probe].mean if probe in self.names else None)

    @property
    def multi_hop(self) -> float | None:
        return self.portability

    def __getitem__(self, name: str) -> Score:
        for earlier, present in _EARLIER.items():
            name = name.replace(earlier, present)
        if name not in self.names:
            raise KeyError(f"no score {with_nearest(name, self.names)}")
        values = [record[name] for record in self.per_request if record[name] is not None]
        return Score(*mean_and_error(values), len(values), len(self.per_request) - len(values))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def standard_errors(self) -> dict[str, float | None]:
        """Of all means, by name."""
        return {name: score.standard_error for name, score in self.items()}

    @property
    def broken(self) -> int:
        """Requests to which the model answered NaN, with ``allow_broken``."""
        return sum("broken" in record for record in self.per_request)

    def means(self) -> dict[str, float | None]:
        """By name."""
        return {name: score.mean for name, score in self.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """For each score, how many requests were scored and how many skipped, because they lack the prompt for it."""
        return {name: {"scored": score.scored, "skipped": score.skipped} for name, score in self.items()}

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        rest = {"standard_errors": self.standard_errors, "counts": self.counts(), "per_request": self.per_request}
        return {**self.means(), **rest}

    def __str__(self) -> str:
        # What is missing is said once, not again for each score of the same prompt.
        shown = {n: score for n, score in self.items() if score.mean is not None or self.broken or n in _ALL_PROBES}
        width = max([15, *(len(name) + 1 for name in shown)])
        lines = []
        for name, score in shown.items():
            if score.mean is None:
                reason = "the model is broken" if self.broken else "no request has the prompt for it"
                lines.append(f"{name:<{width}}not scored: {reason}")
                continue
            unit = " nats" if name == "locality_kl" else ""
            without = f", {score.skipped} without the prompt" if score.skipped else ""
            figures = f"{score.mean:.3f} ± {score.standard_error:.3f}{unit}"
            lines.append(f"{name:<{width}}{figures}   ({score.scored} requests{without})")
        if self.broken:
            lines.append(f"the model is broken: it answers NaN to {self.broken} of {len(self.per_request)} requests")
        return "\n".join(lines)

    __repr__ = __str__


class _Question(NamedTuple):
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


def evaluate(
    model: torch.nn.Module,
    tokenizer,
    requests: Iterable[EditRequest | Mapping[str, object]],
    *,
    metrics: Collection[str] = DEFAULT_METRICS,
    reference: Reference | UneditedAnswers | None = None,
    chat_template: bool | None = None,
    end_of_answer: bool = False,
    max_tokens_per_forward: int = 2048,
    trunk: TrunkCache | None = None,
    allow_broken: bool = False,
    progress: bool | None = None,
) -> Scores:
    """Score a model on edit requests, edited or not.

    Teacher-forced token accuracy, always: for each prompt, the share of answer tokens that are the model's top choice
    when the answer so far is given; averaged over requests. It flatters, since the answer so far is given. What a user
    sees is beside it by default: free answers, and locality where the unedited model is known.

    Args:
        metrics: what to score beside token accuracy. ``"generation"``: greedy answers to all but the unrelated
            prompts: whether they are the answer and then stop (``efficacy_free``, see
            ``is_answer``), contain it (``efficacy_contains``), and contain it and then stop or go on in a new sentence
            (``efficacy_contains_and_stops``, see ``judge``); they may be 8 tokens longer than the answer, where the
            model's context allows that. ``"exact_match"``: whether all answer tokens are top choices when the answer so
            far is given (``efficacy_exact_match`` and so on). ``"locality"``: needs a reference.
        reference: the unedited model, ``editor.unedited``, or ``UneditedAnswers`` of one of them for many evaluations;
            turns on locality, which is left out without it. The unedited model answers the unrelated prompts greedily,
            up to 16 tokens or its end, whatever the data set's answer is, and the edited one is run over that: share of
            the prompts with the same whole answer (``locality_same``), top-1 agreement along it
            (``locality_agreement``) and KL divergence in nats (``locality_kl``).
        chat_template, end_of_answer: the form in which all prompts are asked and all answers expected, as in
            ``EditorConfig``. None is the form in which the default editor edits: chats where the template belongs to
            the model, as that of an instruct model does, else plain text. For a model that was edited in another form
            give that, ``editor.form.chat``; for comparison with published scores False. A fact edited in one form can
            be scored in the other. With an end, it counts as a token of every answer.
        trunk: ``TrunkCache(model, editor.modules)``; the second evaluation of the same prompts then runs only the
            layers that edits can change.
        allow_broken: score a model that answers NaN as well: such an answer is wrong (0), its ``locality_kl`` None, and
            the request is marked (``Scores.broken``).
        progress: show a bar; None shows it on a terminal.

    Raises:
        ValueError: for what is no causal language model; a bad request, or a prompt and answer longer than the model's
            context; a trunk cache whose layers have changed; an unknown metric; locality without a reference, or one
            with another vocabulary; a chat template that is not there or of no use.
        ModelBroken: if the model or the reference answers NaN, unless ``allow_broken``.

    The variants of a request have one score together: the mean of their token accuracy, and yes where the answer is yes
    for all of them (``variants_exact_match``, ``variants_free`` and so on).
    """
    model = language_model(model)
    check_tokenizer(tokenizer)
    metrics = check_metrics(metrics, reference)
    requests = as_requests(requests)
    questions = [question for index, request in enumerate(requests) for question in _questions(index, request)]
    asked = [question.name for question in questions]
    limit = context_length(model)
    form = find_form(model, tokenizer, chat_template=chat_template, end_of_answer=end_of_answer)
    sequences = tokenize(tokenizer, [(question.prompt, question.answer) for question in questions], limit, asked, form)
    free = [i for i, q in enumerate(questions) if q.probe in _GENERATED] if "generation" in metrics else []
    unrelated = [i for i, r in enumerate(requests) if r.locality_prompt] if reference is not None else []
    unrelated_ids = _unrelated_ids(tokenizer, requests, unrelated, limit, form)

    names = _names({question.probe for question in questions}, metrics, reference is not None)
    records: list[dict[str, object]] = [
        {"id": request.id or str(index), **dict.fromkeys(names)} for index, request in enumerate(requests)
    ]

    def mark_broken(broken: list[int], count: int) -> None:
        if not allow_broken:
            refuse_broken(model, [asked[i] for i in broken], count)
        for i in broken:
            records[questions[i].request]["broken"] = True

    total = len(sequences) + len(free) + 2 * len(unrelated)
    bar = tqdm(total=total, desc="Evaluating", unit="prompt", disable=None if progress is None else not progress)
    with bar:
        passes = {"max_tokens": max_tokens_per_forward, "on_done": bar.update}
        read = read_answers(model, sequences, trunk=trunk, **passes)
        accuracy = accuracy_of(sequences, read)
        mark_broken(accuracy.isnan().nonzero().flatten().tolist(), len(sequences))
        for question, value in zip(questions, accuracy.nan_to_num(0.0).tolist(), strict=True):
            question.put(records, question.probe, value)
            if "exact_match" in metrics:
                question.put(records, f"{question.probe}_exact_match", float(value == 1))
        if free:
            expected, how = [sequences[i] for i in free], {"end": form.end, "trunk": trunk, **passes}
            written = free_answers(model, tokenizer, expected, [read[i] for i in free], **how)
            mark_broken([i for i, text in zip(free, written, strict=True) if text.broken], len(free))
            for i, continuation in zip(free, written, strict=True):
                probe, right = questions[i].probe, questions[i].right
                found = [judge(continuation, answer) for answer in right]
                questions[i].put(records, f"{probe}_free", float(any(is_answer(continuation, a) for a in right)))
                questions[i].put(records, f"{probe}_contains", float(any(contains for contains, _ in found)))
                questions[i].put(records, f"{probe}_contains_and_stops", float(any(stops for _, stops in found)))
                questions[i].put(records, f"{probe}_text", continuation.text)
        if unrelated:
            unedited = reference if isinstance(reference, UneditedAnswers) else UneditedAnswers(reference)
            own = unedited.to(tokenizer, unrelated_ids, end=form.end, **passes)
            kept = locality(model, unedited, own, trunk=trunk, **passes)
            for i, answer, *values in zip(unrelated, own, *(column.tolist() for column in kept), strict=True):
                records[i] |= {n: None if math.isnan(v) else v for n, v in zip(_LOCALITY, values, strict=True)}
                records[i]["unedited_text"] = tokenizer.decode(answer.answer, skip_special_tokens=True)
    return Scores(names, [_variants_together(record) for record in records])


def _variants_together(record: dict[str, object]) -> dict[str, object]:
    """With one value for the variants of the request instead of one each; a text each stays."""
    lists = {name: values for name, values in record.items() if isinstance(values, list) and not name.endswith("_text")}
    return record | {name: fmean(values) if name == "variants" else min(values) for name, values in lists.items()}


def _questions(index: int, request: EditRequest) -> list[_Question]:
    """Those that the request has prompt and answer for; a null multi-hop question is none.

    A multi-hop question is one of portability, where there is no other.
    """
    found = []
    whose = f"request {index}" + (f" ({request.id})" if request.id else "")
    for probe, names in PROBES.items():
        prompt, answer = (getattr(request, name) for name in names)
        if probe == "portability" and not (prompt and answer):
            prompt, answer = request.multi_hop_prompt, request.multi_hop_target
        if prompt and answer:
            others = request.aliases if answer == request.target else ()
            found.append(_Question(index, probe, f"{whose}, {probe}", prompt, answer, others))
    for number, (prompt, answer) in enumerate(request.variants):
        found.append(_Question(index, "variants", f"{whose}, variant {number}", prompt, answer))
    return found


def _names(asked: Collection[str], metrics: Collection[str], with_locality: bool) -> tuple[str, ...]:
    """Of all scores, in order."""
    probes = [probe for probe in _ALL_PROBES if probe in asked or probe in _ALWAYS]
    names = list(probes)
    if "exact_match" in metrics:
        names += [f"{probe}_exact_match" for probe in probes]
    if "generation" in metrics:
        names += [f"{probe}_{score}" for probe in probes if probe in _GENERATED for score in _FREE]
    return tuple(names) + _LOCALITY * with_locality


def _unrelated_ids(
    tokenizer, requests: Sequence[EditRequest], chosen: Sequence[int], limit: int | None, form: Form
) -> list[tuple[int, ...]]:
    """Of the unrelated prompts of the chosen requests, which are asked without any answer.

    Raises:
        ValueError: for one without tokens, or longer than the model's context.
    """
    prompts = [requests[index].locality_prompt for index in chosen]
    found = [tuple(ids) for ids in prompt_ids(tokenizer, prompts, form)] if prompts else []
    for index, ids in zip(chosen, found, strict=True):
        if not ids or (limit is not None and len(ids) > limit):
            raise ValueError(
                f"request {index}, locality: the unrelated prompt has {len(ids)} tokens; expected 1 to the model's "
                f"context of {limit}"
            )
    return found


def check_metrics(metrics: Collection[str], reference: Reference | None) -> tuple[str, ...]:
    """The metrics by their names in ``METRICS``; "exact-match", as the command line has it, is "exact_match".

    Raises:
        ValueError: for an unknown metric, or locality without a reference.
    """
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a list of names, not the text {metrics!r}")
    metrics = tuple(str(metric).replace("-", "_") for metric in metrics)
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {with_nearest(metric, METRICS)}")
    if "locality" in metrics and reference is None:
        raise ValueError("locality compares with the unedited model: give reference=editor.unedited, or that model")
    return metrics


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error (unbiased; 0 for a single value)."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))

"""Scores of a model on edit requests: those of the field, and stricter ones beside them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest, as_requests
from stableedit_cpp.evaluation.generation import generate_continuations, judge
from stableedit_cpp.evaluation.locality import Reference, locality
from stableedit_cpp.evaluation.probes import PROBES, probes_of
from stableedit_cpp.evaluation.teacher_forcing import token_accuracy
from stableedit_cpp.files.words import with_nearest
from stableedit_cpp.model.tokens import context_length, tokenize
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["METRICS", "Scores", "check_metrics", "evaluate", "mean_and_error"]

METRICS = ("accuracy", "exact_match", "generation", "locality")
_ALWAYS = ("efficacy", "generalization", "specificity")
_GENERATED = ("efficacy", "generalization", "multi_hop", "persona")
_ROOM = 8  # tokens that a free answer may take beyond those of the expected one


@dataclass(frozen=True)
class Scores:
    """Means over the requests that have the prompt for it; None where no request has.

    Attributes:
        efficacy: token accuracy on the edit prompts. generalization: on the rephrased prompts. specificity: on the
            unrelated prompts against the data set's answer (it may rise above the unedited model's).
        standard_errors: of all means, by name.
        per_request: for each request, in order, ``id`` (its own or its index) and its value of each score by name, None
            where it lacks the prompt; with free generation also the text, e.g. ``efficacy_text``.
        multi_hop, persona: token accuracy on the multi-hop questions and on the persona's; None and not among the
            other attributes where no request has such a question.
        further: the means of the metrics that were asked for beside token accuracy, by name (see ``evaluate``).
    """

    efficacy: float | None
    generalization: float | None
    specificity: float | None
    standard_errors: dict[str, float | None]
    per_request: list[dict[str, object]]
    multi_hop: float | None = None
    persona: float | None = None
    further: dict[str, float | None] = field(default_factory=dict)

    def means(self) -> dict[str, float | None]:
        """All scores by name."""
        return {name: self.further.get(name, getattr(self, name, None)) for name in self.standard_errors}

    def counts(self) -> dict[str, dict[str, int]]:
        """For each score, how many requests were scored and how many skipped, because they lack the prompt for it."""
        scored = {name: sum(record[name] is not None for record in self.per_request) for name in self.standard_errors}
        return {name: {"scored": n, "skipped": len(self.per_request) - n} for name, n in scored.items()}

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        rest = {"standard_errors": self.standard_errors, "counts": self.counts(), "per_request": self.per_request}
        return {**self.means(), **rest}

    def __str__(self) -> str:
        width = max([15, *(len(name) + 1 for name in self.standard_errors)])
        lines = []
        for name, mean in self.means().items():
            count = self.counts()[name]
            if mean is None:
                lines.append(f"{name:<{width}}not scored: no request has the prompt for it")
                continue
            unit = " nats" if name == "locality_kl" else ""
            without = f", {count['skipped']} without the prompt" if count["skipped"] else ""
            figures = f"{mean:.3f} ± {self.standard_errors[name]:.3f}{unit}"
            lines.append(f"{name:<{width}}{figures}   ({count['scored']} requests{without})")
        return "\n".join(lines)


def evaluate(
    model: torch.nn.Module,
    tokenizer,
    requests: Iterable[EditRequest | Mapping[str, object]],
    *,
    metrics: Collection[str] = ("accuracy",),
    reference: Reference | None = None,
    max_tokens_per_forward: int = 2048,
    trunk: TrunkCache | None = None,
    progress: bool | None = None,
) -> Scores:
    """Score a model on edit requests, edited or not.

    Token accuracy, always: for each prompt, the share of answer tokens that are the model's top choice when the answer
    so far is given; averaged over requests.

    Args:
        metrics: what to score beside token accuracy. ``"exact_match"``: whether all answer tokens are top choices
            (``efficacy_exact_match`` and so on). ``"generation"``: greedy answers to the edit, rephrased, multi-hop and
            persona prompts, whether they contain the answer (``efficacy_contains``) and then stop
            (``efficacy_contains_and_stops``), see ``judge``. ``"locality"``: on the unrelated prompts, top-1 agreement
            with the unedited model (``locality_agreement``) and KL divergence from it in nats (``locality_kl``).
        reference: the unedited model, or ``editor.unedited``; turns on locality.
        trunk: ``TrunkCache(model, editor.modules)``; the second evaluation of the same prompts then runs only the
            layers that edits can change.
        progress: show a bar; None shows it on a terminal.

    Raises:
        ValueError: for a bad request, or a prompt and answer longer than the model's context; a trunk cache whose
            layers have changed; an unknown metric; locality without a reference, or one with another vocabulary.
    """
    check_metrics(metrics, reference)
    requests = as_requests(requests)
    names, pairs, owners = [], [], []
    for index, request in enumerate(requests):
        for probe, pair in probes_of(request).items():
            names.append(f"request {index}" + (f" ({request.id})" if request.id else "") + f", {probe}")
            pairs.append(pair)
            owners.append((index, probe))
    sequences = tokenize(tokenizer, pairs, context_length(model), names)
    free = [i for i, (_, probe) in enumerate(owners) if probe in _GENERATED] if "generation" in metrics else []
    unrelated = [i for i, (_, probe) in enumerate(owners) if probe == "specificity"] if reference is not None else []

    asked = {probe for _, probe in owners}
    probes = [probe for probe in PROBES if probe in asked or probe in _ALWAYS]
    further = [f"{probe}_exact_match" for probe in probes if "exact_match" in metrics]
    if "generation" in metrics:
        further += [f"{p}_{score}" for p in probes if p in _GENERATED for score in ("contains", "contains_and_stops")]
    if reference is not None:
        further += ["locality_agreement", "locality_kl"]
    records: list[dict[str, object]] = [
        {"id": request.id or str(index), **dict.fromkeys([*probes, *further])} for index, request in enumerate(requests)
    ]
    total = len(sequences) + len(free) + len(unrelated)
    bar = tqdm(total=total, desc="Evaluating", unit="prompt", disable=None if progress is None else not progress)
    with bar:
        passes = {"max_tokens": max_tokens_per_forward, "on_done": bar.update}
        accuracy = token_accuracy(model, sequences, trunk=trunk, **passes)
        for (index, probe), value in zip(owners, accuracy.tolist(), strict=True):
            records[index][probe] = value
            if "exact_match" in metrics:
                records[index][f"{probe}_exact_match"] = float(value == 1)
        if free:
            room = [len(sequences[i].answer) + _ROOM for i in free]
            written = generate_continuations(model, tokenizer, [pairs[i][0] for i in free], room, **passes)
            for i, continuation in zip(free, written, strict=True):
                index, probe = owners[i]
                contains, stops = judge(continuation, pairs[i][1])
                records[index] |= {
                    f"{probe}_contains": float(contains),
                    f"{probe}_contains_and_stops": float(stops),
                    f"{probe}_text": continuation.text,
                }
        if unrelated:
            compared = locality(model, reference, [sequences[i] for i in unrelated], **passes)
            for i, same, kl in zip(unrelated, *(values.tolist() for values in compared), strict=True):
                records[owners[i][0]] |= {"locality_agreement": same, "locality_kl": kl}

    means, errors = {}, {}
    for name in [*probes, *further]:
        means[name], errors[name] = mean_and_error([r[name] for r in records if r[name] is not None])
    return Scores(
        **{probe: means[probe] for probe in probes},
        standard_errors=errors,
        per_request=records,
        further={name: means[name] for name in further},
    )


def check_metrics(metrics: Collection[str], reference: Reference | None) -> None:
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a list of names, not the text {metrics!r}")
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {with_nearest(metric, METRICS)}")
    if "locality" in metrics and reference is None:
        raise ValueError("locality compares with the unedited model: give reference=editor.unedited, or that model")


def mean_and_error(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error (unbiased; 0 for a single value)."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))

"""Scores of a model on edit requests: those of the field, and stricter ones beside them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.shelf import Shelf
from stableedit_cpp.data.spool import Spool
from stableedit_cpp.data.stream import as_stream, digest_of, parts_of
from stableedit_cpp.evaluation.asking import ALL_PROBES, PROBES, Asking, names_of_scores
from stableedit_cpp.evaluation.locality import Reference, UneditedAnswers
from stableedit_cpp.evaluation.totals import Score, Totals, mean_and_error
from stableedit_cpp.files.words import with_nearest
from stableedit_cpp.model.form import find_form
from stableedit_cpp.model.kind import check_tokenizer, language_model
from stableedit_cpp.model.linears import few_shapes
from stableedit_cpp.model.ranks import Distributed, data_parallel
from stableedit_cpp.model.trunk import TrunkCache
from stableedit_cpp.model.untouched import input_device

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "PROBES",
    "Score",
    "Scores",
    "check_metrics",
    "evaluate",
    "known_metrics",
    "mean_and_error",
]

METRICS = ("accuracy", "exact_match", "generation", "locality")
DEFAULT_METRICS = ("accuracy", "generation")  # and locality wherever the unedited model is known

_EARLIER = {"multi_hop": "portability"}  # names that scores had


@dataclass(frozen=True, repr=False)
class Scores(Mapping[str, Score]):
    """All scores by name: ``scores["efficacy_exact_match"].mean``; ``str(scores)`` is a table.

    Attributes:
        names: of the scores, in order.
        per_request: for each request, in order, ``id`` (its own or its index) and its value of each score by name, None
            where it lacks the prompt; with free generation also the text, e.g. ``efficacy_text``, with locality the
            unedited model's, ``unedited_text``, and with ``allow_broken`` a ``broken`` where the model answered NaN.
            Empty where they were not kept (``details``).
        totals: of a long stream, from which the scores are taken then.
        efficacy: mean token accuracy on the edit prompts. generalization: on the rephrased ones. specificity: on the
            unrelated ones, against the data set's answer (it may rise above the unedited model's). portability: on
            what follows from the edit (``multi_hop`` is an earlier name). persona: on those questions. variants: on
            those that are edited with the request. Each is None where no request has such a prompt.
    """

    names: tuple[str, ...]
    per_request: list[dict[str, object]]
    totals: Totals | None = field(default=None, compare=False)
    efficacy: float | None = field(init=False, compare=False)
    generalization: float | None = field(init=False, compare=False)
    specificity: float | None = field(init=False, compare=False)
    portability: float | None = field(init=False, compare=False)
    persona: float | None = field(init=False, compare=False)
    variants: float | None = field(init=False, compare=False)

    def __post_init__(self) -> None:
        for probe in ALL_PROBES:
            object.__setattr__(self, probe, self[probe].mean if probe in self.names else None)

    @property
    def multi_hop(self) -> float | None:
        return self.portability

    def __getitem__(self, name: str) -> Score:
        for earlier, present in _EARLIER.items():
            name = name.replace(earlier, present)
        if name not in self.names:
            raise KeyError(f"no score {with_nearest(name, self.names)}")
        if self.totals is not None:
            return self.totals.score(name)
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
    def requests(self) -> int:
        """How many were asked about."""
        return self.totals.requests if self.totals else len(self.per_request)

    @property
    def broken(self) -> int:
        """Requests to which the model answered NaN, with ``allow_broken``."""
        return self.totals.broken if self.totals else sum("broken" in record for record in self.per_request)

    def means(self) -> dict[str, float | None]:
        """By name."""
        return {name: score.mean for name, score in self.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """For each score, how many requests were scored and how many skipped, because they lack the prompt for it."""
        return {name: {"scored": score.scored, "skipped": score.skipped} for name, score in self.items()}

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        rest: dict[str, object] = {"standard_errors": self.standard_errors, "counts": self.counts()}
        kept = {"per_request": self.per_request} if len(self.per_request) == self.requests else {}
        return {**self.means(), **rest, **kept}

    def __str__(self) -> str:
        # What is missing is said once, not again for each score of the same prompt.
        shown = {n: score for n, score in self.items() if score.mean is not None or self.broken or n in ALL_PROBES}
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
            lines.append(f"the model is broken: it answers NaN to {self.broken} of {self.requests} requests")
        return "\n".join(lines)

    __repr__ = __str__


def evaluate(
    model: torch.nn.Module,
    tokenizer,
    requests: Iterable[EditRequest | Mapping[str, object]],
    *,
    metrics: Collection[str] = DEFAULT_METRICS,
    reference: Reference | UneditedAnswers | None = None,
    chat_template: bool | None = None,
    end_of_answer: bool = False,
    split_special_tokens: bool = True,
    max_tokens_per_forward: int = 2048,
    trunk: TrunkCache | None = None,
    allow_broken: bool = False,
    details: bool | None = None,
    progress: bool | None = None,
    distributed: Distributed = None,
) -> Scores:
    """Score a model on edit requests, edited or not.

    Teacher-forced token accuracy, always: for each prompt, the share of answer tokens that are the model's top choice
    when the answer so far is given; averaged over requests. It flatters, since the answer so far is given. What a user
    sees is beside it by default: free answers, and locality where the unedited model is known.

    Args:
        requests: a list, a table, a ``Path``, or any iterable, which is read to its end first. Of more than 10,000 that
            are no list a few thousand at a time are in memory (``open_requests``); the forward passes are packed from
            these.
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
            give that, ``**editor.form.asked``; for comparison with published scores False. A fact edited in one form
            can be scored in the other. With an end, it counts as a token of every answer.
        split_special_tokens: what prompts and answers spell is text, also where it is the name of a control token, as
            in ``EditorConfig``; False for prompts that are rendered already, with ``chat_template=False``.
        trunk: ``TrunkCache(model, editor.modules)``; the second evaluation of the same prompts then runs only the
            layers that edits can change.
        allow_broken: score a model that answers NaN as well: such an answer is wrong (0), its ``locality_kl`` None, and
            the request is marked (``Scores.broken``).
        details: keep the values of each request (``Scores.per_request``), which takes about 2 KB of memory each; None
            keeps them unless the requests are such a long stream.
        progress: show a bar; None shows it on a terminal.
        distributed: as ``Editor`` has it: share the work with other processes, which make the same call.

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
    requests = as_stream(requests, progress=progress)
    how = {"end_of_answer": end_of_answer, "split_special_tokens": split_special_tokens}
    form = find_form(model, tokenizer, chat_template=chat_template, **how)
    asking = Asking(model, tokenizer, metrics, reference, form, max_tokens_per_forward, trunk, allow_broken)
    with data_parallel(distributed) as group:
        group.serve(input_device(model))
        if group.size > 1:
            group.check_same({"requests": digest_of(requests)}, "give all of them the same")
        return _scores(asking, requests, details, progress if group.lead else False)


def _scores(asking: Asking, requests: Sequence[EditRequest], details: bool | None, progress: bool | None) -> Scores:
    shown = None if progress is None else not progress
    metrics, with_locality = asking.metrics, asking.reference is not None
    if not isinstance(requests, Spool):
        asked = asking.ask(requests)
        names = names_of_scores(asked.probes, metrics, with_locality)
        with tqdm(total=asked.prompts, desc="Evaluating", unit="prompt", disable=shown) as bar:
            return Scores(names, asking.score(asked, names, bar))
    probes, prompts, kept = set(), 0, []
    with Shelf() as tokens:
        with tqdm(total=len(requests), desc="Checking", unit="request", disable=shown) as bar:
            for begin, part in parts_of(requests):
                asked = asking.ask(part, begin, requests.places(begin, begin + len(part)))
                probes, prompts = probes | asked.probes, prompts + asked.prompts
                tokens.put(asked.tokens)
                bar.update(len(part))
        names = names_of_scores(probes, metrics, with_locality)
        totals = Totals(names)
        with few_shapes(), tqdm(total=prompts, desc="Evaluating", unit="prompt", disable=shown) as bar:
            for (begin, part), known in zip(parts_of(requests), tokens, strict=True):
                records = asking.score(asking.ask(part, begin, tokens=known), names, bar)
                totals.add(records)
                kept += records if details else ()
    return Scores(names, kept, totals)


def check_metrics(metrics: Collection[str], reference: Reference | None) -> tuple[str, ...]:
    """As ``known_metrics``; raises also for locality without a reference."""
    metrics = known_metrics(metrics)
    if "locality" in metrics and reference is None:
        raise ValueError("locality compares with the unedited model: give reference=editor.unedited, or that model")
    return metrics


def known_metrics(metrics: Collection[str]) -> tuple[str, ...]:
    """The metrics by their names in ``METRICS``; "exact-match", as the command line has it, is "exact_match".

    Raises:
        ValueError: for an unknown metric.
    """
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a list of names, not the text {metrics!r}")
    metrics = tuple(str(metric).replace("-", "_") for metric in metrics)
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {with_nearest(metric, METRICS)}")
    return metrics

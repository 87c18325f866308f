"""The scores of a model at a checkpoint: over the edits so far, and by their age."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.evaluation import UneditedAnswers, evaluate
from stableedit_cpp.evaluation.scores import mean_and_error
from stableedit_cpp.experiments.sources import Source
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["Scorer", "age_bins", "sample_positions", "summary"]


class Scorer:
    """Scores a model on a stream.

    Args:
        sample: how many requests stand for all edits; None takes all.
        age_sample: how many stand for each bin of ages.
        unedited: answers of the unedited model, for locality; each unrelated prompt is answered once, whatever is
            scored later.
        asked: the form in which the editor edits (``Form.asked``).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        source: Source,
        *,
        turn_size: int,
        sample: int | None,
        age_sample: int,
        metrics: Collection[str],
        unedited: UneditedAnswers,
        asked: Mapping[str, bool],
        max_tokens: int,
        trunk: TrunkCache | None = None,
        progress: bool | None = None,
    ) -> None:
        self._model, self._tokenizer, self._source = model, tokenizer, source
        self._turn_size, self._sample, self._age_sample = turn_size, sample, age_sample
        self._how = {
            "metrics": metrics,
            "reference": unedited if "locality" in metrics else None,
            **asked,
            "max_tokens_per_forward": max_tokens,
            "trunk": trunk,
            "allow_broken": True,
            "progress": progress,
        }

    def unedited(self, edits: int) -> tuple[dict, list[dict], list[dict]]:
        """The scores on a stream of so many before any of it is edited; as ``edited``, without ages."""
        positions = sample_positions(0, edits, self._sample, self._source.seed)
        records = self._records(positions)
        for record in records:
            record |= {"age": None, "in_sample": True}
        return summary(records), [], records

    def edited(self, edits: int) -> tuple[dict, list[dict], list[dict]]:
        """After so many edits: scores of all, scores by age, and one record a request."""
        seed = self._source.seed
        whole = set(sample_positions(0, edits, self._sample, seed))
        bins = age_bins(edits, self._turn_size)
        chosen = set(whole)
        for begin, end in bins:
            chosen.update(sample_positions(edits - end, edits - begin, self._age_sample, seed))
        records = self._records(sorted(chosen))
        for record in records:
            record |= {"age": edits - 1 - record["index"], "in_sample": record["index"] in whole}
        ages = [
            {"from": begin, "to": end, "scores": summary([r for r in records if begin <= r["age"] < end])}
            for begin, end in bins
        ]
        return summary([record for record in records if record["in_sample"]]), ages, records

    def of(self, requests: Sequence[EditRequest]) -> list[dict]:
        """One record a request; None where it lacks the prompt for a score, or the score is not finite.

        A model that has broken down is scored like any other: an answer that is not there is wrong, and the record is
        marked ``broken``.
        """
        records = evaluate(self._model, self._tokenizer, requests, **self._how).per_request
        return [_finite(record) for record in records]

    def _records(self, positions: list[int]) -> list[dict]:
        found = self.of(self._source.pick(positions))
        return [{"index": index, **record} for index, record in zip(positions, found, strict=True)]


def _finite(record: Mapping[str, object]) -> dict[str, object]:
    """JSON has no infinity, which the divergence from a model that rules out a token is."""
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in record.items()}


def summary(records: Sequence[Mapping[str, object]]) -> dict[str, dict[str, float | int | None]]:
    """Mean, standard error and number of what the records have scores of, by name."""
    names = [name for name in (records[0] if records else {}) if not _is_other(name)]
    scores = {}
    for name in names:
        values = [record[name] for record in records if record[name] is not None]
        mean, error = mean_and_error(values)
        scores[name] = {"mean": mean, "standard_error": error, "count": len(values)}
    return scores


def _is_other(name: str) -> bool:
    return name in ("id", "index", "age", "in_sample", "broken") or name.endswith("_text")


def age_bins(edits: int, turn_size: int) -> list[tuple[int, int]]:
    """Ages of edits, youngest first, as ``[begin, end)``: the last turn, as much again, then twice as much each.

    The age of an edit is the number of edits since: 0 for the last.
    """
    edges = [0, turn_size]
    while edges[-1] < edits:
        edges.append(edges[-1] * 2)
    return [(begin, min(end, edits)) for begin, end in pairwise(edges) if begin < edits]


def sample_positions(begin: int, end: int, size: int | None, seed: int) -> list[int]:
    """``size`` positions of ``[begin, end)``, drawn without replacement; all of them for None.

    Every position of the stream has a fixed random rank and the lowest are taken. So the samples of a growing range
    overlap as far as they can: curves are smoother, and what a trunk cache keeps is used again.
    """
    if size is None or size >= end - begin:
        return list(range(begin, end))
    ranks = np.random.default_rng(seed).random(end)[begin:]  # the first numbers do not depend on how many are drawn
    return sorted((np.argpartition(ranks, size)[:size] + begin).tolist())

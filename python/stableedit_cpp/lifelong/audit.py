"""Which edits still hold."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest, as_requests
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.evaluation.answers import answer_scores, refuse_broken
from stableedit_cpp.files.words import check_whole
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["AuditEntry", "AuditReport", "audit", "current"]


@dataclass(frozen=True)
class AuditEntry:
    """One request.

    Attributes:
        index: into the requests that were given. id: the request's own or its index.
        holds: whether every answer token is the model's top choice, with at least the probability asked for.
        accuracy: share of the answer tokens that are the top choice.
        probability: of the least likely answer token.
    """

    index: int
    id: str
    holds: bool
    accuracy: float
    probability: float


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        requests: how many current ones there are; superseded: how many a later request with the same prompt replaced.
        min_probability: that every answer token had to have.
        entries: those that were looked at, in order.
    """

    requests: int
    superseded: int
    min_probability: float
    entries: list[AuditEntry]

    @property
    def forgotten(self) -> list[int]:
        """Indices of the requests that do not hold."""
        return [entry.index for entry in self.entries if not entry.holds]

    @property
    def held_share(self) -> float | None:
        """None where nothing was looked at."""
        return fmean(entry.holds for entry in self.entries) if self.entries else None

    @property
    def standard_error(self) -> float | None:
        """Of ``held_share``; None for fewer than two entries."""
        count = len(self.entries)
        return math.sqrt(self.held_share * (1 - self.held_share) / (count - 1)) if count > 1 else None

    @property
    def efficacy(self) -> float | None:
        """Mean accuracy, as ``evaluate`` has it."""
        return fmean(entry.accuracy for entry in self.entries) if self.entries else None

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {
            "requests": self.requests,
            "superseded": self.superseded,
            "min_probability": self.min_probability,
            "audited": len(self.entries),
            "held_share": self.held_share,
            "standard_error": self.standard_error,
            "efficacy": self.efficacy,
            "entries": [asdict(entry) for entry in self.entries],
        }

    def __str__(self) -> str:
        if not self.entries:
            return "there is no request to audit"
        held = len(self.entries) - len(self.forgotten)
        error = "" if self.standard_error is None else f" ± {self.standard_error:.3f}"
        sample = "" if len(self.entries) == self.requests else f", a sample of {len(self.entries)} of {self.requests}"
        superseded = f"; {self.superseded} superseded ones left out" if self.superseded else ""
        least = f" with probability {self.min_probability:g} or more" if self.min_probability else ""
        return f"{held} of {len(self.entries)} edits hold{least} ({self.held_share:.3f}{error}{sample}{superseded})"


def audit(
    editor: Editor,
    requests: Iterable[EditRequest | Mapping[str, object]],
    *,
    sample: int | None = None,
    seed: int = 0,
    min_probability: float | None = None,
    trunk: TrunkCache | None = None,
    progress: bool | None = None,
) -> AuditReport:
    """Measure which edits still hold in the editor's model. Nothing is changed.

    Args:
        requests: what was edited, in the order of the stream. Of several with the same prompt the last is current and
            the others are left out.
        sample: look at so many of the current ones, drawn by ``seed``; None looks at all.
        min_probability: that every answer token must have; None takes ``config.take_probability``.
        trunk: ``TrunkCache(model, editor.modules)``: later audits of the same requests then run only the layers that
            edits can change.
        progress: show a bar; None shows it on a terminal.

    Raises:
        ValueError: for a bad request or argument, or a trunk cache whose layers have changed.
        ModelBroken: if the model answers NaN.
    """
    requests = as_requests(requests)
    least = editor.config.take_probability if min_probability is None else min_probability
    if not 0.0 <= least < 1.0:
        raise ValueError(f"min_probability must be at least 0 and less than 1, not {least!r}")
    check_whole("sample", sample, none=True)
    chosen = known = current(requests)
    if sample is not None and sample < len(known):
        chosen = sorted(random.Random(seed).sample(known, sample))
    sequences = editor.tokenize([requests[index] for index in chosen])
    bar = tqdm(total=len(chosen), desc="Auditing", unit="edit", disable=None if progress is None else not progress)
    with bar:
        scores = answer_scores(
            editor.model,
            sequences,
            max_tokens=editor.config.max_tokens_per_forward,
            trunk=trunk,
            on_done=bar.update,
        )
    broken = [requests[chosen[i]].id or str(chosen[i]) for i in scores.accuracy.isnan().nonzero().flatten().tolist()]
    refuse_broken(editor.model, [f"request {name}" for name in broken], len(chosen))
    entries = [
        AuditEntry(index, requests[index].id or str(index), accuracy == 1.0 and likely >= least, accuracy, likely)
        for index, accuracy, likely in zip(chosen, scores.accuracy.tolist(), scores.probability.tolist(), strict=True)
    ]
    return AuditReport(len(known), len(requests) - len(known), least, entries)


def current(requests: Sequence[EditRequest]) -> list[int]:
    """Indices of the requests that no later one with the same prompt supersedes."""
    last = {request.question: index for index, request in enumerate(requests)}
    return sorted(last.values())

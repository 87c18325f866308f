"""Which edits still hold."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest, as_requests
from stableedit_cpp.data.superseding import current_parts
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
        holds: whether every answer token, of its prompt and of its variants, is the model's top choice, with at least
            the probability asked for.
        accuracy: share of the answer tokens of its prompt that are the top choice, as ``evaluate`` scores efficacy.
        probability: of the least likely answer token, those of variants included.
        lost_variants: prompts of its variants that do not hold.
    """

    index: int
    id: str
    holds: bool
    accuracy: float
    probability: float
    lost_variants: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        requests: how many current ones there are; superseded: how many a later request replaced that asks their prompt.
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
        """Mean accuracy, as ``evaluate`` has it: of the prompts, not of the variants."""
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
        requests: what was edited, in the order of the stream. Of several that ask the same, as prompt or variant, the
            last is current: the others are left out, or what they asked as a variant is.
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
    parts = current_parts(requests)
    chosen = list(parts)
    if sample is not None and sample < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, sample))
    looked_at = [parts[index] for index in chosen]
    sequences = editor.tokenize(looked_at)
    owners = [index for index, request in zip(chosen, looked_at, strict=True) for _ in request.statements]
    bar = tqdm(total=len(sequences), desc="Auditing", unit="prompt", disable=None if progress is None else not progress)
    with bar:
        scores = answer_scores(
            editor.model,
            sequences,
            max_tokens=editor.config.max_tokens_per_forward,
            trunk=trunk,
            on_done=bar.update,
        )
    broken = [requests[owners[i]].id or str(owners[i]) for i in scores.accuracy.isnan().nonzero().flatten().tolist()]
    refuse_broken(editor.model, [f"request {name}" for name in broken], len(sequences))
    found = zip(scores.accuracy.tolist(), scores.probability.tolist(), strict=True)
    entries = [_entry(index, parts[index], least, [next(found) for _ in parts[index].statements]) for index in chosen]
    return AuditReport(len(parts), len(requests) - len(parts), least, entries)


def _entry(index: int, request: EditRequest, least: float, found: Sequence[tuple[float, float]]) -> AuditEntry:
    """
    Args:
        found: accuracy and probability of each statement.
    """
    held = [accuracy == 1.0 and likely >= least for accuracy, likely in found]
    lost = [prompt for (prompt, _), holds in zip(request.statements, held, strict=True) if not holds]
    return AuditEntry(
        index,
        request.id or str(index),
        all(held),
        accuracy=found[0][0],
        probability=min(likely for _, likely in found),
        lost_variants=lost[not held[0] :],
    )


def current(requests: Sequence[EditRequest]) -> list[int]:
    """Indices of the requests whose prompt no later one asks, as its prompt or as a variant."""
    return list(current_parts(requests))

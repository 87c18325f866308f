"""Which edits still hold."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import fmean

from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.spool import Spool
from stableedit_cpp.data.stream import LISTED, as_stream
from stableedit_cpp.data.superseding import Current, current_parts
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.evaluation.answers import answer_scores, refuse_broken
from stableedit_cpp.files.environment import give_back_freed
from stableedit_cpp.files.words import check_whole
from stableedit_cpp.model.linears import few_shapes
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["AuditEntry", "AuditReport", "AuditTally", "audit", "current"]


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


@dataclass
class AuditTally:
    """What an audit of a long stream adds up.

    Attributes:
        audited: requests that were looked at. accuracy: the sum of theirs.
        forgotten: indices of those that do not hold.
    """

    audited: int = 0
    accuracy: float = 0.0
    forgotten: array = field(default_factory=lambda: array("Q"))

    def add(self, entries: Sequence[AuditEntry]) -> None:
        self.audited += len(entries)
        self.accuracy += math.fsum(entry.accuracy for entry in entries)
        self.forgotten.extend(entry.index for entry in entries if not entry.holds)


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        requests: how many current ones there are; superseded: how many a later request replaced that asks their prompt.
        min_probability: that every answer token had to have.
        entries: those that were looked at, in order; empty where they were not kept (``details``).
        tally: of a long stream, from which the rest is taken then.
    """

    requests: int
    superseded: int
    min_probability: float
    entries: list[AuditEntry]
    tally: AuditTally | None = None

    @property
    def audited(self) -> int:
        """How many were looked at."""
        return self.tally.audited if self.tally else len(self.entries)

    @property
    def forgotten(self) -> list[int]:
        """Indices of the requests that do not hold."""
        return list(self.tally.forgotten) if self.tally else [one.index for one in self.entries if not one.holds]

    @property
    def held_share(self) -> float | None:
        """None where nothing was looked at."""
        forgotten = len(self.tally.forgotten) if self.tally else sum(not one.holds for one in self.entries)
        return (self.audited - forgotten) / self.audited if self.audited else None

    @property
    def standard_error(self) -> float | None:
        """Of ``held_share``; None for fewer than two entries."""
        count = self.audited
        return math.sqrt(self.held_share * (1 - self.held_share) / (count - 1)) if count > 1 else None

    @property
    def efficacy(self) -> float | None:
        """Mean accuracy, as ``evaluate`` has it: of the prompts, not of the variants."""
        if self.tally:
            return self.tally.accuracy / self.audited
        return fmean(entry.accuracy for entry in self.entries) if self.entries else None

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {
            "requests": self.requests,
            "superseded": self.superseded,
            "min_probability": self.min_probability,
            "audited": self.audited,
            "held_share": self.held_share,
            "standard_error": self.standard_error,
            "efficacy": self.efficacy,
            "entries": [asdict(entry) for entry in self.entries],
        }

    def __str__(self) -> str:
        if not self.audited:
            return "there is no request to audit"
        held = self.audited - len(self.forgotten)
        error = "" if self.standard_error is None else f" ± {self.standard_error:.3f}"
        sample = "" if self.audited == self.requests else f", a sample of {self.audited} of {self.requests}"
        superseded = f"; {self.superseded} superseded ones left out" if self.superseded else ""
        least = f" with probability {self.min_probability:g} or more" if self.min_probability else ""
        return f"{held} of {self.audited} edits hold{least} ({self.held_share:.3f}{error}{sample}{superseded})"


def audit(
    editor: Editor,
    requests: Iterable[EditRequest | Mapping[str, object]],
    *,
    sample: int | None = None,
    seed: int = 0,
    min_probability: float | None = None,
    trunk: TrunkCache | None = None,
    details: bool | None = None,
    progress: bool | None = None,
) -> AuditReport:
    """Measure which edits still hold in the editor's model. Nothing is changed.

    Args:
        requests: what was edited, in the order of the stream: a list, a table, a ``Path``, or any iterable, which is
            read to its end first; a long one is on the disk (``open_requests``). Of several that ask the same, as
            prompt or variant, the last is current: the others are left out, or what they asked as a variant is.
        sample: look at so many of the current ones, drawn by ``seed``; None looks at all.
        min_probability: that every answer token must have; None takes ``config.take_probability``.
        trunk: ``TrunkCache(model, editor.modules)``: later audits of the same requests then run only the layers that
            edits can change.
        details: keep the entry of each request that was looked at; None keeps them unless more than 10,000 were, of a
            long stream.
        progress: show a bar; None shows it on a terminal.

    Raises:
        ValueError: for a bad request or argument, or a trunk cache whose layers have changed.
        ModelBroken: if the model answers NaN.
    """
    requests = as_stream(requests, progress=progress)
    least = editor.config.take_probability if min_probability is None else min_probability
    if not 0.0 <= least < 1.0:
        raise ValueError(f"min_probability must be at least 0 and less than 1, not {least!r}")
    check_whole("sample", sample, none=True)
    on_disk = Current(requests) if isinstance(requests, Spool) else None
    parts = {} if on_disk else current_parts(requests)
    current: Sequence[int] = on_disk.numbers if on_disk else list(parts)
    chosen = current
    if sample is not None and sample < len(current):
        chosen = sorted(random.Random(seed).sample(current, sample))
    look = partial(_look, editor, least=least, trunk=trunk)
    if on_disk is None or len(chosen) <= LISTED:
        if on_disk is not None:
            parts = dict(zip(chosen, on_disk.parts(chosen), strict=True))
        entries = look({index: parts[index] for index in chosen}, progress)
        return AuditReport(len(current), len(requests) - len(current), least, entries)
    tally, kept = AuditTally(), []
    shown = None if progress is None else not progress
    with few_shapes(), tqdm(total=len(chosen), desc="Auditing", unit="request", disable=shown) as bar:
        for begin in range(0, len(chosen), LISTED):
            part = chosen[begin : begin + LISTED]
            entries = look(dict(zip(part, on_disk.parts(part), strict=True)), False)
            tally.add(entries)
            kept += entries if details else ()
            bar.update(len(part))
            give_back_freed()
    return AuditReport(len(current), len(requests) - len(current), least, kept, tally)


def _look(
    editor: Editor, parts: Mapping[int, EditRequest], progress: bool | None, *, least: float, trunk: TrunkCache | None
) -> list[AuditEntry]:
    """What an audit finds of these requests, by index."""
    sequences = editor.tokenize(list(parts.values()))
    owners = [index for index, request in parts.items() for _ in request.statements]
    bar = tqdm(total=len(sequences), desc="Auditing", unit="prompt", disable=None if progress is None else not progress)
    with bar:
        scores = answer_scores(
            editor.model,
            sequences,
            max_tokens=editor.config.max_tokens_per_forward,
            trunk=trunk,
            on_done=bar.update,
        )
    broken = [parts[owners[i]].id or str(owners[i]) for i in scores.accuracy.isnan().nonzero().flatten().tolist()]
    refuse_broken(editor.model, [f"request {name}" for name in broken], len(sequences))
    found = zip(scores.accuracy.tolist(), scores.probability.tolist(), strict=True)
    return [_entry(index, part, least, [next(found) for _ in part.statements]) for index, part in parts.items()]


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

"""What an edit did: one record a turn, and which requests took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from stableedit_cpp.data.request import EditRequest

__all__ = ["EditReport", "Failure", "Outcome", "TurnReport"]


@dataclass(frozen=True)
class Failure:
    """A request that had not taken when its turn was done.

    Attributes:
        index: in the turn.
        id: of the request.
        answer: what the model answered freely to its prompt then, in as many tokens as the target has; None where
            nobody asked. It is the target where the model was only not sure enough of it (``take_probability``).
        only_variants: whether its prompt had taken, and only variants had not; ``answer`` is then None.
        variants: those that had not taken, each prompt with what the model answered, as ``answer``.
    """

    index: int
    id: str | None
    answer: str | None = None
    only_variants: bool = False
    variants: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, index: int, request: EditRequest, answers: Mapping[str, str | None]) -> Failure:
        """
        Args:
            answers: the prompts that had not taken, its own or of variants, and what the model answered to each.
        """
        variants = {prompt: answer for prompt, answer in answers.items() if prompt != request.prompt}
        return cls(index, request.id, answers.get(request.prompt), request.prompt not in answers, variants)


@dataclass(frozen=True)
class Outcome:
    """What became of a request, when its turn was done.

    Attributes:
        index: in the call.
        took: whether the model gave the target, and those of all variants, with at least ``take_probability``.
        answer, only_variants, variants: see ``Failure``; None, False and empty where it took.
    """

    index: int
    request: EditRequest
    took: bool
    answer: str | None
    only_variants: bool = False
    variants: Mapping[str, str | None] = field(default_factory=dict)


@dataclass
class TurnReport:
    """One turn.

    Attributes:
        requests, answer_tokens: size of the turn (n of the method is ``answer_tokens``, those of variants included).
        whitening: what was used, by statistics group ("full" falls back to "diagonal" while nu <= v + 1).
        held: requests that had taken before the first pass; None where nobody looked, as where turns have one pass.
        passes: how many solutions of the turn are in the weights (more than one only with ``max_passes``): those up to
            the one after which most requests had taken. 0 where all had before.
        taken: requests that had taken after each pass; also after those that were no better and are not in the weights.
        back_offs: how often the editor's guard had a pass solved again with a smaller step.
        drift, drift_limit: what the guard measured after the last pass, and what it allows, in nats; None without one.
        loss_before, efficacy_before: mean over requests and their variants, seen before the first pass.
        efficacy_after: over a sample of the turn, if a progress bar was shown; else None, as for a broken model.
        failed: the requests that had not taken after the last pass; None where nobody looked.
        update_norms: Frobenius norm of the last pass's update, by module.
        losses: of an editor that trains, the mean loss of each epoch, in nats; None for those that solve.
        seconds: wall time by part: "capture", "mathematics", "apply", "training" of editors that train, "guard" if
            there is one, and "outcomes" for what it took to find out ``failed``.
    """

    requests: int = 0
    answer_tokens: int = 0
    whitening: dict[str, str] = field(default_factory=dict)
    held: int | None = None
    passes: int = 0
    taken: list[int] = field(default_factory=list)
    back_offs: int = 0
    drift: float | None = None
    drift_limit: float | None = None
    loss_before: float = 0.0
    efficacy_before: float = 0.0
    efficacy_after: float | None = None
    failed: list[Failure] | None = None
    update_norms: dict[str, float] = field(default_factory=dict)
    losses: list[float] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.failed is not None:  # as JSON has them
            self.failed = [one if isinstance(one, Failure) else Failure(**one) for one in self.failed]

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall time of this context to ``seconds``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


@dataclass
class EditReport:
    """All turns of one ``edit`` or ``warm_up`` call; ``to_dict`` is ready for JSON, ``str`` for people.

    Attributes:
        seconds: wall time of the turns; not that of looking at a sample for the progress bar.
        requests: of the call, in its order; those of the turns come first. Not in ``to_dict``. Of a long stream they
            stay on the disk as long as the report is there (``data.open_requests``).
    """

    editor: str
    turns: list[TurnReport] = field(default_factory=list)
    seconds: float = 0.0
    requests: Sequence[EditRequest] = field(default=(), repr=False)

    @property
    def edits(self) -> int:
        """Requests whose turns were applied."""
        return sum(turn.requests for turn in self.turns)

    @property
    def edits_per_second(self) -> float:
        return self.edits / self.seconds if self.seconds > 0 else 0.0

    @property
    def outcomes(self) -> list[Outcome]:
        """What became of each request whose turn was applied.

        Raises:
            ValueError: where nobody looked; see ``outcomes`` of ``Editor.edit``.
        """
        return list(self._outcomes())

    def _outcomes(self) -> Iterator[Outcome]:
        requests = enumerate(self.requests)
        for turn in self.turns:
            if turn.failed is None:
                raise ValueError("nobody looked which requests took; ask for it with edit(..., outcomes=True)")
            failures = {failure.index: failure for failure in turn.failed}
            for index, (number, request) in zip(range(turn.requests), requests, strict=False):
                failed = failures.get(index)
                what = (failed.answer, failed.only_variants, failed.variants) if failed else (None,)
                yield Outcome(number, request, failed is None, *what)

    @property
    def failed(self) -> list[EditRequest]:
        """The requests that had not taken when their turns were done, to be given to ``edit`` or ``repair`` again.

        Raises:
            ValueError: as ``outcomes``.
        """
        return [outcome.request for outcome in self._outcomes() if not outcome.took]

    @property
    def back_offs(self) -> int:
        """How often the guard had a pass solved again with a smaller step."""
        return sum(turn.back_offs for turn in self.turns)

    @property
    def held(self) -> int:
        """Requests that had taken before anything was done for them."""
        return sum(turn.held or 0 for turn in self.turns)

    @property
    def drift(self) -> float | None:
        """Of the answers to unrelated prompts, as the guard measured it last, in nats; None without one."""
        return next((turn.drift for turn in reversed(self.turns) if turn.drift is not None), None)

    def seconds_by_part(self) -> dict[str, float]:
        """Wall time of the parts, summed over turns."""
        parts = {part for turn in self.turns for part in turn.seconds}
        return {part: sum(turn.seconds.get(part, 0.0) for turn in self.turns) for part in sorted(parts)}

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds_by_part().items())
        looked = [turn for turn in self.turns if turn.failed is not None]
        said = [f"{self.edits} edits in {self.seconds:.1f} s ({self.edits_per_second:.1f} edits/s: {parts})"]
        if self.held:
            said.append(f"{self.held} of {self.edits} held already")
        limit = next((turn.drift_limit for turn in reversed(self.turns) if turn.drift_limit is not None), None)
        if self.drift is not None and limit is not None:
            said.append(f"other answers have drifted by {self.drift:.2g} of {limit:.2g} nats")
        if self.back_offs:
            said.append(f"{self.back_offs} steps were made smaller for that limit")
        if looked:
            said.append(f"{sum(len(turn.failed) for turn in looked)} did not take")
        return "; ".join(said)

    def to_dict(self) -> dict[str, object]:
        return {
            "editor": self.editor,
            "edits": self.edits,
            "seconds": self.seconds,
            "edits_per_second": self.edits_per_second,
            "seconds_by_part": self.seconds_by_part(),
            "turns": [asdict(turn) for turn in self.turns],
        }

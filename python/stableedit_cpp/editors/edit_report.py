"""What an edit did: one record a turn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

__all__ = ["EditReport", "TurnReport"]


@dataclass
class TurnReport:
    """One turn.

    Attributes:
        requests, answer_tokens: size of the turn (n of the method is ``answer_tokens``).
        whitening: what was used, by statistics group ("full" falls back to "diagonal" while nu <= v + 1).
        passes: how often the turn was solved (more than once only with ``max_passes``).
        taken: requests that had taken after each pass but the last allowed one, after which nobody looks.
        back_offs: passes solved again with a smaller step because of the editor's guard.
        drift: what the guard measured last, in nats; None without one.
        loss_before, efficacy_before: mean over requests, seen during the first capture.
        efficacy_after: over a sample of the turn, if a progress bar was shown; else None.
        update_norms: Frobenius norm of the last pass's update, by module.
        seconds: wall time by part: "capture", "mathematics", "apply", and "guard" if there is one.
    """

    requests: int = 0
    answer_tokens: int = 0
    whitening: dict[str, str] = field(default_factory=dict)
    passes: int = 0
    taken: list[int] = field(default_factory=list)
    back_offs: int = 0
    drift: float | None = None
    loss_before: float = 0.0
    efficacy_before: float = 0.0
    efficacy_after: float | None = None
    update_norms: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

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
    """All turns of one ``edit`` or ``warm_up`` call; ``to_dict`` is ready for JSON, ``str`` for people."""

    editor: str
    turns: list[TurnReport] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def edits(self) -> int:
        """Requests whose turns were applied."""
        return sum(turn.requests for turn in self.turns)

    @property
    def edits_per_second(self) -> float:
        return self.edits / self.seconds if self.seconds > 0 else 0.0

    def seconds_by_part(self) -> dict[str, float]:
        """Wall time of the parts, summed over turns."""
        parts = {part for turn in self.turns for part in turn.seconds}
        return {part: sum(turn.seconds.get(part, 0.0) for turn in self.turns) for part in sorted(parts)}

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds_by_part().items())
        return f"{self.edits} edits in {self.seconds:.1f} s ({self.edits_per_second:.1f} edits/s: {parts})"

    def to_dict(self) -> dict[str, object]:
        return {
            "editor": self.editor,
            "edits": self.edits,
            "seconds": self.seconds,
            "edits_per_second": self.edits_per_second,
            "seconds_by_part": self.seconds_by_part(),
            "turns": [asdict(turn) for turn in self.turns],
        }

"""A stream of requests, turn by turn: progress, and where Ctrl-C or a drift limit ends it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.edit_report import EditReport
from stableedit_cpp.editors.interrupt import EditInterrupted, InterruptGuard
from stableedit_cpp.editors.turn import Turn, Work
from stableedit_cpp.model.tokens import TokenSequence

__all__ = ["names_of", "run_stream"]

# With a progress bar, so many requests of each turn are checked after it: a few percent of the turn's time.
_PROBE = 8
_TITLES = {"edit": "Editing", "warm_up": "Warm-up", "repair": "Repairing"}


def names_of(requests: Sequence[EditRequest]) -> list[str]:
    """What to call each request in a message."""
    return [f"request {index}" + (f" ({r.id})" if r.id else "") for index, r in enumerate(requests)]


def run_stream(
    work: Work,
    kind: Literal["edit", "warm_up", "repair"],
    requests: Sequence[EditRequest],
    sequences: Sequence[TokenSequence],
    progress: bool | None,
) -> EditReport:
    """Run the turns of a stream; progress, result and errors as ``Editor.edit``.

    Args:
        sequences: tokens of the requests.
    """
    names = names_of(requests)
    work.weights.attach()

    report = EditReport(work.config.editor)
    start = time.perf_counter()
    size = work.config.turn_size
    bar = tqdm(
        total=len(sequences),
        desc=_TITLES[kind],
        unit="edit",
        disable=None if progress is None else not progress,
        leave=True,
    )
    try:
        with bar, InterruptGuard() as guard:
            for begin in range(0, len(sequences), size):
                end = min(begin + size, len(sequences))
                whole = slice(begin, end)
                turn = Turn(work, kind, requests[whole], sequences[whole], names[whole]).run(guard, bar)
                report.turns.append(turn)
                report.seconds = time.perf_counter() - start
                if not bar.disable:
                    turn.efficacy_after = float(work.accuracy(sequences[whole][:_PROBE]).mean())
                    bar.set_postfix(efficacy=f"{turn.efficacy_after:.2f}", refresh=False)
                bar.update(end - begin)
                if guard.requested:
                    raise EditInterrupted(
                        f"stopped after turn {len(report.turns)} of {-(-len(sequences) // size)}, which was finished "
                        f"and applied: {end} of {len(sequences)} requests are edited",
                        report,
                    )
    except Exception as stop:
        stop.report = report  # the turns before are applied; whoever catches this may want to save them
        raise
    report.seconds = time.perf_counter() - start
    return report

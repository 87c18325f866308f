"""A stream of requests: cut into turns, progress, and where Ctrl-C or an error ends it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.edit_report import EditReport
from stableedit_cpp.editors.interrupt import EditInterrupted, InterruptGuard
from stableedit_cpp.editors.turn import Turn, Work
from stableedit_cpp.model.tokens import TokenSequence

__all__ = ["names_of", "run_stream", "turns_of"]

# With a progress bar, so many requests of each turn are checked after it: a few percent of the turn's time.
_PROBE = 8
_TITLES = {"edit": "Editing", "warm_up": "Warm-up", "repair": "Repairing"}


def names_of(requests: Sequence[EditRequest]) -> list[str]:
    """What to call each request in a message."""
    return [f"request {index}" + (f" ({r.id})" if r.id else "") for index, r in enumerate(requests)]


def turns_of(requests: Sequence[EditRequest], turn_size: int) -> Iterator[slice]:
    """Cut a stream into turns of that size, or shorter ones: no turn holds two requests with one question, which it
    would answer half and half. The later one begins a new turn, and sees the earlier one done."""
    begin, asked = 0, set()
    for index, request in enumerate(requests):
        if len(asked) == turn_size or request.question in asked:
            yield slice(begin, index)
            begin, asked = index, set()
        asked.add(request.question)
    if asked:
        yield slice(begin, len(requests))


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
    report = EditReport(work.config.editor, requests=requests)
    turns = list(turns_of(requests, work.config.turn_size))
    bar = tqdm(
        total=len(sequences),
        desc=_TITLES[kind],
        unit="edit",
        disable=None if progress is None else not progress,
        leave=True,
    )
    try:
        with bar, InterruptGuard() as guard:
            for whole in turns:
                start = time.perf_counter()
                turn = Turn(work, kind, requests[whole], sequences[whole], names[whole])
                try:
                    turn.run(guard, bar)
                finally:
                    if turn.final:
                        report.turns.append(turn.report)
                        report.seconds += time.perf_counter() - start
                if not bar.disable:  # not in the seconds: the speed is the same with and without a terminal
                    efficacy = float(work.accuracy(sequences[whole][:_PROBE]).mean())
                    turn.report.efficacy_after = None if math.isnan(efficacy) else efficacy
                    bar.set_postfix(efficacy=f"{efficacy:.2f}", refresh=False)
                bar.update(whole.stop - whole.start)
                if guard.requested:
                    raise EditInterrupted(
                        f"stopped after turn {len(report.turns)} of {len(turns)}, which was finished and applied: "
                        f"{whole.stop} of {len(requests)} requests are edited",
                        report,
                    )
    except BaseException as stop:
        stop.report = report  # the turns before are applied; whoever catches this may want to save them
        raise
    return report

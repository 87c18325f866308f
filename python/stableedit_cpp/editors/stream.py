"""A stream of requests: cut into turns, progress, and where Ctrl-C or an error ends it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Literal

from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.superseding import replaces
from stableedit_cpp.editors.ahead import AHEAD, ahead, prepared
from stableedit_cpp.editors.edit_report import EditReport
from stableedit_cpp.editors.interrupt import EditInterrupted, InterruptGuard
from stableedit_cpp.editors.together import check_weights
from stableedit_cpp.editors.turn import Turn
from stableedit_cpp.editors.work import Work
from stableedit_cpp.model.ranks import ranks
from stableedit_cpp.model.tokens import TokenSequence

__all__ = ["names_of", "run_stream", "turns_of"]

# With a progress bar, so many prompts of each turn are checked after it, in two halves: a few percent of the turn's
# time.
_PROBE = 8
_TITLES = {"edit": "Editing", "warm_up": "Warm-up", "repair": "Repairing"}


def names_of(requests: Sequence[EditRequest], begin: int = 0, places: Sequence[str] | None = None) -> list[str]:
    """What to call each statement of the requests in a message.

    Args:
        begin: number of the first one in its stream. places: where they come from, if that says more.
    """
    return [
        (places[index] if places else f"request {begin + index}")
        + (f" ({r.id})" if r.id else "")
        + (f", variant {number - 1}" if number else "")
        for index, r in enumerate(requests)
        for number in range(len(r.statements))
    ]


def turns_of(requests: Sequence[EditRequest], turn_size: int) -> Iterator[slice]:
    """Cut a stream into turns of that size, or shorter ones: no turn holds two requests of which the later replaces
    what the earlier says, which it would answer half and half. The later one begins a new turn, and sees the earlier
    one done."""
    begin, asked = 0, {}
    for index, request in enumerate(requests):
        if index - begin == turn_size or any(q in asked and replaces(request, asked[q], q) for q in request.answers):
            yield slice(begin, index)
            begin, asked = index, {}
        asked |= dict.fromkeys(request.answers, request)
    if asked:
        yield slice(begin, len(requests))


def run_stream(
    work: Work,
    kind: Literal["edit", "warm_up", "repair"],
    requests: Sequence[EditRequest],
    tokenize: Callable[[Sequence[EditRequest], int], list[TokenSequence]],
    progress: bool | None,
    make_turn: Callable[..., Turn] = Turn,
) -> EditReport:
    """Run the turns of a stream; progress, result and errors as ``Editor.edit``.

    Args:
        tokenize: gives the tokens of the statements of a turn's requests, of which the first has that number; called on
            another thread where there are more than a few turns.
        make_turn: called like ``Turn``, gives each turn.
    """
    report = EditReport(work.config.editor, requests=requests)
    turns = turns_of(requests, work.config.turn_size)
    of = ""
    if isinstance(requests, list):  # one that is on the disk would have to be read for it
        turns = list(turns)
        of = f" of {len(turns)}"
    ready = prepared(requests, turns, tokenize)
    long = len(requests) > AHEAD * work.config.turn_size
    bar = tqdm(
        total=len(requests),
        desc=_TITLES[kind],
        unit="edit",
        disable=None if progress is None else not progress,
        leave=True,
    )
    probing = ranks().by_lead("beginning a stream", lambda: not bar.disable)
    try:
        with bar, InterruptGuard() as guard, ahead(ready, AHEAD) if long else nullcontext(ready) as ready:
            for whole, part, sequences in ready:
                start = time.perf_counter()
                turn = make_turn(work, kind, part, sequences, names_of(part, whole.start))
                try:
                    turn.run(guard, bar)
                finally:
                    if turn.final:
                        report.turns.append(turn.report)
                        report.seconds += time.perf_counter() - start
                check_weights(work.weights, len(report.turns))
                if probing:  # not in the seconds: the speed is the same with and without a terminal
                    efficacy = float(work.accuracy(sequences[:_PROBE], most=_PROBE // 2).mean())
                    turn.report.efficacy_after = None if math.isnan(efficacy) else efficacy
                    bar.set_postfix(efficacy=f"{efficacy:.2f}", refresh=False)
                bar.update(whole.stop - whole.start)
                if guard.asked():
                    raise EditInterrupted(
                        f"stopped after turn {len(report.turns)}{of}, which was finished and applied: "
                        f"{whole.stop} of {len(requests)} requests are edited",
                        report,
                    )
    except BaseException as stop:
        stop.report = report  # the turns before are applied; whoever catches this may want to save them
        raise
    return report

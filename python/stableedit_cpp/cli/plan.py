"""``stableedit plan``: what a stream of edits will need, before anything is edited; and the line that `edit` prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tqdm.auto import tqdm

from stableedit_cpp.cli.choose_modules import choose_for
from stableedit_cpp.cli.datasets import reading_settings
from stableedit_cpp.cli.options import editor_config, load, set_guard, show
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.stream import open_requests
from stableedit_cpp.editors import AppliedTurn, Editor, make_editor
from stableedit_cpp.editors.followers import Follower
from stableedit_cpp.files.environment import resident_bytes
from stableedit_cpp.lifelong.plan import gigabytes, hours, plan_stream

__all__ = ["run", "say_what_it_takes"]

_SEEN = 2  # turns: what the first does once, the second does not


def run(options: argparse.Namespace) -> int:
    config = editor_config(options)
    requests = open_requests(options.requests, options.limit, **reading_settings(options), progress=True)
    model, tokenizer = load(options)
    choice, why = choose_for(options, model, tokenizer, requests, config)
    editor = make_editor(model, tokenizer, choice.config if choice else config)
    editor.check(requests)
    set_guard(editor, options)
    plan = plan_stream(editor, requests)
    modules = [module.name for module in editor.modules]
    document = {"model": options.model, "requests_file": options.requests, "edit_modules": modules, **plan.to_dict()}
    show(options, document, f"{plan}\nEdited would be {', '.join(modules)} ({why}).")
    return 0


def say_what_it_takes(editor: Editor, requests: Sequence[EditRequest]) -> None:
    """Once two turns are done, say what they tell of the whole stream: on the standard error, in one line."""
    if len(requests) > 2 * _SEEN * editor.config.turn_size:
        editor.followers.add(_FirstTurns(editor, len(requests)))


class _FirstTurns(Follower):
    def __init__(self, editor: Editor, requests: int) -> None:
        self._editor, self._requests = editor, requests
        self._turns: list[tuple[int, float]] = []

    def final(self, turn: AppliedTurn) -> None:
        if turn.kind != "edit":
            return
        self._turns.append((len(turn.requests), sum(turn.report.seconds.values())))
        if len(self._turns) < _SEEN:
            return
        self._editor.followers.remove(self)
        done, size = sum(count for count, _ in self._turns), self._turns[-1]
        left = size[1] * (self._requests - done) / size[0]
        tqdm.write(
            f"{self._requests:,} requests, {size[1] / size[0]:.3f} s each: about {hours(left)} to go; "
            f"{gigabytes(resident_bytes())} of host memory now. `stableedit plan` says more, beforehand.",
            file=sys.stderr,
        )

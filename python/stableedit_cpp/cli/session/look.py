"""``stableedit session status``, ``log`` and ``verify``: nothing of this needs the model, or stops a writer."""

from __future__ import annotations

import argparse
import dataclasses

from stableedit_cpp.cli.options import note, show
from stableedit_cpp.lifelong import SessionView, verify


def show_status(options: argparse.Namespace) -> int:
    status = SessionView(options.directory).status()
    show(options, status, status)
    return 0


def show_log(options: argparse.Namespace) -> int:
    view = SessionView(options.directory)
    if options.requests:
        fields = [
            {"id": entry.id, "turn": entry.turn, "state": entry.state, "repairs": entry.repairs}
            | {"prompt": entry.request.prompt, "target": entry.request.target}
            | {"variants": [list(pair) for pair in entry.request.variants]}
            for entry in view.history.entries.values()
        ]
        lines = [
            "{id:<20} turn {turn:<6} {state:<24} {prompt} -> {target}".format(**entry)
            + (f" (and {len(entry['variants'])} variants)" if entry["variants"] else "")
            for entry in fields
        ]
    else:
        entries = view.log(options.last)
        fields, lines = [dataclasses.asdict(entry) for entry in entries], [str(entry) for entry in entries]
    last = slice(-options.last if options.last else None, None)
    if options.json or lines[last]:
        show(options, fields[last], "\n".join(lines[last]))
    if view.damage is not None:
        note(f"stableedit: {view.journal.path}: {view.damage}")
    return 0


def show_verify(options: argparse.Namespace) -> int:
    report = verify(options.directory, repair=options.repair)
    show(options, report, report)
    return 0 if report.sound else 1

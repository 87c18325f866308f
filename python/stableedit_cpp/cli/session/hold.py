"""``stableedit session audit``, ``evaluate`` and ``repair``: what still holds, how well, and solving again."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.options import form_settings, metrics_of, note, set_guard, show
from stableedit_cpp.cli.session.common import opened
from stableedit_cpp.cli.together import writes
from stableedit_cpp.files.atomic import check_writable_file, write_json


def audit(options: argparse.Namespace) -> int:
    with opened(options) as session:
        report = session.audit(options.sample, min_probability=options.min_probability, progress=True)
    show(options, report.to_dict(), report)
    return 0


def evaluate(options: argparse.Namespace) -> int:
    if options.output:
        check_writable_file(options.output)
    metrics = metrics_of(options)
    with opened(options) as session:
        if not session.history.counts()["current"]:
            raise ValueError(f"the session {options.directory} has no current edits to score")
        scores = session.evaluate(metrics, **form_settings(options), progress=True)
    document = {"session": options.directory, **scores.to_dict()}
    show(options, document, scores)
    if options.output and writes():
        write_json(options.output, document)
        note(f"scores and per-request values are in {options.output}")
    return 0


def repair(options: argparse.Namespace) -> int:
    with opened(options) as session:
        set_guard(session.editor, options)
        settings = {"rounds": options.rounds, "budget": options.budget, "min_probability": options.min_probability}
        report = session.repair(**settings, progress=True)
    show(options, report.to_dict(), report)
    return 0

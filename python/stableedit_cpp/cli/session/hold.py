"""``stableedit session audit``, ``evaluate`` and ``repair``: what still holds, how well, and solving again."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.options import (
    add_form_options,
    add_guard_options,
    add_json_option,
    add_metrics_option,
    form_settings,
    note,
    positive,
    set_guard,
    show,
)
from stableedit_cpp.cli.session.common import add_opening_options, new_action, opened, print_json
from stableedit_cpp.evaluation import DEFAULT_METRICS
from stableedit_cpp.files.atomic import check_writable_file, write_json

_AUDIT = "  stableedit session audit edits/ --sample 500"
_EVALUATE = "  stableedit session evaluate edits/ --output scores.json"
_REPAIR = "  stableedit session repair edits/ --rounds 2"


def add_parsers(actions) -> None:
    parser = new_action(actions, "audit", "look which current edits still hold", _AUDIT, audit)
    parser.add_argument("--sample", type=positive, metavar="N", help="look at so many current requests (default: all)")
    _add_least(parser)
    parser.add_argument("--json", action="store_true", help="as JSON, with every request")
    add_opening_options(parser)

    summary = "score the current edits: efficacy, generalization, specificity, free answers, locality"
    parser = new_action(actions, "evaluate", summary, _EVALUATE, evaluate)
    own = "whether the own answers of the session's unedited model stay"
    add_metrics_option(parser, own, (*DEFAULT_METRICS, "locality"))
    add_form_options(parser, chat="as the session edits", end="not")
    parser.add_argument("--output", metavar="FILE", help="save scores and per-request values as JSON")
    add_json_option(parser)
    add_opening_options(parser)

    parser = new_action(actions, "repair", "solve again for current edits that were forgotten", _REPAIR, repair)
    parser.add_argument("--rounds", type=positive, default=1, metavar="N", help="at most (default 1)")
    parser.add_argument("--budget", type=positive, metavar="N", help="at most so many requests (default: no limit)")
    _add_least(parser)
    parser.add_argument("--json", action="store_true", help="report as JSON, with every request")
    add_guard_options(parser)
    add_opening_options(parser)


def _add_least(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-probability",
        type=float,
        metavar="X",
        help="an edit holds if every answer token is the model's top choice, with at least this probability (default: "
        "the config's take_probability)",
    )


def audit(options: argparse.Namespace) -> int:
    with opened(options) as session:
        report = session.audit(options.sample, min_probability=options.min_probability, progress=True)
    _show(report, options)
    return 0


def evaluate(options: argparse.Namespace) -> int:
    if options.output:
        check_writable_file(options.output)
    with opened(options) as session:
        if not session.current_requests():
            raise ValueError(f"the session {options.directory} has no current edits to score")
        metrics = [metric.replace("-", "_") for metric in options.metrics]
        scores = session.evaluate(metrics, **form_settings(options), progress=True)
    document = {"session": options.directory, **scores.to_dict()}
    show(options, document, scores)
    if options.output:
        write_json(options.output, document)
        note(options, f"scores and per-request values are in {options.output}")
    return 0


def repair(options: argparse.Namespace) -> int:
    with opened(options) as session:
        set_guard(session.editor, options)
        settings = {"rounds": options.rounds, "budget": options.budget, "min_probability": options.min_probability}
        report = session.repair(**settings, progress=True)
    _show(report, options)
    return 0


def _show(report, options: argparse.Namespace) -> None:
    if options.json:
        print_json(report.to_dict())
    else:
        print(report)

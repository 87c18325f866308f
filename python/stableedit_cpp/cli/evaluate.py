"""``stableedit evaluate``: score a model, edited or not."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.datasets import add_format_options, reading_settings
from stableedit_cpp.cli.models import config_of
from stableedit_cpp.cli.options import (
    DTYPES,
    FILES,
    OWN_TEMPLATE,
    add_form_options,
    add_json_option,
    add_metrics_option,
    add_model_options,
    form_settings,
    load,
    load_any,
    new_parser,
    note,
    positive,
    show,
)
from stableedit_cpp.cli.together import writes
from stableedit_cpp.data import open_requests
from stableedit_cpp.evaluation import DEFAULT_METRICS, evaluate
from stableedit_cpp.files.atomic import check_writable_file, write_json
from stableedit_cpp.files.environment import environment
from stableedit_cpp.model.form import RAW, find_form

_EXAMPLE = """\
  stableedit evaluate --model edited/ --reference smollm2-135m --requests edits.jsonl --output scores.json
  stableedit evaluate --model edited/ --requests edits.jsonl --metrics accuracy     # the published three alone"""


def add_parser(commands) -> argparse.ArgumentParser:
    summary = "score efficacy, generalization, specificity, free answers and locality, with standard errors"
    parser = new_parser(commands, "evaluate", summary, _EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--requests", required=True, metavar="FILE", help=FILES)
    add_format_options(parser)
    add_metrics_option(parser, "whether the unedited model's own answers stay; comes with --reference", DEFAULT_METRICS)
    parser.add_argument("--reference", metavar="MODEL", help="the unedited model, as for --model; turns on locality")
    add_form_options(parser, chat=f"as it was edited, where its directory says so, or else {OWN_TEMPLATE}", end="not")
    parser.add_argument("--output", metavar="FILE", help="save scores and per-request values as JSON")
    parser.add_argument(
        "--per-request",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="values of every request in the JSON; without them a stream of any length is scored in constant memory",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="score only the first N requests")
    add_json_option(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    if options.output:
        check_writable_file(options.output)
    if "locality" in options.metrics and not options.reference:
        raise ValueError("--metrics locality compares with the unedited model; say with --reference which that is")
    requests = open_requests(options.requests, options.limit, **reading_settings(options), progress=True)
    model, tokenizer = load(options)
    reference = None
    if options.reference:
        reference, _ = load_any(options.reference, options, dtype=DTYPES[options.dtype])
    metrics = [metric.replace("-", "_") for metric in options.metrics]
    edited = config_of(options.model)
    how = {"chat_template": None if edited is None else edited.chat_template, **form_settings(options)}
    details = bool(options.per_request and (options.output or options.json))
    scores = evaluate(
        model, tokenizer, requests, metrics=metrics, reference=reference, **how, details=details, progress=True
    )
    form = find_form(model, tokenizer, **how)
    if form != RAW:
        note(options, f"asked as {form.describe(tokenizer)}")
    document = {"model": options.model, "reference": options.reference, "requests": options.requests}
    document = {**document, "form": form.describe(tokenizer), **scores.to_dict(), "environment": environment()}
    show(options, document, scores)
    if reference is None and any(request.locality_prompt for request in requests):
        note(
            options,
            "locality: not scored; say with --reference which the unedited model is, to see whether its own answers to "
            "the unrelated prompts stay",
        )
    if options.output and writes():
        write_json(options.output, document)
        what = "scores and per-request values" if details else "scores"
        note(options, f"{what} are in {options.output}")
    return 0
